"""One pass over the calibration set under hooks.

`calibrate` measures scalars per token and layer (`TokenTrace`) and writes them batch by batch, so memory above the
model does not depend on the number of samples; selectors, ratios and strategies are applied to those scalars later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svl.calibration import attention
from svl.calibration.hooks import cosine_hooks, run_decoder, state_hooks, sublayer_hooks
from svl.core import Stats, TokenSelector, TokenTrace, checked_weights, no_selected_token
from svl.core.errors import out_of_memory
from svl.data.samples import Sample, Samples
from svl.models.devices import fetched
from svl.models.lvlm import Lvlm, Progress, no_progress
from svl.models.sample_inputs import encode_samples, explained_samples
from svl.processes import all_or_none, my_share

FIELDS = ("visual", "cosine", "windows", "received", "emitted", "queries", "keys", "sublayers")
CHUNK = 1024  # tokens whose states are compared at once


def calibrate(
    lvlm: Lvlm,
    samples: Samples,
    *,
    statistics: Sequence[str] = ("cosine", "windows", "attention"),
    batch_size: int = 8,
    folder: Path | None = None,
    show: Progress = no_progress,
) -> Stats:
    """Measure `statistics` on every sample in one forward pass each.

    With a `folder`, traces are written there (one safetensors file per batch) and read back on use; without one they
    are kept in memory (see `TokenTrace` for their size). `show` wraps the batches for a progress display. Of processes
    that torchrun has started, which all need the same `folder`, each measures every so manyth batch.

    Raises:
        SvlError: if a sample does not go through the model, a layer has nothing to measure, or memory runs out.
    """
    batches = samples.batches(batch_size, lvlm.needs_equal_images)
    numbers = range(len(batches)) if folder is None else my_share(len(batches))

    def measure() -> Iterator[list[TokenTrace]]:
        mine = [batches[n] for n in numbers]
        measured = lvlm.map(lambda model, batch: measure_batch(model, batch, statistics), mine, show, "calibrate")
        return (batch.traces() for batch in _one_behind(measured))

    def write(folder: Path) -> None:
        for number, batch in zip(numbers, measure(), strict=True):
            _write_traces(batch, folder / f"traces-{number:05d}.safetensors")

    traces: Iterable[TokenTrace]
    with out_of_memory("calibration", f"lower calibration.batch_size (now {batch_size}), or set model.offload=true"):
        if folder is None:
            traces = [trace for batch in measure() for trace in batch]
        else:
            all_or_none(lambda: write(folder))
            traces = TraceFolder(folder)
    return Stats(lvlm.anatomy.n_layers, lvlm.anatomy.removable, traces)


def select(stats: Stats, selector: TokenSelector) -> Stats:
    """The same statistics seen through another selector."""
    return replace(stats, selector=selector)


def check_selector(lvlm: Lvlm, samples: Samples, selector: TokenSelector) -> None:
    """Try a selector that needs no measurement on the samples' tokens, without a forward pass.

    Raises:
        SvlError: if it gives every token of every sample the weight 0.
    """
    if selector.needs:
        return
    for sample in samples:
        _, present, visual = encode_samples(lvlm, [sample])
        trace = TokenTrace(sample.row, visual[present].cpu())
        if bool(checked_weights(selector, trace, lvlm.anatomy.n_layers).any()):
            return
    raise no_selected_token(selector)


def _write_traces(traces: Iterable[TokenTrace], file: Path) -> None:
    named = {f"{trace.index}.{field}": getattr(trace, field) for trace in traces for field in FIELDS}
    save_file({name: tensor.contiguous() for name, tensor in named.items() if tensor is not None}, file)


@dataclass(frozen=True)
class TraceFolder:
    """The traces that `calibrate` wrote, in order; one batch in memory at a time."""

    folder: Path

    def __iter__(self) -> Iterator[TokenTrace]:
        for file in sorted(self.folder.glob("traces-*.safetensors")):
            tensors = load_file(file)
            for index in sorted({int(name.split(".")[0]) for name in tensors}):
                fields: dict[str, Any] = {f: tensors[f"{index}.{f}"] for f in FIELDS if f"{index}.{f}" in tensors}
                yield TokenTrace(index=index, **fields)


def _one_behind(measured: Iterable[MeasuredBatch]) -> Iterator[MeasuredBatch]:
    """The same, each when the next has been asked of the device: so it need not wait for what is done with the last."""
    last: MeasuredBatch | None = None
    for batch in measured:
        if last is not None:
            yield last
        last = batch
    if last is not None:
        yield last


@dataclass(frozen=True)
class MeasuredBatch:
    """What one forward pass measured of a batch, on its way to the CPU."""

    samples: Sequence[Sample]
    values: Callable[[], dict[str, Tensor]]

    def traces(self) -> list[TokenTrace]:
        """Traces of the samples, on the CPU; the device is waited for."""
        values: dict[str, Any] = self.values()
        present, visual = values.pop("present"), values.pop("visual")
        return [
            TokenTrace(sample.row, visual[b][here], **{name: value[b][..., here] for name, value in values.items()})
            for b, (sample, here) in enumerate(zip(self.samples, present, strict=True))
        ]


@torch.inference_mode()
def measure_batch(lvlm: Lvlm, batch: Sequence[Sample], statistics: Sequence[str]) -> MeasuredBatch:
    """Statistics of one batch of samples, from one forward pass."""
    cosines: dict[int, Tensor] = {}
    states: dict[int, Tensor] = {}
    parts: dict[int, Tensor] = {}
    with explained_samples(batch), ExitStack() as stack:
        inputs, present, visual = encode_samples(lvlm, batch)
        if "cosine" in statistics:
            stack.enter_context(cosine_hooks(lvlm, cosines))
        if "sublayers" in statistics:
            stack.enter_context(sublayer_hooks(lvlm, parts))
        if "windows" in statistics:
            stack.enter_context(state_hooks(lvlm, range(lvlm.anatomy.n_layers + 1), states))
        modality = torch.stack([visual & present, ~visual & present], 1).float()
        measuring = attention.metering(lvlm.model, modality) if "attention" in statistics else nullcontext()
        meter = stack.enter_context(measuring)
        run_decoder(lvlm, inputs)
    layers = range(lvlm.anatomy.n_layers)
    for measured in filter(None, (cosines, parts)):
        for i in set(layers) - set(measured):  # it did not run, so what enters it leaves it
            measured[i] = torch.ones_like(next(iter(measured.values())))
    whole = {"present": present, "visual": visual}  # statistics: [B, L, ..., T]
    if cosines:
        whole["cosine"] = torch.stack([cosines[i].to(lvlm.device) for i in layers], 1)
    if parts:
        whole["sublayers"] = torch.stack([parts[i].to(lvlm.device) for i in layers], 2)
    if states:
        whole["windows"] = window_cosines([states[i] for i in range(len(layers) + 1)]).to(lvlm.device)
    if meter is not None:
        meter.check_layers(len(layers))
        for name in ("received", "emitted", "queries", "keys"):
            per_layer = {i: x.to(lvlm.device) for i, x in getattr(meter, name).items()}
            same = name in ("queries", "keys") and all(_equal(per_layer[0], per_layer[i]) for i in layers)
            whole[name] = torch.stack([per_layer[i] for i in (range(1) if same else layers)], 1)
    return MeasuredBatch(batch, fetched(whole, lvlm.device))


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal; a device is asked only about different ones."""
    return a is b or torch.equal(a, b)


def window_cosines(states: Sequence[Tensor]) -> Tensor:
    """Cosines of all pairs i < j of L + 1 states [B, T, d]: fp32 [B, (L + 1) L / 2, T], ordered (0, 1), (0, 2), ...

    On the device of the first state, piece by piece, wherever the others are.
    """
    batch, length, _ = states[0].shape
    i, j = torch.triu_indices(len(states), len(states), 1, device=states[0].device)
    result = torch.empty(batch, len(i), length, device=states[0].device)
    step = max(1, CHUNK // batch)
    for start in range(0, length, step):
        pieces = [h[:, start : start + step].to(result.device) for h in states]
        part = torch.stack(pieces, 2).float()  # [B, t, L + 1, d]
        size = torch.linalg.vector_norm(part, dim=-1, keepdim=True)
        part = part / size.clamp(min=torch.finfo(torch.float32).tiny)  # 0 for zero states
        result[..., start : start + step] = (part @ part.mT)[..., i, j].permute(0, 2, 1)
    return result
