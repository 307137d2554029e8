"""What recovery of a configuration would train, and on what."""

from __future__ import annotations

from omegaconf import DictConfig

from svl.calibration.encoding import encode_samples
from svl.config import training_data
from svl.core import Plan
from svl.data.samples import Sample, Samples
from svl.doctor.data_checks import examine_samples, longest_text
from svl.doctor.findings import Section
from svl.doctor.memory import GUESSED_ANSWER, GUESSED_TOKENS, Training
from svl.models.lvlm import Lvlm
from svl.recovery.base import Recovery
from svl.recovery.batches import check_answers
from svl.recovery.losses import compared_states


def examine_training_data(cfg: DictConfig, calibration: Samples | None, section: Section) -> Samples | None:
    """What recovery trains on, if it is here: samples of its own, or those of the calibration set; all need answers."""
    settings, samples = training_data(cfg.recovery), calibration
    if settings.path is None:
        section.note("recovery.data.path is null: it trains on the calibration set")
    else:
        samples = examine_samples(cfg, settings, "recovery.data", section)
    with section.examined("recovery.data"):
        if samples is not None:
            check_answers(samples)
    return samples


def examine_training(
    lvlm: Lvlm, recovery: Recovery, n_remove: int, samples: Samples | None, section: Section
) -> Training | None:
    """What is trained of a model whose weights need not be there; None if nothing is, or it cannot be."""
    found: Training | None = None
    if not n_remove:
        section.note("no layer is removed, so nothing is trained")
    if not 0 < n_remove <= len(lvlm.anatomy.removable):  # too many: what is said of the model says so
        return None
    with section.examined("recovery"):
        found = asked_training(lvlm, recovery, n_remove, longest_text(samples))
        section.ok(f"trains {found.parameters / 1e6:.3g} of {lvlm.parameters() / 1e6:.3g} M parameters")
    return found


def asked_training(lvlm: Lvlm, recovery: Recovery, n_remove: int, longest: Sample | None) -> Training:
    """What recovery trains, in batches of samples like `longest`; None: lengths are guessed.

    Which `n_remove` layers go is not known yet. The first that may are taken for them, which compares the most states.

    Raises:
        SvlError: if the model has no such parts.
    """
    plan = Plan(lvlm.anatomy.n_layers, tuple(lvlm.anatomy.removable[:n_remove]))
    parts = recovery.parts(lvlm, plan)
    trained = sum(lvlm.model.get_parameter(name).numel() for name in parts.tensors)
    for path in parts.adapted:
        trained += recovery.adapter.rank * sum(lvlm.model.get_parameter(f"{path}.weight").shape)
    tokens = GUESSED_TOKENS if longest is None else count_tokens(lvlm, longest)
    return Training(
        parameters=trained,
        batch=recovery.batch_size,
        tokens=tokens,
        answer_tokens=_count_answer(lvlm, longest, tokens),
        states=len(compared_states(plan)) if recovery.losses.states else 0,
        checkpointing=recovery.gradient_checkpointing,
    )


def count_tokens(lvlm: Lvlm, sample: Sample) -> int:
    """Tokens of a sample without its answer, as the processor makes them."""
    inputs, _, _ = encode_samples(lvlm, [sample])
    return int(inputs["input_ids"].shape[1])


def _count_answer(lvlm: Lvlm, sample: Sample | None, tokens: int) -> int:
    """Tokens of a sample that count in the loss: of its answer, or, in running text, all of its `tokens`."""
    if sample is not None and sample.plain:
        return tokens
    return GUESSED_ANSWER if sample is None or not sample.answer else len(lvlm.tokenizer(sample.answer).input_ids)
