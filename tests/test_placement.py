"""A model on several devices, or partly on disk, gives what it gives on one: bit for bit, in every stage."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_execution_device_hook
from helpers import families
from helpers.commands import QUIET, SMALL, run_svl
from helpers.fake_devices import FakeTensor, fake_devices
from helpers.methods import CHOICES, distinct, method
from helpers.paths import ROOT
from helpers.references import logits, together
from helpers.spread_models import assert_plain, map_over, same
from hydra import compose, initialize_config_dir

import svl
from svl import config
from svl.calibration.activations import Activations
from svl.calibration.calibrate import calibrate, select
from svl.calibration.removal_probe import ModelProbe
from svl.calibration.rescoring import ModelRescoring
from svl.config import CONF
from svl.core import Patch, Plan, SvlError, Update
from svl.evaluation.efficiency import measure_efficiency
from svl.evaluation.settings import EfficiencySettings
from svl.models import devices, placement
from svl.models.lvlm import Lvlm
from svl.pruning.selfcheck import check_surgery, example_inputs
from svl.pruning.surgery import apply
from svl.run.setup import RunSetup
from svl.visual_tokens.fastv import Fastv

PLAN = Plan(4, (1,))


KINDS = ("three devices", "disk")


@pytest.fixture(scope="module", params=KINDS)
def pair(request, checkpoint):
    """A model on one device, and the same spread by a device map."""
    return loaded_twice(checkpoint("llava"), request.param)


@pytest.fixture(scope="module", params=[*KINDS, "two devices", "all on disk"])
def any_pair(request, checkpoint):
    """The same of more maps, and of a model with positions of three dimensions."""
    return loaded_twice(checkpoint("qwen" if request.param in KINDS else "llava"), request.param)


def loaded_twice(folder, kind: str) -> tuple[Lvlm, Lvlm]:
    if "devices" in kind:
        names = fake_devices()[: 2 if kind == "two devices" else 3]
        one = svl.load(folder, device=names[0])
        return one, svl.load(folder, device_map=map_over(one, names))
    one = svl.load(folder, device="cpu")
    places = map_over(one, ["cpu", "disk"] if kind == "disk" else ["disk"])
    return one, svl.load(folder, device_map=places)


def last_logits(lvlm: Lvlm, samples, encode) -> torch.Tensor:
    return logits(lvlm.model, encode(lvlm, samples.samples))


# ------------------------------------------------------------------------------------------------ where things are


def test_weights_lie_where_the_map_says(checkpoint):
    names = fake_devices()
    one = svl.load(checkpoint("llava"), device=names[1])
    assert {str(p.device) for p in one.model.parameters()} == {names[1]}
    spread = svl.load(checkpoint("llava"), device_map=map_over(one, names))
    assert [str(next(layer.parameters()).device) for layer in spread.layers] == [*names[:1] * 2, *names[1:]]
    assert str(spread.device) == names[0]
    assert list(map(str, spread.devices)) == list(names)
    assert spread.device_facts(1)["spread"] == list(names)
    assert "spread" not in one.device_facts(1)


def test_inputs_and_logits_are_at_the_first_device(pair, samples, encode):
    _, spread = pair
    inputs = encode(spread, samples.samples)
    assert {x.device for x in inputs.values()} == {spread.device}
    assert logits(spread.model, inputs).device == spread.device


def test_layers_that_do_not_fit_are_left_on_disk(checkpoint, samples, encode):
    """As transformers decides for a given memory."""
    one = svl.load(checkpoint("llava"), device="cpu")
    spread = svl.load(checkpoint("llava"), device_map="auto", max_memory={"cpu": "100KB"})
    assert {"cpu", "disk"} == set(spread.model.hf_device_map.values())
    assert torch.equal(last_logits(spread, samples, encode), last_logits(one, samples, encode))


# --------------------------------------------------------------------------------------------------------- surgery


def test_pruned_layers_stay_where_the_dense_ones_lie(pair, samples, encode, generate):
    one, spread = pair
    plan = Plan(4, (0, 2))
    expected, pruned = apply(one, plan), apply(spread, plan)
    same(last_logits(pruned, samples, encode), last_logits(expected, samples, encode))
    ours, theirs = (generate(m.model, encode(m, samples.samples[:3]), n=3) for m in (pruned, expected))
    same(list(ours.logits), list(theirs.logits))
    layers, places = spread.anatomy.layers, spread.model.hf_device_map
    assert [pruned.model.hf_device_map[f"{layers}.{i}"] for i in (0, 1)] == [places[f"{layers}.{i}"] for i in (1, 3)]
    assert len(pruned.model.hf_device_map) == len(places) - 2
    assert placement.tensor_identities(pruned.layers[1]) == placement.tensor_identities(spread.layers[3])
    assert check_surgery(spread, pruned, plan, example_inputs(spread)) == 0


def test_the_spread_model_stays_as_it_is(pair, samples, encode):
    _, spread = pair
    before, places = last_logits(spread, samples, encode), copy.deepcopy(spread.model.hf_device_map)
    hooks = {name: id(module._hf_hook) for name, module in spread.model.named_modules() if hasattr(module, "_hf_hook")}
    pruned = apply(spread, PLAN, Patch({(2, "mlp"): Update(scale=2.0)}))
    last_logits(pruned, samples, encode)
    after = {name: id(module._hf_hook) for name, module in spread.model.named_modules() if hasattr(module, "_hf_hook")}
    assert (hooks, places) == (after, spread.model.hf_device_map)
    same(last_logits(spread, samples, encode), before)


def test_patches_land_where_the_layer_lies(pair, samples, encode):
    one, spread = pair
    patch = Patch(
        {(2, "mlp"): Update(left=torch.ones(32, 1), right=torch.ones(1, 32)), (3, "attn"): Update(scale=0.5)},
        {0: {0: -1.0, 1: 1.0, 3: 1.0}},
    )
    pruned = apply(spread, PLAN, patch)
    for new, old in enumerate(PLAN.kept):
        devices_of = {t.device for layer in (pruned.layers[new], spread.layers[old]) for t in layer.parameters()}
        assert len(devices_of) == 1
    same(last_logits(pruned, samples, encode), last_logits(apply(one, PLAN, patch), samples, encode))
    again = apply(apply(one, PLAN, patch), Plan(3, (1,)))
    same(last_logits(apply(pruned, Plan(3, (1,))), samples, encode), last_logits(again, samples, encode))


@families.every
def test_every_family_is_pruned_where_it_lies(family, tmp_path):
    """Every second layer on disk, whatever kinds of layers there are and whatever goes on between them."""
    lvlm, made = families.lvlm_of(family)
    places = map_over(lvlm, ["cpu", "disk"] * (lvlm.anatomy.n_layers // 2), others="cpu")
    model = dispatch_model(copy.deepcopy(lvlm.model), places, offload_dir=tmp_path, skip_keys=["past_key_values"])
    plan = Plan(lvlm.anatomy.n_layers, lvlm.anatomy.removable[:2])
    spread = replace(lvlm, model=model)
    same(logits(apply(spread, plan).model, made.inputs), logits(apply(lvlm, plan).model, made.inputs))


# ----------------------------------------------------------------------------------- statistics, plans and patches


@pytest.mark.parametrize("batch_size", [1, 3])  # with and without a mask
def test_statistics_are_the_same(batch_size, any_pair, samples):
    one, spread = (list(calibrate(lvlm, samples, batch_size=batch_size).traces) for lvlm in any_pair)
    same(spread, one)


@pytest.fixture(scope="module")
def measured(pair, samples):
    statistics = ("cosine", "windows", "sublayers", "attention")
    return [calibrate(lvlm, samples, statistics=statistics) for lvlm in pair]


GRADIENTS = ("shortened_taylor", "linear_cosine")  # see below


@pytest.mark.parametrize("choice", [c for c in distinct("strategy") if c not in GRADIENTS])
def test_strategies_make_the_same_plan(choice, pair, measured, samples):
    plans = []
    for lvlm, stats in zip(pair, measured, strict=True):
        seen = replace(select(stats, method("selector", "tis")), probe=ModelProbe(lvlm, samples))
        again = ModelRescoring(Activations(lvlm, samples, seen), method("compensation", "magnitude"))
        plans.append(method("strategy", choice).plan(replace(seen, rescoring=again), 2))
    assert plans[0] == plans[1]


@pytest.mark.parametrize("choice", [c for c in distinct("compensation") if c not in GRADIENTS])
def test_compensations_fit_the_same_patch(choice, pair, measured, samples, encode):
    fits_the_same_patch(choice, pair, measured, samples, encode)


def fits_the_same_patch(choice, pair, measured, samples, encode):
    plan, patches = Plan(4, (1,), merges=((0, (1,)),) if choice == "merge" else ()), []
    for lvlm, stats in zip(pair, measured, strict=True):
        states = Activations(lvlm, samples, select(stats, method("selector", "tis")), batch_size=3)
        patches.append(method("compensation", choice).fit(states, plan))
    same(*patches)
    assert_plain(patches[1])
    one, spread = (apply(lvlm, plan, patch) for lvlm, patch in zip(pair, patches, strict=True))
    same(last_logits(spread, samples, encode), last_logits(one, samples, encode))


def test_removals_cost_the_same(pair, samples):
    one, spread = (ModelProbe(lvlm, samples) for lvlm in pair)
    for removed in ((), (2,)):
        candidates = [i for i in range(4) if i not in removed]
        assert spread.losses(removed, candidates) == one.losses(removed, candidates)
        assert spread.changes(removed, candidates) == one.changes(removed, candidates)
    assert spread.magnitude(1) == one.magnitude(1)


def test_sublayers_are_left_out_where_they_lie(pair, samples, encode):
    plan = Plan(4, (1,), removed_attn=(2,), removed_mlp=(0, 3))
    one, spread = (apply(lvlm, plan) for lvlm in pair)
    same(last_logits(spread, samples, encode), last_logits(one, samples, encode))


def test_gradients_in_a_process_of_their_own():
    """torch's engine counts devices when it first works: those that come into being later have no gradients."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_gradient_", __file__]
    environment = {**os.environ, "GRADIENTS_ON_FAKE_DEVICES": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "5 passed" in done.stdout


alone = pytest.mark.skipif("GRADIENTS_ON_FAKE_DEVICES" not in os.environ, reason="in a process of its own, see above")


@alone
def test_gradient_of_a_cosine_fit(pair, measured, samples, encode):
    fits_the_same_patch("linear_cosine", pair, measured, samples, encode)


@alone
def test_gradient_of_a_layer_is_that_of_one_device(llava, samples):
    """Layers on the CPU and on one fake device, on which alone gradients work, next to all on the CPU."""
    lvlm = replace(llava, model=copy.deepcopy(llava.model))
    names = fake_devices()
    for part in [*lvlm.layers[2:], lvlm.model.model.language_model.norm, lvlm.model.lm_head]:
        add_hook_to_module(part, AlignDevicesHook(names[0], place_submodules=True))
        attach_execution_device_hook(part, names[0])
    add_hook_to_module(lvlm.model, AlignDevicesHook("cpu", io_same_device=True))
    expected = ModelProbe(llava, samples).taylor()
    assert isinstance(lvlm.layers[3].mlp.down_proj.weight, FakeTensor)
    assert ModelProbe(lvlm, samples).taylor() == pytest.approx(expected, rel=1e-4)


@alone
def test_gradient_steps_of_recovery_leave_the_model_on_its_device(checkpoint, samples, tmp_path, monkeypatch):
    """Answers, states and logits of the dense model; with the same weights as on the CPU, but for rounding."""
    pytest.importorskip("peft")
    from svl.recovery import student
    from svl.recovery.distill import Distill
    from svl.recovery.training import recover

    monkeypatch.setattr(student, "check_trainable", lambda lvlm, recovery: None)  # it takes fake tensors for quantised
    name, trained = fake_devices()[0], []
    for device in ("cpu", name):
        lvlm, recovery = svl.load(checkpoint("llava"), device=device), Distill(steps=2, batch_size=2, logits=1.0)
        found = recover(lvlm, PLAN, None, samples, recovery, tmp_path / device)
        trained.append(
            {name: change.value if change.left is None else change.left for name, change in found.trained.items()}
        )
        assert {str(p.device) for p in lvlm.model.parameters()} == {device}
        assert {str(value.device) for value in trained[-1].values()} == {"cpu"}
    assert trained[0].keys() == trained[1].keys()
    for key, value in trained[0].items():
        torch.testing.assert_close(trained[1][key], value, rtol=1e-3, atol=1e-4)


def test_gradients_of_layers_that_are_elsewhere_are_refused(checkpoint, samples):
    one = svl.load(checkpoint("llava"), device="cpu")
    spread = svl.load(checkpoint("llava"), device_map=map_over(one, ["cpu", "disk"]))
    with pytest.raises(SvlError, match=r"gradients need all of 'llava' in memory.*choose another map"):
        ModelProbe(spread, samples).taylor()


# --------------------------------------------------------------------------------------------- answers and speed


@pytest.mark.parametrize("layer", [1, 3])
def test_fastv_drops_the_same_tokens(layer, any_pair, samples, encode, generate):
    one, spread = (Fastv(layer, 0.4).apply(lvlm) for lvlm in any_pair)
    same(last_logits(spread, samples, encode), last_logits(one, samples, encode))
    a, b = (generate(lvlm.model, encode(lvlm, samples.samples[:2]), n=3) for lvlm in (spread, one))
    same(list(a.logits), list(b.logits))


def test_models_that_answer_together_answer_as_alone(pair, samples, encode, generate):
    _, spread = pair
    scaled = Patch({(3, "mlp"): Update(scale=1.5)})
    models = [spread, apply(spread, Plan(4, (3,))), apply(spread, Plan(4, (2,))), apply(spread, Plan(4, (2,)), scaled)]
    inputs = encode(spread, samples.samples[:2])
    alone = [generate(m.model, inputs, n=3).logits for m in models]
    found, shared = together(models, lambda model: list(generate(model, inputs, n=3).logits))
    same(found, [list(steps) for steps in alone])
    assert 0 < shared.layers_saved < shared.layers_passed


def test_every_device_is_waited_for_when_speed_is_measured(pair, samples, monkeypatch):
    _, spread = pair
    waited = set()
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: waited.add(device))
    settings = EfficiencySettings(batch_size=2, new_tokens=3, warmup=0, repeats=1)
    found = measure_efficiency(spread, apply(spread, PLAN), samples.samples[0], settings)
    assert waited == {device for device in spread.devices if device.type != "cpu"}
    assert set(found["device"]["spread"]) == {*map(str, spread.devices), *spread.model.hf_device_map.values()}


