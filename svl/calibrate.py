"""One pass over the calibration set under hooks, and streams of hidden states.

`calibrate` measures scalars per token and layer (`TokenTrace`) and writes them batch by batch, so memory above the
model does not depend on the number of samples; selectors, ratios and strategies are applied to those scalars later.
`Activations` streams hidden states for compensations, which need d-dimensional vectors of a few layers only.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svl import attention
from svl.core import Stats, SvlError, TokenSelector, TokenTrace, no_token
from svl.data import Example, Examples
from svl.models import Lvlm

STATISTICS = ("cosine", "attention")
FIELDS = ("visual", "cosine", "received", "emitted", "queries", "keys")
Show = Callable[[Iterable[Any], str, int], Iterable[Any]]


def _silent(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    return items


def calibrate(
    lvlm: Lvlm,
    examples: Examples,
    *,
    statistics: Sequence[str] = STATISTICS,
    batch_size: int = 8,
    folder: Path | None = None,
    show: Show = _silent,
) -> Stats:
    """Measure `statistics` on every sample in one forward pass each.

    With a `folder`, traces are written there (one safetensors file per batch) and read back on use; without one they
    are kept in memory (see `TokenTrace` for their size). `show` wraps the batches for a progress display.
    """
    batches = [examples.items[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    traces: Iterable[TokenTrace]
    if folder is None:
        traces = [t for batch in show(batches, "calibrate", len(batches)) for t in measure(lvlm, batch, statistics)]
    else:
        for number, batch in enumerate(show(batches, "calibrate", len(batches))):
            tensors = {
                f"{t.index}.{field}": getattr(t, field).contiguous()
                for t in measure(lvlm, batch, statistics)
                for field in FIELDS
                if getattr(t, field) is not None
            }
            save_file(tensors, folder / f"traces-{number:05d}.safetensors")
        traces = TraceFolder(folder)
    return Stats(lvlm.anatomy.n_layers, lvlm.anatomy.removable, traces)


def check_selector(lvlm: Lvlm, examples: Examples, selector: TokenSelector) -> None:
    """Try a selector that needs no measurement on the samples' tokens, without a forward pass.

    Raises:
        SvlError: if it gives every token of every sample the weight 0.
    """
    if selector.needs:
        return
    for example in examples.items:
        _, present, visual = _encode(lvlm, [example])
        if bool(selector.weights(TokenTrace(example.row, visual[present].cpu())).any()):
            return
    raise no_token(selector)


def keep_example(lvlm: Lvlm, examples: Examples, folder: Path) -> None:
    """Write the first image whose visual tokens form one grid (example.png) with its tokens (example.json)."""
    example = next((e for e in examples.items if e.image_bytes is not None), None)
    if example is None or not lvlm.sees:
        return
    inputs, _, visual = _encode(lvlm, [example])
    n = int(visual.sum())
    grid = [math.isqrt(n)] * 2
    if (thw := inputs.get("image_grid_thw")) is not None:  # frames, rows, columns of patches, merged into tokens
        merge = math.isqrt(int(thw[0].prod()) // n) if n else 1
        grid = [int(thw[0, 1]) // merge, int(thw[0, 2]) // merge]
    if n == 0 or grid[0] * grid[1] != n:
        return  # tiles and thumbnails have no plain grid
    tokens = lvlm.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0][~visual[0]].tolist())
    record = {"row": example.row, "prompt": example.prompt, "grid": grid, "tokens": tokens}
    (folder / "example.json").write_text(json.dumps(record))
    example.image.save(folder / "example.png")


@dataclass(frozen=True)
class TraceFolder:
    """The traces that `calibrate` wrote, in order; one batch in memory at a time."""

    folder: Path

    def __iter__(self) -> Iterator[TokenTrace]:
        for file in sorted(self.folder.glob("traces-*.safetensors")):
            tensors = load_file(file)
            for index in sorted({int(name.split(".")[0]) for name in tensors}):
                fields = {f: tensors[f"{index}.{f}"] for f in FIELDS if f"{index}.{f}" in tensors}
                yield TokenTrace(index=index, **fields)


@torch.inference_mode()
def measure(lvlm: Lvlm, batch: Sequence[Example], statistics: Sequence[str]) -> list[TokenTrace]:
    """Traces of one batch of samples (on the CPU), from one forward pass."""
    inputs, present, visual = _encode(lvlm, batch)
    cosines: dict[int, Tensor] = {}
    modality = torch.stack([visual & present, ~visual & present], 1).float()
    with ExitStack() as stack:
        if "cosine" in statistics:
            stack.enter_context(_cosine_hooks(lvlm, cosines))
        measuring = attention.metering(lvlm.model, modality) if "attention" in statistics else nullcontext()
        meter = stack.enter_context(measuring)
        _forward(lvlm, inputs)
    layers = range(lvlm.anatomy.n_layers)
    whole: dict[str, Tensor] = {}  # [B, L, ..., T]
    if cosines:
        whole["cosine"] = torch.stack([cosines[i] for i in layers], 1).cpu()
    if meter is not None:
        if mapless := [i for i in layers if i not in meter.received]:
            raise SvlError(f"layers {mapless} have no attention map to measure; {attention.WAY_OUT}")
        for name in ("received", "emitted", "queries", "keys"):
            per_layer = getattr(meter, name)
            same = name in ("queries", "keys") and all(torch.equal(per_layer[0], per_layer[i]) for i in layers)
            whole[name] = torch.stack([per_layer[i] for i in (range(1) if same else layers)], 1).cpu()
    return [
        TokenTrace(
            example.row, visual[b][present[b]].cpu(), **{k: v[b][..., present[b].cpu()] for k, v in whole.items()}
        )
        for b, example in enumerate(batch)
    ]


@dataclass(frozen=True)
class _Sample:
    weights: Tensor
    states: dict[int, Tensor]

    def h(self, i: int) -> Tensor:
        return self.states[i].float()


class _EnoughError(Exception):
    """Raised by the last hook: the rest of the forward pass is not needed."""


@dataclass(frozen=True)
class Activations:
    """Hidden states of the calibration set, streamed with the weights that the selector gives their tokens.

    `stats` must be the calibration of the same `examples`, with its selector.
    """

    lvlm: Lvlm
    examples: Examples
    stats: Stats
    batch_size: int = 8
    show: Show = _silent

    @property
    def n_layers(self) -> int:
        """Decoder layers of the dense model."""
        return self.lvlm.anatomy.n_layers

    @property
    def writers(self) -> Sequence[str]:
        """Roles of the residual-writing projections that can be changed."""
        return tuple(self.lvlm.anatomy.writers)

    def stream(self, points: Sequence[int]) -> Iterator[_Sample]:
        """One forward pass (up to the deepest point) over the set, giving fp32 h_i [T, d] for i in `points`."""
        items, selector = self.examples.items, self.stats.selector
        batches = [items[i : i + self.batch_size] for i in range(0, len(items), self.batch_size)]
        traces = iter(self.stats.traces)
        for batch in self.show(batches, "compensate", len(batches)):
            with torch.inference_mode():
                inputs, present, _ = _encode(self.lvlm, batch)
                states: dict[int, Tensor] = {}
                with _state_hooks(self.lvlm, sorted(set(points)), states), suppress(_EnoughError):
                    _forward(self.lvlm, inputs)
            for b in range(len(batch)):
                trace = next(traces)
                weights = torch.ones(int(present[b].sum())) if selector is None else selector.weights(trace)
                yield _Sample(weights.to(present.device), {i: h[b][present[b]] for i, h in states.items()})


def select(stats: Stats, selector: TokenSelector) -> Stats:
    """The same statistics seen through another selector."""
    return Stats(stats.n_layers, stats.removable, stats.traces, selector)


def _encode(lvlm: Lvlm, batch: Sequence[Example]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Model inputs, which positions [B, T] hold tokens of the sample, and which hold visual ones."""
    images = [e.image for e in batch if lvlm.sees and e.image_bytes is not None]
    prompts = [e.prompt if e.plain else lvlm.prompt(e.prompt, lvlm.sees and e.image_bytes is not None) for e in batch]
    inputs = lvlm.encode(prompts, images)
    return (
        inputs,
        inputs["attention_mask"].bool(),
        inputs["input_ids"] == (-1 if lvlm.anatomy.image_token_id is None else lvlm.anatomy.image_token_id),
    )


