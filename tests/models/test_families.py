"""Every family of helpers.families: surgery, round trips, attention statistics, compensation, against plain oracles.

Results of tests marked `column` make the support table of docs/families.md (see `pytest_addoption` in conftest.py).
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.families import FAMILIES, MAPLESS, POST_NORM, REFUSED, SUPPORTED, every, generate, lvlm_of, plans
from helpers.paths import ROOT
from helpers.references import close, eager_maps, logits, skipped, update, written_times
from safetensors import safe_open
from torch import Tensor

from svl.calibration import attention, hooks
from svl.core import Patch, Plan, SvlError, Update
from svl.models.anatomy import find_anatomy
from svl.models.lvlm import Lvlm
from svl.pruning import folding, selfcheck
from svl.pruning.surgery import apply

# Layers that must stay, where there are any.
PROTECTED = {
    "qwen3_vl": {0, 1}, "qwen3_vl_moe": {0}, "qwen3_5": {4}, "lfm2_vl": {5}, "mllama": {4}, "gemma4": {3, 4, 7},
}  # fmt: skip
# --------------------------------------------------------------------------------------------------- the table


def test_every_family_is_in_the_table():
    """docs/families.md is made by scripts/make_family_table.py; here only that nothing is missing or stale."""
    table = (ROOT / "docs" / "families.md").read_text()
    assert re.findall(r"^\| `(\w+)`", table, re.M) == sorted(FAMILIES)


def test_models_are_small_and_see_their_picture():
    for name in SUPPORTED:
        lvlm, made = lvlm_of(name)
        assert lvlm.parameters() < 500_000
        if made.image_token_id is None:
            continue
        assert (made.inputs["input_ids"] == made.image_token_id).any()
        other = {k: v.flip(-1) if v.is_floating_point() else v for k, v in made.inputs.items()}
        assert (logits(made.model, other) - logits(made.model, made.inputs)).abs().max() > 0.1, name


TEXT_ONLY = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize("family", TEXT_ONLY)
@pytest.mark.column("several_images", "video")
def test_text_models_take_no_images(family, verdict):
    lvlm, _ = lvlm_of(family)
    assert not lvlm.takes_images
    assert not lvlm.takes_videos
    verdict("text")


@pytest.mark.parametrize("family", REFUSED)
@pytest.mark.column("surgery", "tis", "compensation", "export", "several_images", "video")
def test_a_family_that_cannot_be_supported_says_why(family, verdict):
    with pytest.raises(SvlError, match=re.escape(REFUSED[family])) as error:
        find_anatomy(FAMILIES[family]().model)
    verdict("refused", note=str(error.value))


# ----------------------------------------------------------------------------------------------------- surgery


@every
@pytest.mark.column("surgery")
def test_the_pruned_model_equals_the_full_one_that_skips(family, verdict):
    lvlm, made = lvlm_of(family)
    dense, config = logits(made.model, made.inputs), made.model.config.to_json_string()
    weights = {n: (t._version, t.data_ptr()) for n, t in made.model.state_dict().items()}
    for plan in plans(lvlm):
        pruned = apply(lvlm, plan)
        with skipped(lvlm, plan.removed) as reference:
            expected = logits(reference, made.inputs)
        close(logits(pruned.model, made.inputs), expected, 1e-6)
        assert (expected - dense).abs().max() > 1e-3 * dense.abs().max()  # removing them means something
        assert len(pruned.layers) == pruned.anatomy.n_layers == len(plan.kept)
        found = find_anatomy(pruned.model, image_token=made.image_token_id)
        assert found.protected.items() <= pruned.anatomy.protected.items()  # what was protected stays so
        assert replace(pruned.anatomy, protected={}) == replace(found, protected={})
        assert selfcheck.check_surgery(lvlm, pruned, plan, made.inputs) < 1e-6
    assert torch.equal(logits(made.model, made.inputs), dense)
    assert made.model.config.to_json_string() == config
    assert {n: (t._version, t.data_ptr()) for n, t in made.model.state_dict().items()} == weights
    verdict("exact", layers=lvlm.anatomy.layers, protected={str(i): why for i, why in lvlm.anatomy.protected.items()})


@every
@pytest.mark.column("surgery")
def test_generation_equals_that_of_the_full_model_that_skips_with_and_without_cache(family):
    lvlm, made = lvlm_of(family)
    plan = plans(lvlm)[3]
    pruned = apply(lvlm, plan)
    words, steps = generate(pruned.model, made.inputs)
    with skipped(lvlm, plan.removed) as reference:
        expected, expected_steps = generate(reference, made.inputs)
    assert torch.equal(words, expected)
    close(steps, expected_steps)
    again, slow_steps = generate(pruned.model, made.inputs, use_cache=False)
    assert torch.equal(words, again)
    close(slow_steps, steps)


def keys_on_disk(folder: Path) -> set[str]:
    return {k for file in folder.glob("*.safetensors") for k in safe_open(file, "pt").keys()}  # noqa: SIM118


@every
@pytest.mark.column("surgery")
def test_round_trips_keep_weights_and_key_layout(family, tmp_path):
    """Names on disk are those of the dense checkpoint, whatever its layout, with the kept layers renumbered."""
    lvlm, made = lvlm_of(family)
    plan = plans(lvlm)[3]
    pruned = apply(lvlm, plan)
    made.model.save_pretrained(tmp_path / "dense")
    pruned.model.save_pretrained(tmp_path / "pruned")
    again, info = type(made.model).from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(info.values()), info
    ours, theirs = pruned.model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    close(logits(again.eval(), made.inputs), logits(pruned.model, made.inputs), 1e-5)
    numbers: dict[str, set[int]] = {}
    for key in (dense := keys_on_disk(tmp_path / "dense")):
        for match in re.finditer(r"\.(\d+)\.", key):
            numbers.setdefault(key[: match.start()], set()).add(int(match[1]))
    (path,) = [p for p, found in numbers.items() if found == set(range(plan.n_layers))]
    expected = set()
    for key in dense:
        if found := re.match(rf"{re.escape(path)}\.(\d+)\.", key):
            if int(found[1]) not in plan.kept:
                continue
            key = f"{path}.{plan.kept.index(int(found[1]))}.{key[found.end() :]}"
        expected.add(key)
    assert keys_on_disk(tmp_path / "pruned") == expected


@every
def test_layers_that_others_depend_on_are_protected(family):
    lvlm, made = lvlm_of(family)
    anatomy = lvlm.anatomy
    assert set(anatomy.protected) == PROTECTED.get(family, set())
    assert anatomy.removable == tuple(i for i in range(anatomy.n_layers) if i not in anatomy.protected)
    free = find_anatomy(made.model, protect="none")
    assert (free.protected, set(free.waived)) == ({}, set(anatomy.protected))
    for layer in anatomy.protected:
        with pytest.raises(SvlError, match=rf"removes layers \[{layer}\], which '{family}' needs: .*protect=none"):
            apply(lvlm, Plan(anatomy.n_layers, (layer,)))


@pytest.mark.parametrize(("family", "layer"), [("qwen3_vl", 0), ("qwen3_vl", 1), ("qwen3_vl_moe", 0), ("gemma4", 4)])
def test_protection_is_there_for_a_reason(family, layer, caplog):
    """Without it, these plans make models that compute something else: the self-check sees it."""
    lvlm, made = lvlm_of(family)
    free = Lvlm(made.model, None, find_anatomy(made.model, protect="none"), family)
    plan = Plan(lvlm.anatomy.n_layers, (layer,))
    pruned = apply(free, plan)
    with skipped(lvlm, plan.removed) as reference:
        expected = logits(reference, made.inputs)
    difference = selfcheck.check_surgery(free, pruned, plan, made.inputs)
    assert difference > 1e-2
    assert difference == pytest.approx(
        float((logits(pruned.model, made.inputs) - expected).abs().max() / expected.abs().max()), rel=1e-3
    )
    assert "against model.protect=auto" in caplog.text
    unaware = Lvlm(made.model, None, find_anatomy(made.model, protect=[]), family)
    object.__setattr__(unaware.anatomy, "waived", ())
    with pytest.raises(SvlError, match=rf"surgery on '{family}' failed its check: without layers \[{layer}\]"):
        selfcheck.check_surgery(unaware, pruned, plan, made.inputs)


def test_plans_that_no_config_can_express_are_refused():
    made = FAMILIES["gemma4"]()
    free = Lvlm(made.model, None, find_anatomy(made.model, protect="none"), "gemma4")
    with pytest.raises(SvlError, match=r"gemma4_text cannot do without layers \[7\]: with 'layer_types'"):
        apply(free, Plan(8, (7,)))
    with pytest.raises(SvlError, match=r"gemma4_text cannot do without layers \[3\]: .*layer types producing a cache"):
        apply(free, Plan(8, (3,)))


# --------------------------------------------------------------------------------------------------- attention


@every
@pytest.mark.column("tis")
@pytest.mark.parametrize("chunk", [64, 5])
def test_attention_statistics_equal_eager_maps(family, chunk, verdict, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", chunk)
    lvlm, made = lvlm_of(family)
    ids = made.inputs["input_ids"]
    visual = ids == made.image_token_id if made.image_token_id is not None else torch.zeros_like(ids).bool()
    modality = torch.stack([visual, ~visual], 1).float()
    plain = logits(made.model, made.inputs)
    cosines: dict[int, Tensor] = {}

    def measure():
        with attention.metering(made.model, modality) as meter, hooks.cosine_hooks(lvlm, cosines):
            measured = logits(made.model, made.inputs)
        meter.check_layers(lvlm.anatomy.n_layers)
        return meter, measured

    if family in MAPLESS:
        with pytest.raises(SvlError, match=re.escape(MAPLESS[family])) as error:
            measure()
        assert "statistics=[cosine]" in str(error.value)
        verdict("refused", note=str(error.value))
        return
    meter, measured = measure()
    close(measured, plain)
    maps: dict[int, Tensor] = {}
    with eager_maps(lvlm, maps) as model:
        close(logits(model, made.inputs), plain)
    assert sorted(maps) == sorted(meter.received) == sorted(cosines) == list(range(lvlm.anatomy.n_layers))
    for i, map_ in maps.items():
        A, m = map_.mean(0), modality[0]
        seen = (map_ > 0).any(0).float()
        assert (A.sum(1) - 1).abs().max() < 1e-4
        torch.testing.assert_close(meter.received[i][0], m @ A, atol=1e-4, rtol=0)
        torch.testing.assert_close(meter.emitted[i][0], (A @ m.T).T, atol=1e-4, rtol=0)
        assert torch.equal(meter.queries[i][0], m @ seen)
        assert torch.equal(meter.keys[i][0], (seen @ m.T).T)
    verdict("exact")


# ------------------------------------------------------------------------------------------------ compensation


@every
@pytest.mark.column("compensation")
def test_updates_multiply_what_a_layer_writes(family, verdict):
    """(I + left right) times the output of every kind of writer: projections, biases, experts either way round."""
    lvlm, made = lvlm_of(family)
    if family in POST_NORM:
        with pytest.raises(SvlError, match="normalises after its projections") as error:
            folding.check_foldable(lvlm)
        verdict("refused", note=str(error.value))
        return
    folding.check_foldable(lvlm)
    d, n = lvlm.anatomy.hidden_size, lvlm.anatomy.n_layers
    change = update(d)
    assert change.left is not None
    assert change.right is not None
    factor, dense, kinds = torch.eye(d) + change.left @ change.right, logits(made.model, made.inputs), []
    assert set(lvlm.anatomy.writers) == {"attn", "mlp"}
    for role, writers in lvlm.anatomy.writers.items():
        for layer, writer in enumerate(writers):
            if layer == n - 1 or writer in writers[:layer]:
                continue  # one layer of every kind
            kinds.append(writer)
            with written_times(lvlm, layer, role, factor) as reference:
                expected = logits(reference, made.inputs)
            changed = apply(lvlm, Plan(n, ()), Patch({(layer, role): change}))
            close(logits(changed.model, made.inputs), expected)
            assert (expected - dense).abs().max() > 1e-3 * dense.abs().max()
            extra = Update(delta=torch.zeros(d, 1))
            if not writer.single:
                with pytest.raises(SvlError, match=f"has a matrix for '{role}' of layer {layer}.*write there together"):
                    apply(lvlm, Plan(n, ()), Patch({(layer, role): extra}))
            if not (writer.single and writer.biases):
                with pytest.raises(SvlError, match=f"shifts the bias of '{role}' of layer {layer}, which has none"):
                    apply(lvlm, Plan(n, ()), Patch({(layer, role): Update(shift=torch.zeros(d))}))
    names = sorted({re.sub(r"(\.weight)?$", "", name) for writer in kinds for name in writer.matrices})
    verdict("exact", writers=names)


def test_all_kinds_of_writers_are_among_the_families():
    found = {
        n for f in SUPPORTED for ws in lvlm_of(f)[0].anatomy.writers.values() for w in ws for n in w.matrices.items()
    }
    assert found >= {
        ("self_attn.o_proj.weight", False), ("self_attn.out_proj.weight", False), ("self_attn.dense.weight", False),
        ("cross_attn.o_proj.weight", False), ("linear_attn.out_proj.weight", False), ("conv.out_proj.weight", False),
        ("mlp.down_proj.weight", False), ("mlp.dense_4h_to_h.weight", False), ("fc2.weight", False),
        ("ffn.fc2.weight", False), ("feed_forward.w2.weight", False), ("feed_forward.down_proj.weight", False),
        ("mlp.experts.down_proj", False), ("mlp.experts.down_proj", True), ("feed_forward.experts.down_proj", True),
        ("mlp.shared_experts.down_proj.weight", False), ("feed_forward.shared_expert.down_proj.weight", False),
    }  # fmt: skip


@pytest.mark.parametrize("flipped", [False, True])
def test_experts_as_wide_inside_as_outside_are_told_apart(flipped):
    """[E, d, d] fits both ways round: the projection that feeds them decides."""
    from helpers.families import LLAMA, config
    from transformers import AutoModelForCausalLM

    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
    family = config("qwen3_moe", **LLAMA, **experts)
    if flipped:
        family = config("llama4_text", **{**LLAMA, "intermediate_size": 32, "num_local_experts": 2})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(family)
    (shape,) = {tuple(p.shape) for n, p in model.named_parameters() if n.endswith("experts.down_proj")}
    assert shape == (2, 32, 32)
    writers = find_anatomy(model).writers["mlp"]
    assert {f for w in writers for n, f in w.matrices.items() if n.endswith("experts.down_proj")} == {flipped}


def test_results_of_the_last_full_run_are_kept_as_json():
    results = json.loads((ROOT / "docs" / "families.json").read_text())
    assert set(results["families"]) == set(FAMILIES)
