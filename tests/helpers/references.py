"""Plain references to compare pruned models with, by hooks on the full one."""

from __future__ import annotations

import copy
import functools
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svl.core import Patch, Plan, Update
from svl.data.samples import Samples
from svl.evaluation.shared_prefill import SharedPrefill
from svl.models.lvlm import Lvlm
from svl.models.sample_inputs import encode_answer, encode_samples
from svl.pruning.surgery import apply
from svl.recovery.batches import ANSWER, Batches


def logits(model, inputs) -> Tensor:
    with torch.inference_mode():
        return model(**inputs).logits


def together(models, ask):
    """What `ask(model)` gives when they read one batch one after the other, and what shares."""
    shared = SharedPrefill(models)
    found = [None] * len(models)
    for k in shared.order:
        with shared.reading(k):
            found[k] = ask(models[k].model)
    return found, shared


@contextmanager
def skipped(lvlm: Lvlm, removed):
    """The full model whose `removed` layers run, and fill their cache, but pass on their input."""

    def skip(_, args, kwargs, out):
        state = args[0] if args else kwargs["hidden_states"]
        return (state, *out[1:]) if isinstance(out, tuple) else state

    handles = [lvlm.layers[i].register_forward_hook(skip, with_kwargs=True) for i in removed]
    yield lvlm.model
    for handle in handles:
        handle.remove()


@contextmanager
def eager_maps(lvlm: Lvlm, maps: dict[int, Tensor]):
    """Eager attention in the decoder; its maps [H, T, T] of the only sample go to `maps`, by layer."""
    model = copy.deepcopy(lvlm.model)
    shared = model.config.get_text_config(decoder=True) is model.config
    model.set_attn_implementation({"" if shared else "text_config": "eager"})

    def keep(layer):
        def hook(_, __, out):
            if isinstance(out, tuple) and len(out) > 1 and isinstance(out[1], Tensor) and out[1].ndim == 4:
                maps[layer] = out[1][0].float()

        return hook

    for i, layer in enumerate(model.get_submodule(lvlm.anatomy.layers)):
        attention = next(module for name, module in layer.named_children() if name.endswith("attn"))
        attention.register_forward_hook(keep(i))
    yield model


@contextmanager
def written_times(lvlm: Lvlm, layer: int, role: str, factor: Tensor):
    """What a layer writes in one role is multiplied by `factor` [d, d] on its way."""

    def multiply(_, __, out):
        return (out[0] @ factor.T, *out[1:]) if isinstance(out, tuple) else out @ factor.T

    module = lvlm.layers[layer].get_submodule(lvlm.anatomy.writers[role][layer].module)
    handle = module.register_forward_hook(multiply)
    yield lvlm.model
    handle.remove()


@contextmanager
def compensated(lvlm: Lvlm, plan: Plan, patch: Patch):
    """A copy of the full model that skips the plan's layers, and does on its way what the patch folds into weights."""
    whole = replace(lvlm, model=copy.deepcopy(lvlm.model))
    for layer, terms in patch.blends.items():
        with torch.no_grad():
            for name, parameter in whole.layers[layer].named_parameters():
                module = whole.layers[layer].get_submodule(name.rpartition(".")[0])
                if parameter.ndim > 1 or "Norm" not in type(module).__name__:
                    old = {source: lvlm.layers[source].get_parameter(name) for source in terms}
                    parameter.copy_(sum(coefficient * old[source] for source, coefficient in terms.items()))
    for layer, parts in patch.joins.items():
        with torch.no_grad():
            for name, parameter in whole.layers[layer].named_parameters():
                parameter.copy_(_joined(name, [(lvlm.layers[p.layer].get_parameter(name), p) for p in parts]))
    for (layer, role), change in patch.updates.items():
        module = whole.layers[layer].get_submodule(lvlm.anatomy.writers[role][layer].module)
        module.register_forward_hook(functools.partial(_add, change))
    for layer, role in plan.sublayers:
        module = whole.layers[layer].get_submodule(lvlm.anatomy.writers[role][layer].module)
        module.register_forward_hook(lambda _, args, out: torch.zeros_like(out))
    with skipped(whole, plan.removed) as model:
        for start, stop in plan.runs:
            if start in patch.maps:  # after the hook that skips
                whole.layers[stop - 1].register_forward_hook(functools.partial(_mapped, patch.maps[start]))
        yield model


