"""What must hold on an accelerator, too; the same on a CPU is tested elsewhere. Needs no package beyond transformers.

pytest -m gpu tests/gpu
"""

from __future__ import annotations

import io
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import svl
from svl.calibration.hooks import fused_kernels
from svl.calibration.removal_probe import ModelProbe
from svl.compensation.linear_cosine import LinearCosine
from svl.compensation.regression import Regression
from svl.core import Patch
from svl.data.samples import Sample, Samples
from svl.evaluation.efficiency import measure_efficiency
from svl.evaluation.settings import EfficiencySettings
from svl.models.sample_inputs import encode_samples
from svl.selectors.tis import Tis
from svl.strategies.angular import Angular
from svl.strategies.cosine import Cosine
from svl.visual_tokens.fastv import Fastv

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from random_llava import WORDS, Shape, random_llava

pytestmark = pytest.mark.gpu

SHAPE = Shape("tiny", 128, 344, 8, 4, (), 56, 64, 2, 1100)
PLAN = svl.Plan(8, (3, 4))


@pytest.fixture(scope="module")
def device():
    if not torch.accelerator.is_available():
        pytest.skip("there is no accelerator")
    return torch.accelerator.current_accelerator()


@pytest.fixture(scope="module")
def on_cpu():
    """A model whose layers differ, in fp32 on the CPU."""
    lvlm = random_llava(SHAPE, torch.device("cpu"))
    lvlm.model.float()
    generator = torch.Generator().manual_seed(1)
    for i, layer in enumerate(lvlm.layers):
        for p in layer.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.04 + 0.02 * (i % 3), generator=generator)
    return lvlm


@pytest.fixture(scope="module")
def checkpoint(on_cpu, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "dense"
    on_cpu.model.save_pretrained(folder)
    on_cpu.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lvlm(checkpoint, device):
    """The same on the accelerator."""
    return svl.load(checkpoint, device=str(device))


@pytest.fixture(scope="module")
def half(checkpoint, device):
    """And in half precision."""
    return svl.load(checkpoint, device=str(device), dtype="bfloat16", name="half")


@pytest.fixture(scope="module")
def data():
    """Samples of unequal length, one of them without a picture."""
    noise, words, samples = np.random.default_rng(0), random.Random(0), []
    for row in range(12):
        png = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (56, 56, 3), np.uint8)).save(png, "png")
        text = " ".join(words.choices(WORDS, k=8 + row))
        samples.append(Sample(row, text, () if row == 5 else (png.getvalue(),), words.choice(WORDS)))
    return Samples("noise", tuple(samples))


@pytest.fixture(scope="module")
def hidden(lvlm, data):
    return svl.Activations(lvlm, data, svl.calibrate(lvlm, data, batch_size=4), 4)


def answers(lvlm, samples, new_tokens=8):
    inputs, *_ = encode_samples(lvlm, samples)
    with torch.inference_mode():
        return lvlm.model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)


def test_what_is_loaded_lies_on_the_device(lvlm, device):
    assert {p.device.type for p in lvlm.model.parameters()} == {device.type}
    assert lvlm.device.type == device.type


def test_statistics_are_those_of_the_cpu(lvlm, on_cpu, data):
    for here, there in zip(*(svl.calibrate(m, data, batch_size=4).traces for m in (lvlm, on_cpu)), strict=True):
        assert torch.equal(here.visual, there.visual)
        for name in ("cosine", "windows", "received", "emitted", "queries", "keys"):
            torch.testing.assert_close(getattr(here, name), getattr(there, name), atol=1e-4, rtol=1e-3)