# -------------------------------------------------------------------------------- accelerators that lack something


@alone
def test_gradient_and_other_sums_of_a_device_without_fp64_are_taken_on_the_cpu(checkpoint, samples):
    from helpers.fake_devices import accelerator

    with accelerator() as name:
        whole = results_on(svl.load(checkpoint("llava"), device=name), samples)
    with accelerator(lacks=(torch.float64,)) as name:
        with pytest.raises(TypeError, match="has no torch"):
            torch.ones(1, device=name).double()
        assert devices.fp64_device(torch.device(name)) == torch.device("cpu")
        same(results_on(svl.load(checkpoint("llava"), device=name), samples), whole)


def results_on(lvlm: Lvlm, samples) -> list:
    """All that sums in fp64."""
    stats = select(calibrate(lvlm, samples), method("selector", "tis"))
    states, probe = Activations(lvlm, samples, stats), ModelProbe(lvlm, samples)
    patches = [method("compensation", choice).fit(states, PLAN) for choice in CHOICES["compensation"]]
    return [patches, stats.cosine(), probe.magnitude(2), probe.losses((), (1, 2)), probe.taylor()]


# -------------------------------------------------------------------------------------------------------- commands


@pytest.mark.slow
def test_a_run_of_a_model_that_is_partly_on_disk_is_the_same_run(tmp_path):
    """Its keys, its plan, its scores, and every byte that it exports."""
    words = ["benchmark=demo", "benchmark.limit=2", "tracker=none", *SMALL, "paths.store=store", "paths.outputs=out"]
    words += ["compensation=refit", "ratio=0.25", "export.path=pruned"]
    elsewhere = ["model.device_map=sequential", "model.max_memory={cpu: 8MB}"]
    found = {}
    for name, placed in (("one", ["model.device=cpu"]), ("spread", elsewhere)):
        (tmp_path / name).mkdir()
        run_svl(*words, *placed, cwd=tmp_path / name)
        (file,) = (tmp_path / name / "out").rglob("result.json")
        result = json.loads(file.read_text())
        assert result["cost"]["device"].get("spread") == (["cpu", "disk"] if name == "spread" else None)
        weights = {f.name: f.read_bytes() for f in (tmp_path / name / "pruned").glob("*.safetensors")}
        found[name] = weights | {key: result[key] for key in ("keys", "plan", "scores")}
    assert "model.safetensors" in found["one"]
    assert found["spread"] == found["one"]