def _forward(lvlm: Lvlm, inputs: dict[str, Tensor]) -> None:
    """The decoder's layers on `inputs`; logits of one position only, where the model can be told so."""
    short = "logits_to_keep" in inspect.signature(lvlm.model.forward).parameters
    lvlm.model(**inputs, use_cache=False, **({"logits_to_keep": 1} if short else {}))


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def _cosine_hooks(lvlm: Lvlm, cosines: dict[int, Tensor]) -> Iterator[None]:
    """Within the block, forward passes put cos(h_i, h_{i+1}) [B, T] (fp32) into `cosines[i]`."""
    last: list[tuple[Tensor, Tensor]] = []  # the newest state and its norms: what leaves layer i enters layer i + 1

    def norm(x: Tensor) -> Tensor:
        if last and last[0][0] is x:
            return last[0][1]
        return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)

    def hook(i: int) -> Callable[..., None]:
        def measure_cosine(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            before, after = _first(args, kwargs), output[0] if isinstance(output, tuple) else output
            product = norm(before)
            last[:] = [(after, norm(after))]
            dot = torch.linalg.vecdot(before.float(), after.float())
            cosines[i] = dot / (product * last[0][1]).clamp(min=torch.finfo(torch.float32).tiny)  # 0 for zero states

        return measure_cosine

    with _hooked(layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(lvlm.layers)):
        yield


@contextmanager
def _state_hooks(lvlm: Lvlm, points: Sequence[int], states: dict[int, Tensor]) -> Iterator[None]:
    """Within the block, forward passes put h_i into `states` and end (by `_EnoughError`) at the deepest point."""

    def keep(i: int, state: Tensor) -> None:
        states[i] = state
        if i == points[-1]:
            raise _EnoughError

    def handles() -> Iterator[Any]:
        for i in points:
            if i < lvlm.anatomy.n_layers:
                yield lvlm.layers[i].register_forward_pre_hook(
                    lambda _, args, kwargs, i=i: keep(i, _first(args, kwargs)), with_kwargs=True
                )
            else:
                yield lvlm.layers[-1].register_forward_hook(
                    lambda _, args, output, i=i: keep(i, output[0] if isinstance(output, tuple) else output)
                )

    with _hooked(handles()):
        yield


@contextmanager
def _hooked(handles: Iterable[Any]) -> Iterator[None]:
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
