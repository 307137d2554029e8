"""A model whose decoder layers stay on disk gives what the same model in memory gives."""

from __future__ import annotations

import copy
import json
import shutil
import threading
from dataclasses import replace

import pytest
import torch
from helpers.commands import SMALL, run_svl
from helpers.families import FAMILIES
from safetensors.torch import load_file

import svl
from svl.calibration import offload
from svl.calibration.activations import Activations
from svl.calibration.calibrate import calibrate, select
from svl.checkpoints import skeleton
from svl.checkpoints.skeleton import Skeleton
from svl.compensation.subspace import Subspace
from svl.core import Plan, SvlError
from svl.core.methods import STATISTICS
from svl.models.lvlm import Lvlm, no_progress
from svl.selectors.tis import Tis
from svl.strategies.cosine import Cosine

KINDS = ["llava", "qwen", "llama"]


@pytest.fixture(params=KINDS)
def both(request, checkpoint):
    """The same checkpoint offloaded and in memory."""
    path = checkpoint(request.param)
    return offload.load_offloaded(path, device="cpu"), svl.load(path, device="cpu")


@pytest.fixture
def fills(monkeypatch):
    """Which tensors were read from disk, per reading."""
    read: list[list[str]] = []
    fill = Skeleton.fill

    def counted(self, keys, device="cpu"):
        read.append(list(keys))
        return fill(self, read[-1], device)

    monkeypatch.setattr(Skeleton, "fill", counted)
    return read


