"""The checks that a pruned model computes what the full one computes when it skips those layers."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from svl.core.errors import SvlError, explained
from svl.core.plan import Plan
from svl.models.layer_calls import first_argument, first_output, hooked, with_first_output
from svl.models.lvlm import Lvlm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def check_layer_settings(dense: nn.ModuleList, pruned: nn.ModuleList, plan: Plan, name: str) -> None:
    """Raise SvlError unless kept layers are made of the same modules, with the same numbers, before and after.

    Such a number may come from the layer's position, or the depth of the model (DiffLlama's lambda, for one), and no
    config would then give the layer back its old one. Layer numbers themselves may change as the plan says. Both lists
    may be on the meta device; of buffers, those are compared that have values on both sides.
    """
    for new, old in enumerate(plan.kept):
        before, after = dict(dense[old].named_modules()), dict(pruned[new].named_modules())
        if {n: type(m) for n, m in before.items()} != {n: type(m) for n, m in after.items()}:
            raise SvlError(f"'{name}' cannot do without layers {list(plan.removed)}: layer {old} would become another")
        for path, module in before.items():
            is_now = settings_of(after[path])
            for key, value in settings_of(module).items():
                if key not in is_now or _is_same(value, is_now[key], plan):
                    continue
                raise SvlError(
                    f"'{name}' cannot do without layers {list(plan.removed)}: '{key}' of layer {old} is made from its "
                    f"position or the model's depth, and would be {_shown(is_now[key])} instead of {_shown(value)}"
                )


def settings_of(module: nn.Module) -> dict[str, Any]:
    """A module's own plain values (numbers, texts, sequences of them) and buffers, but for those without values."""
    own = {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "training"}
    own |= dict(module.named_buffers(recurse=False))
    return {k: v for k, v in own.items() if _is_plain(v) or (isinstance(v, Tensor) and not v.is_meta)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | float | str)


def _is_same(before: Any, after: Any, plan: Plan) -> bool:
    if isinstance(before, Tensor) or isinstance(after, Tensor):
        return isinstance(before, Tensor) and isinstance(after, Tensor) and torch.equal(before, after.to(before))
    if isinstance(before, float) and isinstance(after, float):
        return math.isclose(before, after, rel_tol=1e-9)
    is_layer_number = type(before) is int and type(after) is int and 0 <= after < len(plan.kept)
    return before == after or (is_layer_number and plan.kept[after] == before)


def _shown(value: Any) -> str:
    return "another tensor" if isinstance(value, Tensor) else repr(value)


def example_inputs(lvlm: Lvlm) -> dict[str, Tensor]:
    """Inputs to try a model on: a short prompt, with a picture if it takes any and has a template that places it."""
    import numpy as np
    from PIL import Image

    with_image = lvlm.takes_images and getattr(lvlm.processor, "chat_template", None) is not None
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels).resize((224, 224))] if with_image else []
    with explained(f"the processor of '{lvlm.name}' fails on an example"):
        return lvlm.encode([lvlm.prompt("What is in the picture, and where?", images=len(images))], [images])


def check_surgery(lvlm: Lvlm, pruned: Lvlm, plan: Plan, inputs: dict[str, Tensor]) -> float:
    """How far logits of `pruned` (of `plan` alone, no patch) are from those of the full model that skips as much.

    The largest difference, as a fraction of the largest logit. Layers that the full model skips run, and fill their
    cache, but pass on their input. Both models do the same arithmetic on the same tensors, so the difference is zero
    where kernels are deterministic; two units of the last place of the dtype are allowed, or ten times what the full
    model differs from itself.

    Raises:
        SvlError: if it is more, unless the plan removes layers whose protection was waived.
    """
    if lvlm.takes_images and inputs.keys() <= {"input_ids", "attention_mask"}:
        log.info("  surgery is checked on text: '%s' has no chat template that places a picture", lvlm.name)
    handles = [lvlm.layers[i].register_forward_hook(_pass_on_input, with_kwargs=True) for i in plan.removed]
    for i, role in plan.sublayers:
        writer = lvlm.layers[i].get_submodule(lvlm.anatomy.writers[role][i].module)
        handles.append(writer.register_forward_hook(_write_nothing))
    with hooked(handles):
        expected, again = _logits(lvlm.model, inputs), _logits(lvlm.model, inputs)
    difference = _distance(_logits(pruned.model, inputs), expected)
    allowed = max(2 * torch.finfo(lvlm.model.dtype).eps, 10 * _distance(again, expected))
    if waived := sorted(set(plan.removed) & set(lvlm.anatomy.waived)):
        log.warning("  layers %s were removed against model.protect=auto: %.2g off", waived, difference)
    elif not difference <= allowed:  # true of NaN, too
        raise SvlError(
            f"surgery on '{lvlm.name}' failed its check: without layers {list(plan.removed)}"
            f"{', and without ' + str(list(plan.sublayers)) if plan.sublayers else ''}, logits are "
            f"{difference:.2g} (of the largest) away from those of the full model that skips them; please report this"
        )
    return difference


def _logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model(**inputs, use_cache=False).logits.float()


def _distance(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).abs().max() / expected.abs().max())


def _write_nothing(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Zeros in place of what a projection, or a block of several, gives."""
    return with_first_output(output, torch.zeros_like(first_output(output)))


def _pass_on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A layer's input in place of its output."""
    return with_first_output(output, first_argument(args, kwargs))