def test_statistics_do_not_depend_on_the_batch(half, data):
    for here, alone in zip(*(svl.calibrate(half, data, batch_size=n).traces for n in (6, 1)), strict=True):
        torch.testing.assert_close(here.cosine, alone.cosine, atol=2e-2, rtol=0)
        torch.testing.assert_close(here.received, alone.received, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("strategy", [Cosine(), Angular()])
def test_plans_are_those_of_the_cpu(strategy, lvlm, on_cpu, data):
    plans = [strategy.plan(svl.select(svl.calibrate(m, data), Tis()), 3).removed for m in (lvlm, on_cpu)]
    assert plans[0] == plans[1]


def test_calibration_has_its_kernels(device):
    pytest.importorskip("triton")
    if device.type != "cuda":
        pytest.skip("kernels are for CUDA")
    assert fused_kernels(device) is not None


def test_measured_attention_computes_what_sdpa_computes(half, data):
    """Within the rounding of half precision."""
    from svl.calibration.attention import metering

    inputs, present, visual = encode_samples(half, data.samples[:4])
    with torch.inference_mode():
        plain = half.model(**inputs).logits[present]
        with metering(half.model, torch.stack([visual & present, ~visual & present], 1).float()):
            metered = half.model(**inputs).logits[present]
    assert float((plain - metered).float().abs().max()) <= 0.05 * float(plain.float().abs().max())


def test_a_pruned_model_skips_its_layers_bit_for_bit(half, data):
    inputs, *_ = encode_samples(half, data.samples[:3])
    pruned = svl.apply(half, PLAN)
    handles = [
        half.layers[i].register_forward_hook(
            lambda _, args, kwargs, out: args[0] if args else kwargs["hidden_states"], with_kwargs=True
        )
        for i in PLAN.removed
    ]
    with torch.inference_mode():
        skipped = half.model(**inputs, use_cache=False).logits
        for handle in handles:
            handle.remove()
        assert torch.equal(pruned.model(**inputs, use_cache=False).logits, skipped)


def test_a_pruned_model_takes_no_memory_of_its_own(half):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    pruned = svl.apply(half, PLAN)
    assert torch.cuda.memory_allocated() - before <= 2**20
    assert len(pruned.layers) == 6


@pytest.mark.parametrize("name", ["Subspace", "Linear", "Refit"])
def test_patches_are_those_of_the_cpu(name, hidden, on_cpu, data):
    compensation = getattr(svl, name)()
    there = svl.Activations(on_cpu, data, svl.calibrate(on_cpu, data, batch_size=4), 4)
    found, expected = compensation.fit(hidden, PLAN), compensation.fit(there, PLAN)
    models = [svl.apply(on_cpu, PLAN, patch) for patch in (found, expected)]
    inputs, *_ = encode_samples(on_cpu, data.samples[:4])
    with torch.inference_mode():
        logits = [model.model(**inputs).logits for model in models]
    torch.testing.assert_close(*logits, atol=2e-2, rtol=1e-2)


def test_a_cosine_fit_runs_on_the_device_and_gives_a_patch_of_the_cpu(hidden):
    patch = LinearCosine(epochs=1).fit(hidden, PLAN)
    assert {update.left.device.type for update in patch.updates.values()} == {"cpu"}


def test_least_squares_take_the_memory_that_they_say(device):
    n, d = 3000, 1000
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    regression = Regression()
    for seed in range(3):
        x = torch.randn(500, n, device=device, generator=torch.Generator(device).manual_seed(seed))
        regression.add(x, x[:, :d], torch.ones(500))
    regression.solve(0.1)
    said = 8 * (n * (n + d) + 2 * n * n)
    assert torch.cuda.max_memory_allocated() - before <= 1.3 * said


def test_an_export_computes_what_was_scored(half, checkpoint, hidden, data, tmp_path):
    patch = svl.Refit(layers="gaps").fit(hidden, PLAN)
    svl.save(checkpoint, PLAN, tmp_path / "pruned", patch)
    again = svl.load(tmp_path / "pruned", device=str(half.device), dtype="float32", name="again")
    scored = svl.apply(hidden.lvlm, PLAN, patch)
    inputs, *_ = encode_samples(scored, data.samples[:3])
    with torch.inference_mode():
        difference = (again.model(**inputs).logits - scored.model(**inputs).logits).abs().max()
    assert float(difference) <= 1e-4  # weights of which a CPU folded one copy, and a device the other


def test_removals_tried_out_are_those_of_the_model_without_the_layer(lvlm, data):
    small = Samples("some", data.samples[:3])
    base, losses = ModelProbe(lvlm, small).losses((), (2, 3))
    alone, _ = ModelProbe(svl.apply(lvlm, svl.Plan(8, (3,))), small).losses((), (2,))
    assert losses[3] == pytest.approx(alone, rel=1e-4)
    assert base != pytest.approx(alone, rel=1e-4)


def test_gradients_are_those_of_the_cpu(lvlm, on_cpu, data):
    small = Samples("some", data.samples[:3])
    here, there = (ModelProbe(m, small).taylor() for m in (lvlm, on_cpu))
    assert here == pytest.approx(there, rel=1e-3)


def test_fastv_keeping_all_tokens_changes_no_answer(lvlm, data):
    samples = data.samples[:4]
    assert torch.equal(answers(Fastv(keep=1.0).apply(lvlm), samples), answers(lvlm, samples))
    assert answers(Fastv(keep=0.25).apply(lvlm), samples).shape == answers(lvlm, samples).shape


def test_lock_step_gives_the_answers_of_separate_runs(lvlm, data):
    from svl.evaluation.lock_step import LockStep

    plans = [svl.Plan(8, removed) for removed in ((), (3,), (3, 4), (0, 6), (1, 5))]
    models = [svl.apply(lvlm, plan) for plan in plans]
    inputs, *_ = encode_samples(lvlm, [s for s in data.samples[:5] if s.images])
    settings = lvlm.model.generation_config.__class__(
        do_sample=False, max_new_tokens=12, min_new_tokens=12, pad_token_id=0
    )
    with torch.inference_mode():
        together = LockStep(lvlm, models, plans).generate(inputs, settings)
        for model, found in zip(models, together, strict=True):
            assert torch.equal(found, model.model.generate(**inputs, generation_config=settings))


def test_int8_takes_less_memory_and_answers(half, data):
    pytest.importorskip("torchao")
    from svl.evaluation.efficiency import model_size
    from svl.quantization.torchao import Torchao

    small = Torchao().apply(half)
    assert model_size(small)["bytes"] < model_size(half)["bytes"]
    assert answers(small, data.samples[:2]).shape == answers(half, data.samples[:2]).shape


def test_speed_is_measured_with_the_memory_of_the_device(half, data):
    settings = EfficiencySettings(2, 6, warmup=1, repeats=2)
    found = measure_efficiency(half, svl.apply(half, PLAN), data.samples[0], settings)
    assert found["device"]["name"] == torch.cuda.get_device_name()
    assert found["dense"]["peak_bytes"] > 0
    assert found["dense"]["prefill_flops"] > found["pruned"]["prefill_flops"]


def test_a_patch_may_come_from_either_device(lvlm, hidden, data):
    patch = svl.Linear().fit(hidden, PLAN)
    moved = Patch({key: replace(u, left=u.left.to(lvlm.device)) for key, u in patch.updates.items()})
    inputs, *_ = encode_samples(lvlm, data.samples[:2])
    with torch.inference_mode():
        logits = [svl.apply(lvlm, PLAN, p).model(**inputs).logits for p in (patch, moved)]
    assert torch.equal(*logits)
