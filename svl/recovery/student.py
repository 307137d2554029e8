"""The pruned model as something to train: its forward pass is the loss, its state is what is trained.

It shares every frozen tensor with the dense model, which is the teacher where a loss needs one: the two cost the memory
of one model and of what is trained, which is copied, in fp32. The dense model is never touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from svl.core import Patch, Plan, SvlError, TensorChange
from svl.models.lvlm import Lvlm
from svl.pruning import surgery
from svl.recovery import losses as terms
from svl.recovery.adapters import add_adapters, added_products
from svl.recovery.base import Parts, Recovery
from svl.recovery.batches import ANSWER
from svl.recovery.contract import checked_parts


class Student(nn.Module):
    """A pruned model in training.

    Attributes:
        lvlm: the pruned model.
        parts: what of it is trained.
        trained: the parameters that are, by names.
        tokens, samples: that have gone through it.

    Raises:
        SvlError: if this model cannot be trained, or has no such parts.
    """

    accepts_loss_kwargs = False  # for the Trainer: the loss of a batch is a mean

    def __init__(self, dense: Lvlm, plan: Plan, patch: Patch | None, recovery: Recovery):
        super().__init__()
        check_trainable(dense, recovery)
        self._half = recovery.precision == "bfloat16" or torch.bfloat16 in weight_dtypes(dense)
        self.lvlm = surgery.apply(dense, plan, patch)
        self.plan, self.recovery = plan, recovery
        self.parts = checked_parts(recovery, self.lvlm, plan)
        check_mergeable(dense, self.lvlm, plan, self.parts)
        self._teacher = dense if recovery.losses.need_teacher else None
        self._points = terms.compared_states(plan) if recovery.losses.states else {}
        self.trained = self._make_trainable()
        self.model = self.lvlm.model
        self.tokens, self.samples = 0, 0
        self._passes: list[dict[str, float]] = []  # the terms of their losses, unweighted

    def _make_trainable(self) -> dict[str, nn.Parameter]:
        """Give the model tensors and adapters of its own; what is trained, by names."""
        model, found = self.lvlm.model, {}
        self._dtypes = {name: model.get_parameter(name).dtype for name in self.parts.tensors}
        self._names: dict[str, list[str]] = {}  # all that a tensor has: tied ones have several
        for name in self.parts.tensors:
            frozen = model.get_parameter(name)
            found[name] = nn.Parameter(frozen.detach().clone().float())
            self._names[name] = [n for n, p in model.named_parameters(remove_duplicate=False) if p is frozen]
            for same in self._names[name]:
                surgery.set_tensor(model, same, found[name])
        if self.parts.adapted:
            added = add_adapters(self.lvlm, self.parts.adapted, self.recovery.adapter)
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            found |= {names[id(parameter)]: parameter for parameter in added}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in found.values():
            parameter.requires_grad_(True)
        return found

    # ------------------------------------------------------------------------------------------- training

    def train(self, mode: bool = True) -> Student:
        """As always, but running statistics, which are shared with the dense model, stay as they are."""
        super().train(mode)
        for module in self.modules():
            if getattr(module, "track_running_stats", False):
                module.eval()
        return self

    def forward(self, groups: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The loss of a batch, as `batches.Batches` makes it, on the device of its inputs."""
        each: list[dict[str, Tensor]] = []
        for group in groups:
            inputs = {name: value.to(self.lvlm.device) for name, value in group.items() if name != ANSWER}
            with self._precision():
                each.append(self._terms(inputs, group[ANSWER]))
        found = each[0] if len(each) == 1 else _mean_terms(groups, each)
        if self.training:
            self._passes.append({name: float(term.detach()) for name, term in found.items()})
            self.tokens += sum(int(group["attention_mask"].sum()) for group in groups)
            self.samples += sum(len(group[ANSWER]) for group in groups)
        loss = terms.total_loss(self.recovery.losses, found)
        if not loss.requires_grad:  # of a batch without a picture, if only the projector is trained
            loss = loss + sum(0 * parameter.sum().to(loss.device) for parameter in self.trained.values())
        return {"loss": loss.to(groups[0][ANSWER].device)}

    def take_terms(self) -> dict[str, float]:
        """The terms of the loss, unweighted, as means over the passes since this was asked for last."""
        passes, self._passes = self._passes, []
        return {name: sum(one[name] for one in passes) / len(passes) for name in passes[0]}

    def _terms(self, inputs: Mapping[str, Tensor], answer: Tensor) -> dict[str, Tensor]:
        weights, found = self.recovery.losses, {}
        logits, states = terms.forward_pass(self.lvlm, inputs, answer, list(self._points.values()))
        if weights.answers:
            targets = terms.answer_targets(inputs, answer).to(logits.device)
            found["answers"] = nn.functional.cross_entropy(logits, targets)
        if self._teacher is not None:
            with torch.no_grad():
                wanted, points = terms.forward_pass(self._teacher, inputs, answer, list(self._points))
            if weights.logits:
                found["logits"] = terms.logit_divergence(logits, wanted, weights.temperature)
            if weights.states:
                present = inputs["attention_mask"].bool()
                each = [terms.state_distance(states[new], points[i], present) for i, new in self._points.items()]
                found["states"] = (
                    torch.stack([distance.to(each[0].device) for distance in each]).mean().to(answer.device)
                )
        return {name: term.to(answer.device) for name, term in found.items()}

    @contextmanager
    def _precision(self) -> Iterator[None]:
        with torch.autocast(self.lvlm.device.type, torch.bfloat16, enabled=self._half):
            yield

    # ------------------------------------------------------------------------------------- what is trained

    @property
    def trained_parameters(self) -> int:
        """Number of numbers that are trained."""
        return sum(parameter.numel() for parameter in self.trained.values())

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """What is trained, by names: all that checkpoints hold of the model."""
        return {name: parameter.detach() for name, parameter in self.trained.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Read what `state_dict` gave."""
        missing = [name for name in self.trained if name not in state_dict]
        unexpected = [name for name in state_dict if name not in self.trained]
        if missing or unexpected:
            raise RuntimeError(f"a checkpoint of recovery lacks {missing}, and has {unexpected}")
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state_dict[name])
        return SimpleNamespace(missing_keys=[], unexpected_keys=[])

    def changes(self) -> dict[str, TensorChange]:
        """What training has made, by names in the dense model; whole tensors in their own dtype there.

        A tied tensor is there by all its names: which of them a checkpoint has is for the checkpoint to say.

        Raises:
            SvlError: if something is not finite.
        """
        if wrong := [name for name, parameter in self.trained.items() if not bool(parameter.isfinite().all())]:
            raise SvlError(
                f"training has left numbers in '{wrong[0]}' that are not finite: lower recovery.learning_rate"
            )
        found = {}
        for name in self.parts.tensors:
            for same in self._names[name]:
                found[same] = TensorChange(self.trained[name].detach().to("cpu", self._dtypes[name], copy=True))
        for path, left, right in added_products(self.lvlm, self.parts.adapted):
            found[f"{path}.weight"] = TensorChange(left=left.cpu(), right=right.cpu())
        return {_dense_name(self.lvlm, self.plan, name): change for name, change in found.items()}


def _dense_name(pruned: Lvlm, plan: Plan, name: str) -> str:
    """What the dense model calls a tensor of the pruned one."""
    prefix = f"{pruned.anatomy.layers}."
    if not name.startswith(prefix):
        return name
    number, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{plan.kept[int(number)]}.{rest}"


def _mean_terms(groups: list[dict[str, Tensor]], each: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The terms of all groups of a batch: means over the answer tokens, of states over all tokens, that they have."""
    answers = [int(group[ANSWER][:, 1:].sum()) for group in groups]
    tokens = [int(group["attention_mask"].sum()) for group in groups]
    found = {}
    for name in each[0]:
        counts = tokens if name == "states" else answers
        weighted = [n * part[name] for n, part in zip(counts, each, strict=True)]
        found[name] = torch.stack(weighted).sum() / sum(counts)
    return found


def weight_dtypes(lvlm: Lvlm) -> set[torch.dtype]:
    """The dtypes of a model's parameters; `model.dtype` is that of the first alone, which may be kept in another."""
    return {parameter.dtype for parameter in lvlm.model.parameters()}


def check_mergeable(dense: Lvlm, pruned: Lvlm, plan: Plan, parts: Parts) -> None:
    """Check that what training makes of these parts can be put into the dense model, and has the effect it had there.

    Raises:
        SvlError: if the dense model has other shapes there, or an adapter is on a tied tensor.
    """
    adapted = {f"{path}.weight": path for path in parts.adapted}
    there = {name: tuple(p.shape) for name, p in dense.model.named_parameters(remove_duplicate=False)}
    names: dict[int, list[str]] = {}
    for name, parameter in pruned.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name in (*parts.tensors, *adapted):
        parameter = pruned.model.get_parameter(name)
        shape, own = there.get(_dense_name(pruned, plan, name)), tuple(parameter.shape)
        if shape != own:
            raise SvlError(
                f"recovery cannot train '{name}' of '{pruned.name}', whose shape is {own}, as that of the dense model, "
                f"for which it would be stored, is {shape}; leave it out"
            )
        others = [other for other in names[id(parameter)] if other != name]
        if name in adapted and others:
            raise SvlError(
                f"LoRA cannot attach to '{adapted[name]}' of '{pruned.name}': its weight is '{others[0]}', too, which "
                "an adapter would not change; train it as a whole"
            )


def check_trainable(lvlm: Lvlm, recovery: Recovery) -> None:
    """Raise SvlError if this model cannot be trained, as far as that is known without trying."""
    lvlm.require_in_memory("recovery")
    if any(p.is_meta for p in lvlm.model.parameters()):
        raise SvlError(
            f"recovery needs all of '{lvlm.name}' on its devices, but model.device_map leaves layers elsewhere: choose "
            "another map, or recovery=none"
        )
    if any(type(p.data) is not Tensor for p in lvlm.model.parameters()):
        raise SvlError(f"the weights of '{lvlm.name}' are quantised, and cannot be trained")
    check_trainable_kind(lvlm, recovery)


def check_trainable_kind(lvlm: Lvlm, recovery: Recovery) -> None:
    """Raise SvlError if no model of this kind and dtype can be trained, wherever its weights are."""
    if torch.float16 in weight_dtypes(lvlm):
        raise SvlError("recovery trains in float32 or bfloat16, not in float16: set model.dtype=bfloat16")
    if recovery.gradient_checkpointing and not lvlm.model.supports_gradient_checkpointing:
        raise SvlError(
            f"{type(lvlm.model).__name__} has no gradient checkpointing: set recovery.gradient_checkpointing=false"
        )