def test_keys_tell_of_the_attention_and_not_of_the_place(tmp_path):
    config.register_with_hydra()
    keys = []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for word in (
            "model.device=cpu",
            "model.device_map={lm_head: cpu, model: disk}",
            "model.attn_implementation=auto",
            "model.attn_implementation=eager",
            "model.attn_implementation=sdpa",
        ):
            words = ["benchmark=none", "tracker=none", f"paths.store={tmp_path}", f"paths.outputs={tmp_path}", word]
            keys.append(RunSetup(compose("config", overrides=words)).model)
    assert keys[0] == keys[1] == keys[2]
    assert "attn_implementation" not in keys[0]
    assert keys[3] == keys[0] | {"attn_implementation": "eager"}
    assert keys[4] == keys[0] | {"attn_implementation": "sdpa"}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.offload=true", r"model\.offload leaves layers on disk.*set one of the two"),
        ("model.device=cpu", r"model\.device=cpu names one device, model\.device_map several"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_at_once(word, message, tmp_path):
    refused = run_svl(word, "model.device_map=auto", *QUIET, cwd=tmp_path, code=1)
    assert re.search(message, refused.stderr)
    assert "Traceback" not in refused.stderr


def test_all_processes_of_torchrun_cannot_take_all_devices(tmp_path):
    refused = run_svl("model.device_map=auto", *QUIET, cwd=tmp_path, code=1, WORLD_SIZE="2", RANK="0")
    assert "spreads a model over all devices, but torchrun started 2 processes" in refused.stderr


def test_the_doctor_says_where_weights_will_lie(tmp_path):
    told = run_svl("doctor", "model.device_map={lm_head: cpu, model: disk}", *QUIET, cwd=tmp_path).stdout
    assert re.search(r"model\.device_map: .* of weights on 'cpu'", told)
    assert re.search(r"model\.device_map: .* of weights on 'disk'", told)
    told = run_svl("doctor", "model.device_map=auto", *QUIET, cwd=tmp_path).stdout
    assert "model.device_map=auto: transformers fills the host, then the disk" in told
    told = run_svl("doctor", "model.device_map={lm_head: cpu}", *QUIET, cwd=tmp_path, code=1).stdout
    assert "model.device_map has no place for" in told
