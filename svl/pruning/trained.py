"""Tensors that recovery has trained (`core.TensorChange`): arithmetic that surgery and export share, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from svl.core.errors import SvlError
from svl.core.patch import TensorChange
from svl.core.plan import Plan
from svl.models.anatomy import Anatomy
from svl.pruning.folding import BLOCK_COLUMNS, check_part


def check_trained(trained: Mapping[str, TensorChange], plan: Plan, anatomy: Anatomy, model: nn.Module) -> None:
    """Raise SvlError unless the changes are of tensors that a plan keeps, in shapes that fit, of finite numbers.

    `model` is the dense one; its parameters may be on the meta device.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    for name, change in trained.items():
        if name not in shapes or anatomy.layer_number(name) in plan.removed:
            raise SvlError(f"the patch has trained '{name}', which the pruned model does not have")
        shape, what = shapes[name], f"of the trained '{name}'"
        if (change.value is None) == (change.left is None) or (change.left is None) != (change.right is None):
            raise SvlError(f"the patch must have either all {what}, or both factors of its change")
        check_part(change.value, shape, f"the value {what}")
        if change.left is not None and change.right is not None:
            if len(shape) != 2:
                raise SvlError(f"the patch changes '{name}' by a product, but it is no matrix")
            rank = change.right.shape[0]
            check_part(change.left, (shape[0], rank), f"the left factor {what}")
            check_part(change.right, (rank, shape[1]), f"the right factor {what}")


def change_tensor(tensor: Tensor, change: TensorChange) -> Tensor:
    """The trained tensor, in the dtype and on the device of `tensor`: its new value, or W + left @ right in fp32.

    Products are added by blocks of columns, always the same ones, as updates are folded.
    """
    if change.value is not None:
        return change.value.to(tensor.device, tensor.dtype, copy=True)
    if change.left is None or change.right is None:
        raise ValueError("a change has a value, or two factors")
    left, right = (part.to(tensor.device, torch.float32) for part in (change.left, change.right))
    result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    for start in range(0, tensor.shape[1], BLOCK_COLUMNS):
        block = (slice(None), slice(start, start + BLOCK_COLUMNS))
        result[block] = tensor.detach()[block].float() + left @ right[block]
    return result
