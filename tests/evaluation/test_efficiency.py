"""Costs: counts against sums by hand, ratios against planted times, the stage as users run it."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from helpers.commands import SMALL, manifests, run_svl

from svl.core import Plan, SvlError
from svl.data.samples import Sample
from svl.evaluation import efficiency
from svl.evaluation.settings import EfficiencySettings
from svl.pruning import surgery

PROMPT = "what is red"


def measured(dense, pruned, **options):
    settings = {"new_tokens": 3, "warmup": 0, "repeats": 1, "batch_size": 2}
    chosen = EfficiencySettings(**{**settings, **options})
    return efficiency.measure_efficiency(dense, pruned, Sample(0, PROMPT), chosen)


def test_counts_are_those_by_hand(llama):
    pruned = surgery.apply(llama, Plan(4, (1,)))
    found = measured(llama, pruned)
    b, t = 2, found["sequence"]
    for name, model in (("dense", llama), ("pruned", pruned)):
        layers = len(model.layers)
        weights = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2) + model.model.lm_head.weight.numel()
        linear = 2 * b * t * weights
        attention = 2 * 2 * b * layers * t * t * 32  # scores and their sum, 4 heads of 8
        counts = found[name]
        assert counts["prefill_flops"] == linear + attention
        assert counts["cache_bytes"] == layers * 2 * b * 2 * t * 8 * 4  # 2 key-value heads of 8, fp32
        assert counts["layers"] == layers
        assert counts["parameters"] == sum(p.numel() for p in model.model.parameters())
        assert counts["bytes"] == 4 * counts["parameters"]
    assert found["ideal"] == 4 / 3
    assert (found["batch_size"], found["new_tokens"], found["device"]["type"]) == (2, 3, "cpu")


def test_bytes_of_quantised_weights_are_what_is_stored(llama):
    pytest.importorskip("torchao")
    from svl.quantization import torchao as module

    dense, quantised = (efficiency.model_size(m) for m in (llama, module.Torchao().apply(llama)))
    matrices = [p for p in llama.layers.parameters() if p.ndim == 2]
    saved = sum(3 * p.numel() - 4 * len(p) for p in matrices)  # four bytes become one, and a scale per row is added
    assert dense["bytes"] - quantised["bytes"] == pytest.approx(saved, rel=0.05)
    assert quantised["parameters"] == dense["parameters"]


def test_answers_have_exactly_so_many_tokens(vlm, samples):
    passes = []
    handle = vlm.model.register_forward_hook(lambda *_: passes.append(1))
    pictured = samples.samples[0]
    settings = EfficiencySettings(new_tokens=5, warmup=1, repeats=2)
    found = efficiency.measure_efficiency(vlm, vlm, pictured, settings)
    handle.remove()
    assert len(passes) == 2 * (3 * 5 + 1)  # of each: three rounds, and one pass that counts operations
    parts = found["dense"]["seconds"]
    assert set(parts) == {*efficiency.PARTS, "total"}
    assert all(seconds > 0 for seconds in parts.values())


def test_models_alternate_and_ratios_are_of_neighbours(llama, monkeypatch):
    pruned = surgery.apply(llama, Plan(4, (2,)))
    asked = []
    times = {"dense": iter([99.0, 2.0, 30.0, 8.0, 10.0, 6.0]), "pruned": iter([1.0, 1.0, 10.0, 2.0, 10.0, 1.0])}

    def answer(lvlm, *_):
        name = "dense" if lvlm is llama else "pruned"
        asked.append(name)
        return dict.fromkeys((*efficiency.PARTS, "total"), next(times[name]))

    monkeypatch.setattr(efficiency, "answer_parts", answer)
    found = measured(llama, pruned, warmup=1, repeats=5)
    assert all({asked[i], asked[i + 1]} == {"dense", "pruned"} for i in range(0, 12, 2))
    assert len({asked[i] for i in range(0, 12, 2)}) == 2  # neither is always the first
    assert found["speedup"]["prefill"] == {"value": 3.0, "low": 2.0, "high": 4.0}  # of 2, 3, 4, 1, 6
    assert found["dense"]["seconds"]["decode"] == 8.0
    assert found["dense"]["quartiles"]["decode"] == [6.0, 10.0]  # of 2, 30, 8, 10, 6
    assert found["dense"]["samples_per_second"] == 0.25  # 2 in 8 seconds
    assert found["dense"]["decode_tokens_per_second"] == 0.5  # 2 answers, each of 2 tokens after the first


def test_generation_that_avoids_the_layers_is_refused(llama, monkeypatch):
    monkeypatch.setattr(llama.model, "generate", lambda **_: None)
    with pytest.raises(SvlError, match="generates without passing its decoder layers"):
        measured(llama, llama)


def test_running_out_of_memory_says_what_to_turn_down(llama, monkeypatch):
    def fail(**_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes")

    monkeypatch.setattr(llama.model, "generate", fail)
    with pytest.raises(SvlError, match=r"measuring speed ran out of memory.*: lower efficiency\.batch_size \(now 2\)"):
        measured(llama, llama)


def test_the_stage_measures_once_and_tells_devices_apart(tmp_path):
    command = ("strategy=tail", "n_remove=4", "benchmark=none", "tracker=none", "paths.store=store",
               "paths.outputs=out", "efficiency=default", "efficiency.repeats=2", "efficiency.new_tokens=3",
               *SMALL)  # fmt: skip
    printed = run_svl(*command, cwd=tmp_path).stdout
    assert "(ideal x1.33)" in printed
    (file,) = tmp_path.rglob("result.json")
    result = json.loads(file.read_text())
    assert result["efficiency"]["pruned"]["layers"] == 12
    assert result["efficiency"]["dense"]["prefill_flops"] > result["efficiency"]["pruned"]["prefill_flops"]
    assert result["seconds"]["measure"] > 0
    before = manifests(tmp_path / "store")
    assert re.search(r"stored .*measure: ", run_svl(*command, cwd=tmp_path).stdout)
    assert manifests(tmp_path / "store") == before
    run_svl(*command, "efficiency.batch_size=2", cwd=tmp_path)
    assert len(list((tmp_path / "store" / "efficiency").iterdir())) == 2


def test_nothing_is_measured_of_the_dense_model_alone(tmp_path):
    run_svl("strategy=identity", "benchmark=none", "tracker=none", "paths.store=store", "efficiency=default",
        "paths.outputs=out", *SMALL, cwd=tmp_path)  # fmt: skip
    assert not (tmp_path / "store" / "efficiency").exists()


def test_clocks_are_not_read_at_every_token(llama, monkeypatch):
    """A device would be waited for each time."""
    readings = []
    monkeypatch.setattr(
        efficiency, "time", SimpleNamespace(perf_counter=lambda: readings.append(1) or float(len(readings)))
    )
    asked = efficiency.Asked(PROMPT, Sample(0, PROMPT), 1)
    numbers = []
    for new_tokens in (2, 9):
        readings.clear()
        efficiency.answer_parts(llama, asked, new_tokens)
        numbers.append(len(readings))
    assert numbers == [5, 5]