def _add(change: Update, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """What a projection writes, changed by an update: scale (y + left right y + delta x + shift)."""
    if change.weight is not None:
        out = F.linear(args[0], change.weight, module.bias)
    total = out
    if change.left is not None:
        right = change.right if change.right is not None else torch.eye(len(change.left))
        total = total + out @ right.T @ change.left.T
    if change.delta is not None:
        total = total + args[0] @ change.delta.T
    if change.shift is not None:
        total = total + change.shift
    return total if change.scale is None else change.scale * total


def _joined(name: str, parts) -> Tensor:
    """A tensor of a joined layer, head by head and channel by channel."""
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        flipped = [(weight.T, part) for weight, part in parts]
        return _joined("q_proj" if "o_proj" in name else "up_proj", flipped).T
    kinds = {
        "q_proj": "queries",
        "k_proj": "groups",
        "v_proj": "groups",
        "gate_proj": "channels",
        "up_proj": "channels",
    }
    for key, kind in kinds.items():
        if key in name:
            size = len(parts[0][0]) // sum(len(getattr(part, kind)) for _, part in parts)
            return torch.cat([w[i * size : (i + 1) * size] for w, part in parts for i in getattr(part, kind).tolist()])
    by_share = any(word in name for word in ("proj", "q_norm", "k_norm"))
    return sum((part.share if by_share else part.norm) * tensor for tensor, part in parts)


def _mapped(matrix: Tensor, _: nn.Module, args, out):
    """What a skipped layer passes on, mapped."""
    if isinstance(out, tuple):
        return (out[0] @ matrix.T, *out[1:])
    return out @ matrix.T


def update(d: int) -> Update:
    left, right = (torch.randn(*size, generator=torch.Generator().manual_seed(3)) / 4 for size in ((d, 2), (2, d)))
    return Update(left, right)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, atol=tolerance * float(b.abs().max()), rtol=0)


def assert_answers_are_unseen(lvlm: Lvlm, examples: Samples) -> None:
    """Of answered samples, one by one and in a batch, no logit knows a token of the answer that comes after it.

    The last token is another one, which leaves all logits before it as they are; those that predict an answer's first
    token are those of the sample without its answer.
    """
    encoded = [encode_answer(lvlm, example)[0] for example in examples]
    for inputs in (*encoded, *Batches(lvlm, examples)(range(len(examples)))["groups"]):
        inputs = {name: value for name, value in inputs.items() if name != ANSWER}
        other = {**inputs, "input_ids": inputs["input_ids"].clone()}
        last = other["input_ids"][:, -1]
        last.copy_(torch.where(last == 9, 10, 9))
        present = inputs["attention_mask"].bool()[:, :-1]
        before, after = (logits(lvlm.model, each)[:, :-1][present] for each in (inputs, other))
        close(after, before, 1e-5)
    for example, inputs in zip(examples, encoded, strict=True):
        asked, _, _ = encode_samples(lvlm, [example])
        ids, length = asked["input_ids"][0], asked["input_ids"].shape[1]
        if not example.plain and torch.equal(inputs["input_ids"][0, :length], ids):
            close(logits(lvlm.model, inputs)[0, length - 1], logits(lvlm.model, asked)[0, -1])


def rebuilt_losses(lvlm, examples, removals) -> list[float]:
    """Losses of rebuilt models, each without some layers or (layer, role) blocks, over answer tokens, one sample at a
    time."""
    encoded = [encode_answer(lvlm, example) for example in examples.samples]
    return [_loss(apply(lvlm, _plan(lvlm.anatomy.n_layers, removed)).model, encoded) for removed in removals]


def rebuilt_loss(lvlm, examples, removed) -> float:
    """The same of one model."""
    return rebuilt_losses(lvlm, examples, [removed])[0]


def _plan(n: int, removed) -> Plan:
    layers = tuple(part for part in removed if isinstance(part, int))
    attn, mlp = (tuple(part[0] for part in removed if part not in layers and part[1] == r) for r in ("attn", "mlp"))
    return Plan(n, layers, removed_attn=attn, removed_mlp=mlp)


def _loss(model, encoded) -> float:
    total, n = 0.0, 0
    for inputs, answer in encoded:
        with torch.inference_mode():
            logits = model(**inputs).logits[0].float()
        where = [i for i in range(1, len(answer)) if answer[i]]
        picked = F.cross_entropy(logits[[i - 1 for i in where]], inputs["input_ids"][0][where], reduction="sum")
        total, n = total + float(picked), n + len(where)
    return total / n
