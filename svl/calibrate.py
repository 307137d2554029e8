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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from svl import attention, surgery
from svl.core import Patch, Plan, Stats, SvlError, TokenSelector, TokenTrace, Update, no_token
from svl.data import Example, Examples
from svl.loading import Lvlm, Show, Writer
from svl.replay import Replay, record

STATISTICS = ("cosine", "windows", "attention")
FIELDS = ("visual", "cosine", "windows", "received", "emitted", "queries", "keys")
CHUNK = 1024  # tokens whose states are compared at once


def silent(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    """No progress display."""
    return items


def calibrate(
    lvlm: Lvlm,
    examples: Examples,
    *,
    statistics: Sequence[str] = STATISTICS,
    batch_size: int = 8,
    folder: Path | None = None,
    show: Show = silent,
) -> Stats:
    """Measure `statistics` on every sample in one forward pass each.

    With a `folder`, traces are written there (one safetensors file per batch) and read back on use; without one they
    are kept in memory (see `TokenTrace` for their size). `show` wraps the batches for a progress display.
    """
    batches = [examples.items[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    traces: Iterable[TokenTrace]
    measured = lvlm.map(lambda model, batch: measure(model, batch, statistics), batches, show, "calibrate")
    if folder is None:
        traces = [trace for batch in measured for trace in batch]
    else:
        for number, batch in enumerate(measured):
            tensors = {
                f"{t.index}.{field}": getattr(t, field).contiguous()
                for t in batch
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
    states: dict[int, Tensor] = {}
    modality = torch.stack([visual & present, ~visual & present], 1).float()
    with ExitStack() as stack:
        if "cosine" in statistics:
            stack.enter_context(_cosine_hooks(lvlm, cosines))
        if "windows" in statistics:
            stack.enter_context(_state_hooks(lvlm, range(lvlm.anatomy.n_layers + 1), states))
        measuring = attention.metering(lvlm.model, modality) if "attention" in statistics else nullcontext()
        meter = stack.enter_context(measuring)
        _forward(lvlm, inputs)
    layers = range(lvlm.anatomy.n_layers)
    whole: dict[str, Tensor] = {}  # [B, L, ..., T]
    if cosines:
        whole["cosine"] = torch.stack([cosines[i] for i in layers], 1).cpu()
    if states:
        whole["windows"] = _windows([states[i] for i in range(len(layers) + 1)]).cpu()
    if meter is not None:
        meter.check(len(layers))
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


def _windows(states: Sequence[Tensor]) -> Tensor:
    """Cosines of all pairs i < j of L + 1 states [B, T, d]: fp32 [B, (L + 1) L / 2, T], ordered (0, 1), (0, 2), ..."""
    batch, length, _ = states[0].shape
    i, j = torch.triu_indices(len(states), len(states), 1, device=states[0].device)
    result = torch.empty(batch, len(i), length, device=states[0].device)
    step = max(1, CHUNK // batch)
    for start in range(0, length, step):
        part = torch.stack([h[:, start : start + step] for h in states], 2).float()  # [B, t, L + 1, d]
        size = torch.linalg.vector_norm(part, dim=-1, keepdim=True)
        part = part / size.clamp(min=torch.finfo(torch.float32).tiny)  # 0 for zero states
        result[..., start : start + step] = (part @ part.mT)[..., i, j].permute(0, 2, 1)
    return result


@dataclass(frozen=True)
class _Sample:
    weights: Tensor
    states: dict[int, Tensor]
    reads: dict[tuple[int, str], Tensor]
    writes: dict[tuple[int, str], Tensor]

    def h(self, i: int) -> Tensor:
        return self.states[i].float()

    def read(self, layer: int, writer: str) -> Tensor:
        return self.reads[layer, writer].float()

    def wrote(self, layer: int, writer: str) -> Tensor:
        return self.writes[layer, writer].float()


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
    show: Show = silent

    @property
    def n_layers(self) -> int:
        """Decoder layers of the dense model."""
        return self.lvlm.anatomy.n_layers

    @property
    def writers(self) -> Sequence[str]:
        """Roles of the residual-writing projections that can be changed."""
        return tuple(self.lvlm.anatomy.writers)

    def has_bias(self, layer: int, writer: str) -> bool:
        """Whether the projections `writer` of a layer have one bias."""
        return len(self.lvlm.anatomy.writers[writer][layer].biases) == 1

    def stream(
        self,
        points: Sequence[int] = (),
        writers: Sequence[tuple[int, str]] = (),
        plan: Plan | None = None,
        patch: Patch | None = None,
    ) -> Iterator[_Sample]:
        """One forward pass over the set, up to the deepest layer asked about; see `core.Hidden`."""
        lvlm = surgery.apply(self.lvlm, plan, patch) if plan and plan.removed else self.lvlm
        kept = plan.kept if plan else range(self.n_layers)
        new = {i: sum(k < i for k in kept) for i in range(self.n_layers + 1)}  # the layer that h_i enters
        ends = sorted({*(new[i] for i in points), max((new[i] + 1 for i, _ in writers), default=0)} - {0}) or [0]
        wanted = sorted({*(new[i] for i in points), ends[-1]})
        items, selector = self.examples.items, self.stats.selector
        batches = [items[i : i + self.batch_size] for i in range(0, len(items), self.batch_size)]
        traces = iter(self.stats.traces)

        def run(model: Lvlm, batch: Sequence[Example]) -> tuple[Any, ...]:
            states: dict[int, Tensor] = {}
            reads: dict[tuple[int, str], Tensor] = {}
            writes: dict[tuple[int, str], Tensor] = {}
            with torch.inference_mode(), ExitStack() as stack:
                inputs, present, _ = _encode(model, batch)
                stack.enter_context(suppress(_EnoughError))
                stack.enter_context(_state_hooks(model, wanted, states, stop=True))
                for layer, role in writers:
                    writer = model.anatomy.writers[role][new[layer]]
                    module = model.layers[new[layer]].get_submodule(writer.module)
                    stack.enter_context(_writer_hook(module, (layer, role), reads, writes))
                _forward(model, inputs)
            return present, states, reads, writes

        for present, states, reads, writes in lvlm.map(run, batches, self.show, "compensate"):
            for b, here in enumerate(present):
                weights = torch.ones(int(here.sum())) if selector is None else selector.weights(next(traces))
                yield _Sample(
                    weights.to(present.device),
                    {i: states[new[i]][b][here] for i in points},
                    {key: x[b][here] for key, x in reads.items()},
                    {key: x[b][here] for key, x in writes.items()},
                )

    def walk(self, plan: Plan) -> Iterator[_Step]:
        """Kept layers from the last one before the first removed layer on; see `core.Hidden`.

        Raises:
            SvlError: if the model does something between its layers that running them one by one leaves out.
        """
        self.lvlm.must_be_whole("refitting layer by layer")
        first = next((i for i in plan.removed), self.n_layers) - 1
        start, selector, kept = max(first, 0), self.stats.selector, [i for i in plan.kept if i >= first]
        pairs = list(zip(self.examples.items, self.stats.traces, strict=True))
        walkers: list[_Walker] = []
        for example, trace in self.show(pairs, "record", len(pairs)):
            inputs, present, _ = _encode(self.lvlm, [example])
            if not bool(present.all()):
                raise SvlError(f"calibration row {example.row} has padding of its own, which a walk cannot tell apart")
            replay, _ = record(self.lvlm, inputs, start, check=not walkers)
            weights = torch.ones(present.shape[1]) if selector is None else selector.weights(trace)
            walkers.append(_Walker(replay, weights.to(present.device), replay.state, replay.state))
        for here, following in zip(kept, [*kept[1:], self.n_layers], strict=True):
            for walker in walkers:
                for i in range(here, following):
                    walker.dense = walker.run(self.lvlm.layers[i], i, walker.dense)
            step = _Step(here, self.lvlm, walkers)
            yield step
            for walker in walkers:
                walker.pruned = walker.run(self.lvlm.layers[here], here, walker.pruned, step.changed)


@dataclass
class _Walker:
    """One sample on a walk: states [1, T, d] of the dense and of the pruned model."""

    replay: Replay
    weights: Tensor
    dense: Tensor
    pruned: Tensor

    @torch.no_grad()
    def run(self, layer: nn.Module, i: int, state: Tensor, changed: dict[str, Tensor] | None = None) -> Tensor:
        return self.replay.run(layer, i, state, changed)


@dataclass
class _Step:
    layer: int
    lvlm: Lvlm
    walkers: Sequence[_Walker]
    changed: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, writer: str) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        layer = self.lvlm.layers[self.layer]
        module = layer.get_submodule(self._writer(writer).module)
        reads: dict[str, Tensor] = {}
        with _writer_hook(module, writer, reads, {}):
            for walker in self.walkers:
                out = walker.run(layer, self.layer, walker.pruned, self.changed)
                w = walker.weights if walker.weights.ndim == 1 else walker.weights[self.layer]
                yield reads[writer][0].float(), out[0].float(), walker.dense[0].float(), w

    def change(self, writer: str, delta: Tensor) -> None:
        (name,) = self._writer(writer).matrices
        layer = self.lvlm.layers[self.layer]
        weight = self.changed.get(name, layer.get_parameter(name))
        self.changed[name] = surgery.revise(weight, Update(delta=delta))

    def _writer(self, role: str) -> Writer:
        writer = self.lvlm.anatomy.writers[role][self.layer]
        if not writer.single:
            raise SvlError(
                f"the writer '{role}' of layer {self.layer} has several matrices; this compensation needs one"
            )
        return writer


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


def encode_answer(lvlm: Lvlm, example: Example) -> tuple[dict[str, Tensor], Tensor]:
    """Model inputs of one sample with its answer (batch of one, no padding), and which tokens [T] are the answer.

    The answer is what the chat template makes of it, end of turn included; of plain text, every token is one.

    Raises:
        SvlError: if the answer adds no token.
    """
    if example.plain:
        inputs = lvlm.encode([example.prompt])
        return inputs, torch.ones_like(inputs["input_ids"][0], dtype=torch.bool)
    image = lvlm.sees and example.image_bytes is not None
    images = [example.image] if image else None
    prompt = lvlm.prompt(example.prompt, image)
    whole = lvlm.prompt(example.prompt, image, example.answer).rstrip("\n")
    asked, inputs = lvlm.encode([prompt], images)["input_ids"][0], lvlm.encode([whole], images)
    tokens = inputs["input_ids"][0]
    same = int((tokens[: len(asked)] == asked[: len(tokens)]).long().cumprod(0).sum())
    if same == len(tokens):
        raise SvlError(f"calibration row {example.row}: the answer '{example.answer}' adds no token to the prompt")
    return inputs, torch.arange(len(tokens), device=tokens.device) >= same


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
def _state_hooks(lvlm: Lvlm, points: Sequence[int], states: dict[int, Tensor], stop: bool = False) -> Iterator[None]:
    """Within the block, forward passes put h_i into `states`; with `stop`, `_EnoughError` ends them at the deepest."""

    def keep(i: int, state: Tensor) -> None:
        states[i] = state
        if stop and i == points[-1]:
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
def _writer_hook(module: nn.Module, key: Any, reads: dict[Any, Tensor], writes: dict[Any, Tensor]) -> Iterator[None]:
    """Within the block, forward passes put what `module` reads and writes under `key`."""

    def keep(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        reads[key], writes[key] = _first(args, kwargs), output[0] if isinstance(output, tuple) else output

    with _hooked([module.register_forward_hook(keep, with_kwargs=True)]):
        yield


@contextmanager
def _hooked(handles: Iterable[Any]) -> Iterator[None]:
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
