"""The hidden state that a module is called with and gives out, by whatever convention; and hooks for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

STATE = "hidden_states"  # what the first argument of layers is called


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state that a module is called with."""
    return args[0] if args else kwargs[STATE]


def with_first_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], state: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with another hidden state."""
    return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, STATE: state})


def other_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a module is called with besides the hidden state."""
    return args[1:], {name: value for name, value in kwargs.items() if args or name != STATE}


def first_output(output: Any) -> Tensor:
    """The hidden state that a module gives out, alone or before others."""
    return output[0] if isinstance(output, tuple) else output


def with_first_output(output: Any, state: Tensor) -> Any:
    """What a module gives out with another hidden state."""
    return (state, *output[1:]) if isinstance(output, tuple) else state


@contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Within the block, hooks are in place; afterwards they are gone."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
