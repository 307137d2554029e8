"""What the doctor says a stage needs, held against what it takes, counted tensor by tensor."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from helpers.paths import ROOT
from helpers.tensor_memory import tensor_memory
from PIL import Image

import svl
from svl.calibration.removal_probe import ModelProbe
from svl.compensation.refit import Refit
from svl.data.samples import Sample, Samples
from svl.doctor.memory import Load, Training, stage_needs
from svl.doctor.model_checks import model_shape
from svl.doctor.recovery_checks import asked_training
from svl.recovery.distill import Distill
from svl.recovery.interlace import Interlace
from svl.recovery.lora import Lora
from svl.recovery.projector import Projector
from svl.recovery.student import Student
from svl.recovery.training import recover

sys.path.append(str(ROOT / "scripts"))
from random_llava import Shape, random_llava

SHAPE = Shape("wide enough that matrices count", 256, 704, 8, 8, (), 112, 64, 2, 2000)
PLAN = svl.Plan(8, (3, 4))


@pytest.fixture(scope="module")
def lvlm():
    lvlm = random_llava(SHAPE, torch.device("cpu"))
    lvlm.model.float()
    return lvlm


@pytest.fixture(scope="module")
def data():
    noise = np.random.default_rng(0)
    samples = []
    for row in range(16):
        png = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (112, 112, 3), np.uint8)).save(png, "png")
        samples.append(Sample(row, " ".join(f"w{i}" for i in range(row, row + 126)), (png.getvalue(),), "w1"))
    return Samples("noise", tuple(samples))


def calibrate(*statistics):
    def work(lvlm, data):
        return svl.calibrate(lvlm, data, statistics=statistics, batch_size=4)

    return work


def refit(lvlm, data):
    stats = svl.Stats(8, lvlm.anatomy.removable, ())  # none is read: every token counts alike
    Refit().fit(svl.Activations(lvlm, data, stats, 4), PLAN)


@torch.inference_mode()
def evaluate(lvlm, data):
    batch = data.samples[:4]
    inputs = lvlm.encode([lvlm.prompt(s.prompt, 1) for s in batch], [s.pictures for s in batch])
    lvlm.model.generate(**inputs, max_new_tokens=32, min_new_tokens=32, do_sample=False)


def greedy_step(lvlm, data):
    ModelProbe(lvlm, data).losses((), range(1, 8))


def gradients(lvlm, data):
    ModelProbe(lvlm, data).taylor()


@pytest.mark.parametrize(
    ("work", "stages", "windows"),
    [
        (calibrate("cosine"), ["calibrate"], False),
        (calibrate("cosine", "attention"), ["calibrate"], False),
        (calibrate("cosine", "windows", "attention"), ["calibrate"], True),
        (refit, ["compensate, by least squares", "keep the patch of a refit"], False),
        (evaluate, ["evaluate"], False),
        (greedy_step, ["plan, by trying removals out"], False),
        (gradients, ["plan, by gradients"], False),
    ],
)
def test_a_stage_takes_what_the_formula_says(work, stages, windows, lvlm, data):
    """Up to three tenths more, which are temporary results of single operations; and not so little that it misleads."""
    shape = model_shape(lvlm, torch.float32)
    tokens = lvlm.encode([lvlm.prompt(data.samples[0].prompt, 1)], [data.samples[0].pictures])["input_ids"].shape[1]
    needs = {need.stage: need for need in stage_needs(shape, Load(16, tokens, 4, 4, 32, windows, True, True), 2)}
    said = sum(needs[stage].bytes for stage in stages) - shape.weights
    with tensor_memory() as peak:
        work(lvlm, data)
    assert 0.7 * said <= peak.most <= 1.3 * said


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("method", "compared"), [(Lora, 0), (Distill, 4)])
def test_recovery_takes_what_the_formula_says(method, compared, checkpointing, lvlm, data, tmp_path):
    """The second step has all at once: activations, gradients, and moments of the first."""
    pytest.importorskip("peft")
    recovery = method(steps=2, batch_size=4, gradient_checkpointing=checkpointing)
    with tensor_memory() as peak:
        trained = recover(lvlm, PLAN, None, data, recovery, tmp_path)
    tokens = trained.spent.tokens // trained.spent.samples
    training = Training(trained.parameters, 4, tokens, 2, compared, checkpointing)
    shape = model_shape(lvlm, torch.float32)
    needs = stage_needs(shape, Load(16, tokens, 4, 4, 32, False), 2, training)
    said = next(need.bytes for need in needs if need.stage == "recover") - shape.weights
    assert 0.7 * said <= peak.most <= 1.3 * said


@pytest.mark.parametrize(("method", "states"), [(Projector, 0), (Lora, 0), (Distill, 7), (Interlace, 0)])
def test_the_doctor_counts_what_training_trains(method, states, lvlm):
    """With the first two layers removed: states before the other six, and at the end."""
    pytest.importorskip("peft")
    training = asked_training(lvlm, method(), 2, None)
    assert training.parameters == Student(lvlm, svl.Plan(8, (0, 1)), None, method()).trained_parameters
    assert training.states == states


def test_windows_are_the_only_reason_to_hold_all_states(lvlm):
    shape = model_shape(lvlm, torch.float32)
    calibrate = [
        next(n.bytes for n in stage_needs(shape, Load(16, 4096, 8, 4, 32, windows), 2) if n.stage == "calibrate")
        for windows in (False, True)
    ]
    states = 9 * 8 * 4096 * 256 * 4
    assert calibrate[1] - calibrate[0] > states
