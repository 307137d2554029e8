"""The losses of recovery: answers, and what the dense model computes where the pruned one should compute the same."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from svl.calibration.hooks import state_hooks
from svl.core import Plan, SvlError
from svl.models.lvlm import Lvlm
from svl.models.positions import looked_up_positions
from svl.recovery.base import Losses


def compared_states(plan: Plan) -> dict[int, int]:
    """Points of the dense model (h_i enters layer i, h_L leaves the last) -> the same of the pruned one.

    Those that enter kept layers behind the first removal, and the last.
    """
    first = min([*plan.removed, *(layer for layer, _ in plan.sublayers)], default=plan.n_layers)
    points = {i: new for new, i in enumerate(plan.kept) if i > first}
    return {**points, plan.n_layers: len(plan.kept)}


def forward_pass(lvlm: Lvlm, inputs: Mapping[str, Tensor], answer: Tensor, points: list[int]) -> tuple[Tensor, dict]:
    """Logits [n, V] that predict the answer tokens, row by row, and the states [B, T, d] at `points`.

    `answer` [B, T]; a row's first token is predicted by nothing, and does not count. Of models that can be told so,
    only the logits from the earliest answer of the batch on are computed.
    """
    states: dict[int, Tensor] = {}
    length = answer.shape[1]
    keep = min(length, int((length - answer.long().argmax(1)).max()) + 1)
    takes_number = "logits_to_keep" in inspect.signature(lvlm.model.forward).parameters
    few = {"logits_to_keep": keep} if takes_number else {}
    with state_hooks(lvlm, points, states):
        output = lvlm.model(**inputs, **looked_up_positions(lvlm, inputs), use_cache=False, **few)
    logits = output.logits[:, -keep:]
    predicted = answer[:, -keep:][:, 1:].to(logits.device)
    return logits[:, :-1][predicted].float(), {i: states[i] for i in points}  # copied: hooks may run again


def answer_targets(inputs: Mapping[str, Tensor], answer: Tensor) -> Tensor:
    """The tokens [n] that `forward_pass` predicts."""
    return inputs["input_ids"][:, 1:][answer[:, 1:].to(inputs["input_ids"].device)]


def total_loss(losses: Losses, terms: Mapping[str, Tensor]) -> Tensor:
    """The weighted sum of the terms that are computed.

    Raises:
        SvlError: if it is not finite.
    """
    total = torch.stack([getattr(losses, name) * term for name, term in terms.items()]).sum()
    if not bool(total.isfinite()):
        listing = ", ".join(f"{name} {float(term.detach()):g}" for name, term in terms.items())
        raise SvlError(f"the loss of recovery is not finite ({listing}): lower recovery.learning_rate")
    return total


def logit_divergence(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """KL divergence (nats, mean over rows) from `theirs` [n, V] to `ours`, both divided by T, times T^2."""
    student, teacher = (F.log_softmax(logits / temperature, -1) for logits in (ours, theirs.to(ours.device)))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def state_distance(ours: Tensor, theirs: Tensor, present: Tensor) -> Tensor:
    """Mean of |ours - theirs|^2 / |theirs|^2 over the tokens [B, T] that are `present`; states [B, T, d]."""
    wanted = theirs.to(ours.device).float()
    error = (ours.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-30)
    return error[present.to(error.device)].mean()
