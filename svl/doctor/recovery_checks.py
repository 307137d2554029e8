"""What recovery of a configuration would train, and on what."""

from __future__ import annotations

from omegaconf import DictConfig

from svl.config import training_data
from svl.core import Plan
from svl.data.samples import Sample, Samples
from svl.doctor.data_checks import examine_samples, longest_text
from svl.doctor.findings import Section
from svl.doctor.memory import GUESSED_ANSWER, GUESSED_TOKENS, Training
from svl.models.lvlm import Lvlm
from svl.models.sample_inputs import answered_text, encode_samples, encode_texts, explained_samples
from svl.pruning import surgery
from svl.recovery.base import Parts, Recovery, check_answers
from svl.recovery.batches import check_length, samples_to_check
from svl.recovery.contract import checked_parts
from svl.recovery.losses import compared_states
from svl.recovery.student import check_trainable_kind
from svl.text.progress import show_progress


def examine_recovery(
    cfg: DictConfig,
    recovery: Recovery,
    model: Lvlm | None,
    n_remove: int,
    samples: Samples | None,
    section: Section,
) -> Training | None:
    """What is trained of a model whose weights need not be there, and on what; None if that is unknown.

    `samples` are those of the calibration set, which are trained on unless recovery has its own.
    """
    settings = training_data(cfg.recovery)
    if settings.path is None:
        section.note("recovery.data.path is null: it trains on the calibration set")
    else:
        samples = examine_samples(cfg, settings, "recovery.data", section)
    if not n_remove:
        section.note("no layer is removed, so nothing is trained")
        return None
    if samples is not None:
        with section.examined("recovery.data"):
            check_answers(samples)
    found: Training | None = None
    if model is not None and n_remove <= len(model.anatomy.removable):  # else, what is said of the model says why
        with section.examined("recovery"):
            check_trainable_kind(model, recovery)
            found = asked_training(model, recovery, n_remove, samples)
            told = f"{found.tokens} tokens in the longest sample, {found.answer_tokens} in the longest answer"
            section.note(told if samples else f"samples are not here; assumed are {told}")
            if samples:
                _check_samples(model, recovery, n_remove, samples)
            section.ok(f"trains {found.parameters / 1e6:.3g} of {model.parameters() / 1e6:.3g} M parameters")
    return found


def asked_training(lvlm: Lvlm, recovery: Recovery, n_remove: int, samples: Samples | None) -> Training:
    """What recovery trains, on which samples; None: lengths are guessed.

    Which `n_remove` layers go is not known yet. The first that may are taken for them, which compares the most states.

    Raises:
        SvlError: if the model has no such parts.
    """
    plan, pruned, parts = _assumed_parts(lvlm, recovery, n_remove)
    trained = sum(pruned.model.get_parameter(name).numel() for name in parts.tensors)
    for path in parts.adapted:
        trained += recovery.adapter.rank * sum(pruned.model.get_parameter(f"{path}.weight").shape)
    tokens, answer = _lengths(lvlm, samples) if samples else (GUESSED_TOKENS, GUESSED_ANSWER)
    return Training(
        parameters=trained,
        batch=recovery.batch_size,
        tokens=tokens,
        answer_tokens=answer,
        states=len(compared_states(plan)) if recovery.losses.states else 0,
        checkpointing=recovery.gradient_checkpointing,
    )


def _assumed_parts(lvlm: Lvlm, recovery: Recovery, n_remove: int) -> tuple[Plan, Lvlm, Parts]:
    """A plan, what it leaves of the model, without weights, and what is trained of that."""
    plan = Plan(lvlm.anatomy.n_layers, tuple(lvlm.anatomy.removable[:n_remove]))
    pruned = surgery.skeleton(lvlm, plan)
    return plan, pruned, checked_parts(recovery, pruned, plan)


def _check_samples(lvlm: Lvlm, recovery: Recovery, n_remove: int, samples: Samples) -> None:
    """Raise SvlError for what `recover` refuses before its first step."""
    from svl.recovery import training

    _, pruned, parts = _assumed_parts(lvlm, recovery, n_remove)
    training.check_pictures(pruned, parts, samples)
    numbers = samples_to_check(recovery, len(samples))
    for number in show_progress(numbers, "recovery: samples are checked", len(numbers)):
        sample = samples.samples[number]
        with explained_samples([sample]):
            check_length(lvlm, sample, _count_answered(lvlm, sample))


def count_tokens(lvlm: Lvlm, sample: Sample) -> int:
    """Tokens of a sample without its answer, as the processor makes them."""
    inputs, _, _ = encode_samples(lvlm, [sample])
    return int(inputs["input_ids"].shape[1])


def _count_answered(lvlm: Lvlm, sample: Sample) -> int:
    """The same with its answer, and what ends it."""
    return int(encode_texts(lvlm, [answered_text(lvlm, sample)], [sample])["input_ids"].shape[1])


def _lengths(lvlm: Lvlm, samples: Samples) -> tuple[int, int]:
    """Tokens of the longest sample, with its answer, and of the longest answer, which running text is as a whole."""
    longest = longest_text(samples, answered=True)
    tokens = _count_answered(lvlm, longest)
    if longest.plain:
        return tokens, tokens
    last_words = max(samples, key=lambda sample: len(sample.answer or ""))
    return tokens, _count_answered(lvlm, last_words) - count_tokens(lvlm, last_words)