def assert_same_traces(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.index == b.index
        for name in ("visual", "cosine", "windows", "received", "emitted", "queries", "keys"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x.float(), y.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_statistics_are_those_of_the_model_in_memory(size, both, samples):
    ours, theirs = (calibrate(m, samples, statistics=STATISTICS, batch_size=size).traces for m in both)
    assert_same_traces(ours, theirs)


def test_traces_in_files_and_compensation(both, samples, tmp_path):
    results = []
    for number, lvlm in enumerate(both):
        (tmp_path / str(number)).mkdir()
        stats = calibrate(lvlm, samples, batch_size=2, folder=tmp_path / str(number))
        stats = select(stats, Tis(p=0.5))
        plan = Cosine().plan(stats, 1)
        hidden = Activations(lvlm, samples, stats, 2)
        results.append((plan, Subspace(rank=2).fit(hidden, plan), list(stats.traces)))
    (plan, patch, traces), (plan_, patch_, traces_) = results
    assert plan.removed == plan_.removed
    assert_same_traces(traces, traces_)
    assert patch.updates.keys() == patch_.updates.keys() != set()
    for key, update in patch.updates.items():
        left, right = patch_.updates[key].left, patch_.updates[key].right
        torch.testing.assert_close(update.left @ update.right, left @ right, atol=1e-5, rtol=0)


def test_what_writers_read_and_write(both, samples):
    wanted = [(1, "mlp"), (2, "attn")]
    streams = []
    for lvlm in both:
        hidden = Activations(lvlm, samples, calibrate(lvlm, samples), 2)
        streams.append(list(hidden.stream([0, 2], wanted)))
    for a, b in zip(*streams, strict=True):
        for i in (0, 2):
            torch.testing.assert_close(a.h(i), b.h(i), atol=1e-5, rtol=0)
        for layer, writer in wanted:
            torch.testing.assert_close(a.read(layer, writer), b.read(layer, writer), atol=1e-5, rtol=0)
            torch.testing.assert_close(a.wrote(layer, writer), b.wrote(layer, writer), atol=1e-5, rtol=0)


def test_every_layer_is_read_once_and_freed(checkpoint, samples, fills):
    lvlm = offload.load_offloaded(checkpoint("llava"), device="cpu")
    (rest,) = fills
    assert not any(".layers." in key and "language_model" in key for key in rest)
    calibrate(lvlm, samples, batch_size=1)
    layers = fills[1:]
    assert [{key.split("layers.")[1][0] for key in keys} for keys in layers] == [{"0"}, {"1"}, {"2"}, {"3"}]
    read = [key for keys in fills for key in keys]
    assert len(read) == len(set(read)) == len(lvlm.skeleton.stored)
    assert all(p.is_meta for p in lvlm.layers.parameters())
    fills.clear()
    list(Activations(lvlm, samples, calibrate(lvlm, samples, statistics=["cosine"]), 2).stream([1]))
    assert len(fills) == 4 + 2  # up to the deepest state asked for (and the layer that it enters)
    assert not [t for t in threading.enumerate() if t.name.startswith("svl")]


def test_dtypes_are_converted_layer_by_layer(checkpoint, samples):
    ours, theirs = (
        load(checkpoint("llava"), device="cpu", dtype="bfloat16") for load in (offload.load_offloaded, svl.load)
    )
    a, b = (calibrate(m, samples, batch_size=2).traces for m in (ours, theirs))
    assert_same_traces(a, b)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failing_pass_ends_all(error, checkpoint, fills):
    lvlm = offload.load_offloaded(checkpoint("llama"), device="cpu")
    calls = []

    def work(model: Lvlm, batch: int) -> None:
        def fail(*_):
            calls.append(batch)
            if len(calls) == 2:
                raise error

        with torch.inference_mode():
            model.layers[1].register_forward_hook(fail)
            model.model(input_ids=torch.tensor([[batch + 5, 6, 7]]))

    with pytest.raises(error):
        list(lvlm.map(work, range(5), no_progress))
    assert calls == [0, 1]
    assert not [t for t in threading.enumerate() if t.name.startswith("svl")]
    assert all(p.is_meta for p in lvlm.layers.parameters())
    assert list(lvlm.map(lambda model, batch: batch, range(5), no_progress)) == [*range(5)]  # it can be used again


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, tmp_path):
    """Logits and all hidden states of two different samples, against the model in memory."""
    family = FAMILIES[name]()
    family.model.save_pretrained(tmp_path)
    try:
        bones = skeleton.read_skeleton(tmp_path, image_token=family.image_token_id)
    except SvlError:
        pytest.skip("layers of this family cannot be taken apart")
    lvlm = Lvlm(family.model, None, bones.anatomy, name)
    other = {**family.inputs, "input_ids": family.inputs["input_ids"].clone()}
    other["input_ids"][0, -3:] = torch.tensor([7, 8, 9])

    def work(which: Lvlm, inputs) -> list[torch.Tensor]:
        states = []
        for layer in which.layers:
            layer.register_forward_hook(lambda _, args, out: states.append(out[0] if isinstance(out, tuple) else out))
        with torch.inference_mode():
            logits = which.model(**inputs, use_cache=False).logits
        return [*states, logits]

    expected = [work(replace(lvlm, model=copy.deepcopy(lvlm.model)), inputs) for inputs in (family.inputs, other)]
    opened = offload.assemble_offloaded(bones, None, name, "cpu")
    for a, b in zip(opened.map(work, [family.inputs, other], no_progress), expected, strict=True):
        assert len(a) == len(b) == bones.anatomy.n_layers + 1
        for x, y in zip(a, b, strict=True):
            largest = float(y.abs().nan_to_num(posinf=0).max())  # sums are rounded as parts of the tensor are large
            torch.testing.assert_close(x, y, atol=4e-6 * largest, rtol=0, equal_nan=True)


def test_a_run_with_offload_gives_the_same_plan_and_export(tmp_path):
    """The whole method, as a user runs it; and what needs the model in memory says so at once."""
    common = ("strategy=short_lvlm", "tracker=none", *SMALL)
    plans = []
    for offloaded in ("true", "false"):
        where = [f"paths.store=store-{offloaded}", f"paths.outputs=out-{offloaded}", f"export.path=pruned-{offloaded}"]
        done = run_svl(*common, "benchmark=none", f"model.offload={offloaded}", *where, cwd=tmp_path)
        assert ("layers, which stay on disk" in done.stdout) == (offloaded == "true")
        (file,) = (tmp_path / f"out-{offloaded}").rglob("plan.json")
        plans.append(json.loads(file.read_text()))
    assert plans[0]["removed"] == plans[1]["removed"]
    assert plans[0]["importance"] == pytest.approx(plans[1]["importance"], abs=1e-5)
    ours, theirs = (load_file(tmp_path / f"pruned-{x}" / "model.safetensors") for x in ("true", "false"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-5)
    where = ["paths.store=store", "paths.outputs=out"]
    refused = run_svl(*common, "benchmark=demo", "model.offload=true", *where, cwd=tmp_path, code=1)
    assert refused.stderr.splitlines()[-1].startswith("error: model.offload leaves the model on disk, but benchmarks")


def test_layers_that_the_config_does_not_count_are_refused(checkpoint, tmp_path):
    """They would be left out without a word; svl.load refuses them, too."""
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(SvlError, match="beyond the last decoder layer"):
        offload.load_offloaded(folder, device="cpu")


def test_heads_are_tied_as_they_are_stored(checkpoint, tmp_path):
    """A head stored apart stays apart, whatever the config says."""
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    ours, theirs = offload.load_offloaded(folder, device="cpu"), svl.load(folder, device="cpu")
    head, embeddings = ours.model.get_output_embeddings().weight, ours.model.get_input_embeddings().weight
    assert torch.equal(head, theirs.model.get_output_embeddings().weight)
    assert not torch.equal(head, embeddings)


def test_what_needs_the_whole_model_says_so(checkpoint, samples):
    lvlm = offload.load_offloaded(checkpoint("llama"), device="cpu")
    hidden = Activations(lvlm, samples, calibrate(lvlm, samples), 2)
    with pytest.raises(SvlError, match="needs all of 'llama' in memory"):
        list(hidden.stream([1], plan=Plan(4, (0,))))
    with pytest.raises(SvlError, match="needs all of 'llama' in memory"):
        list(hidden.walk(Plan(4, (1,))))
