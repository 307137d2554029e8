"""Decoder layers by themselves: one recorded forward pass of a sample, whose layers can then be run one at a time.

A sample runs alone, without padding. Its recorded pass keeps what each decoder layer is called with besides the hidden
state (position embeddings, masks), which removing or changing other layers does not alter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svl.calibration.hooks import run_decoder
from svl.calibration.row_count import add_rows
from svl.core import SvlError
from svl.models.layer_calls import first_argument, first_output, hooked, other_arguments
from svl.models.lvlm import Lvlm
from svl.models.placement import changed_tensors


@dataclass(frozen=True)
class Replay:
    """One sample: the state [1, T, d] that enters layer `start`, and the other arguments of every layer."""

    start: int
    state: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def run(self, layer: nn.Module, i: int, state: Tensor, changed: dict[str, Tensor] | None = None) -> Tensor:
        """What `layer`, in place i of the dense model, makes of `state` [B, T, d]; with parameters `changed`."""
        add_rows(len(state))
        args, kwargs = self.calls[i]
        if changed:
            with changed_tensors(layer, changed) as in_memory:
                return first_output(torch.func.functional_call(layer, in_memory, (state, *args), kwargs))
        return first_output(layer(state, *args, **kwargs))


@torch.no_grad()
def record_replay(lvlm: Lvlm, inputs: dict[str, Tensor], start: int, check: bool = False) -> tuple[Replay, Tensor]:
    """Run one sample (a batch of one) through the model: the replay from layer `start` on, and logits.

    With `check` the recorded pass is repeated layer by layer and compared, and logits are of all positions; otherwise
    of the last one, where the model can be told so.

    Raises:
        SvlError: if not every layer runs, if running them one by one does not end on the state that the model's own
            pass ends on, or the logits are not finite.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    states: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(first_argument(args, kwargs))
        calls.append(other_arguments(args, kwargs))

    def end(_: nn.Module, args: Any, output: Any) -> None:
        states.append(first_output(output))

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in lvlm.layers]
    with hooked([*handles, lvlm.layers[-1].register_forward_hook(end)]):
        logits = run_decoder(lvlm, inputs, all_logits=check).logits
    if len(calls) < len(lvlm.layers):
        raise SvlError(
            f"some layers of '{lvlm.name}' do not run for a sample without an image, so they cannot run one by one; "
            "leave such samples out"
        )
    replay = Replay(start, states[start], calls)
    if check:
        if not bool(logits.isfinite().all()):
            raise SvlError(f"the logits of '{lvlm.name}' are not finite; choose another model.dtype")
        state = replay.state
        for i in range(start, len(lvlm.layers)):
            state = replay.run(lvlm.layers[i], i, state)
        if not torch.allclose(state.float(), states[-1].float(), rtol=1e-2, atol=1e-2 * float(state.abs().max())):
            raise SvlError(
                f"'{lvlm.name}' does more between its decoder layers than pass on a state, so they cannot run one by "
                "one; choose a strategy and a compensation that only read statistics"
            )
    return replay, logits
