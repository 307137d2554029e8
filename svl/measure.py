"""Speed and memory of a pruned model beside the dense one, measured in one process and reported as ratios.

* Dense and pruned alternate, round by round, after warm-up rounds that do not count: both see the same state of the
  machine. A ratio is the median of the rounds' ratios, with the rounds' quartiles as its spread; seconds are medians.
* One answer of fixed length is generated and taken apart: *image* (the processor: pixels and token ids), *vision*
  (from the start of the first forward pass to the first decoder layer: vision tower, projector, embeddings), *prefill*
  (from there to its end) and *decode* (every later token).
* A device is waited for wherever a clock is read, which costs an asynchronous device a little: the same for both.
* Counts need no clock: parameters, bytes of the checkpoint, FLOPs of prefill (torch's counter), bytes of KV cache. For
  the first, attention on CPU is computed by plain matrix products: torch does not count its own kernel there.

Speed-up of *prefill* and *decode* is bounded by L / (L - n) of n removed layers out of L: embeddings, head and vision
tower stay.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from svl.core import SvlError
from svl.loading import Lvlm, Show

PARTS = ("image", "vision", "prefill", "decode")
RESIDENT = Path("/proc/self/status")


def measure(
    dense: Lvlm,
    pruned: Lvlm,
    prompt: str,
    image: Any | None,
    *,
    batch_size: int = 1,
    new_tokens: int = 32,
    warmup: int = 1,
    repeats: int = 5,
    show: Show = lambda rounds, what, total: rounds,
) -> dict[str, Any]:
    """Costs of both models for one prompt (and image), answered `batch_size` times at once with `new_tokens` tokens.

    Returns:
        `dense` and `pruned`: parameters, layers, bytes, prefill_flops, cache_bytes, seconds {image, vision, prefill,
        decode, total} (medians), quartiles {the same: [low, high]}, decode_tokens_per_second, samples_per_second,
        peak_bytes (above the weights; None where the system does not tell); `speedup`: dense over pruned time of each
        part with `value` (median), `low` and `high` (quartiles); `ideal`: L / (L - n); `batch_size`, `sequence` (tokens
        of the prompt), `new_tokens`, `repeats`, `device`.

    Raises:
        SvlError: if layers are not in memory, or the model's generation does not go through its decoder layers.
    """
    for model in (dense, pruned):
        model.must_be_whole("measuring speed")
    texts = [dense.prompt(prompt, image is not None)] * batch_size
    images = [image] * batch_size if image is not None else None
    pair = {"dense": dense, "pruned": pruned}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in pair}
    peaks: dict[str, list[int]] = {name: [] for name in pair}
    for i in show(range(warmup + repeats), "measure", warmup + repeats):
        for name in pair if i % 2 else reversed(pair):  # neither is always the first
            with _peak(pair[name].device) as peak:
                seconds = _answer(pair[name], texts, images, new_tokens)
            if i >= warmup:
                rounds[name].append(seconds)
                peaks[name] += peak
    result: dict[str, Any] = {}
    for name, model in pair.items():
        inputs = model.encode(texts, images)
        spread = {part: _quartiles([r[part] for r in rounds[name]]) for part in rounds[name][0]}
        median = {part: found["value"] for part, found in spread.items()}
        result[name] = {
            **size(model),
            **_counts(model, inputs),
            "seconds": median,
            "quartiles": {part: [found["low"], found["high"]] for part, found in spread.items()},
            "decode_tokens_per_second": batch_size * (new_tokens - 1) / median["decode"],
            "samples_per_second": batch_size / median["total"],
            "peak_bytes": max(peaks[name], default=None),
        }
    both = list(zip(rounds["dense"], rounds["pruned"], strict=True))
    result["speedup"] = {
        part: _quartiles([d[part] / p[part] for d, p in both if p[part]]) for part in rounds["dense"][0]
    }
    return {
        **result, "ideal": result["dense"]["layers"] / result["pruned"]["layers"], "batch_size": batch_size,
        "sequence": inputs["input_ids"].shape[1], "new_tokens": new_tokens, "repeats": repeats,
        "device": dense.place(batch_size),
    }  # fmt: skip


def size(lvlm: Lvlm) -> dict[str, int]:
    """Parameters, decoder layers, and bytes of the parameters (tied ones counted once)."""
    tensors = list(lvlm.model.parameters())
    return {
        "parameters": lvlm.parameters(),
        "layers": len(lvlm.layers),
        "bytes": sum(map(_held, tensors)),
    }


def _held(tensor: Any) -> int:
    """Bytes of a tensor; of a quantised one, of what it is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return sum(_held(part) for part in parts if isinstance(part, Tensor))


def _counts(lvlm: Lvlm, inputs: dict[str, Tensor]) -> dict[str, int]:
    """FLOPs (multiplications and additions) and KV-cache bytes of one prefill."""
    counted = sdpa_kernel(SDPBackend.MATH) if lvlm.device.type == "cpu" else nullcontext()
    with torch.inference_mode(), counted, FlopCounterMode(display=False) as counter:
        cache = lvlm.model(**inputs, use_cache=True).past_key_values
    return {"prefill_flops": counter.get_total_flops(), "cache_bytes": _bytes(cache)}


def _bytes(cache: Any) -> int:
    """Bytes of all tensors of a cache's layers."""
    layers = getattr(cache, "layers", None) or []
    tensors = {id(x): x for layer in layers for x in vars(layer).values() if isinstance(x, Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def _answer(lvlm: Lvlm, texts: list[str], images: Sequence[Any] | None, new_tokens: int) -> dict[str, float]:
    """Seconds of every part of one batch of answers of exactly `new_tokens` tokens, and their total."""
    marks: list[tuple[str, float]] = []

    def mark(what: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            marks.append((what, _now(lvlm.device)))

        return note

    begin = _now(lvlm.device)
    inputs = lvlm.encode(texts, list(images) if images else None)
    encoded = _now(lvlm.device)
    handles = [
        lvlm.layers[0].register_forward_pre_hook(mark("first layer")),
        lvlm.model.register_forward_hook(mark("end of pass")),
    ]
    try:
        with torch.inference_mode():
            lvlm.model.generate(**inputs, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False)
    finally:
        for handle in handles:
            handle.remove()
    done = _now(lvlm.device)
    entered = next((t for what, t in marks if what == "first layer"), None)
    first = next((t for what, t in marks if what == "end of pass"), None)
    if entered is None or first is None:
        raise SvlError(
            f"'{lvlm.name}' generates without passing its decoder layers, so its speed cannot be taken apart"
        )
    return {
        "image": encoded - begin, "vision": entered - encoded, "prefill": first - entered, "decode": done - first,
        "total": done - begin,
    }  # fmt: skip


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """A list that gets, at the end of the block, the peak of memory above what was taken at its start, in bytes.

    Of a CUDA device: torch's own count. Else the resident memory of the process; the list stays empty where Linux's
    counter cannot be reset.
    """
    peak: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device) - before)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
    except OSError:
        yield peak
        return
    yield peak
    peak.append(max(0, _resident("VmHWM") - before))


def _resident(field: str) -> int:
    line = next(line for line in RESIDENT.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"value": middle, "low": low, "high": high}
