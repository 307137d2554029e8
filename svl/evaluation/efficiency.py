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
tower stay. Where layers lack their attention or MLP, the bound is that of the decoder layers' parameters that act on
a token: of experts, as many as it is given to.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from svl.core import SvlError
from svl.core.errors import explained, out_of_memory
from svl.data.samples import Sample
from svl.evaluation.settings import EfficiencySettings
from svl.models.devices import synchronize
from svl.models.lvlm import Lvlm, Progress
from svl.models.sample_inputs import encode_texts, sample_text
from svl.pruning.sublayers import NoAttention, NoMlp

log = logging.getLogger(__name__)

PARTS = ("image", "vision", "prefill", "decode")
RESIDENT = Path("/proc/self/status")
# Config fields that say how many experts a token is given to.
EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")
Seconds = dict[str, float]  # by part, and "total"


def measure_efficiency(
    dense: Lvlm,
    pruned: Lvlm,
    sample: Sample,
    settings: EfficiencySettings,
    show: Progress = lambda rounds, what, total: rounds,
) -> dict[str, Any]:
    """Costs of both models for one sample, answered several times at once with so many tokens.

    Returns:
        `dense` and `pruned`: parameters, layers, bytes, prefill_flops, cache_bytes, seconds {image, vision, prefill,
        decode, total} (medians), quartiles {the same: [low, high]}, decode_tokens_per_second, samples_per_second,
        peak_bytes (above the weights; None where the system does not tell); `speedup`: dense over pruned time of each
        part with `value` (median), `low` and `high` (quartiles); `ideal`: the bound above; `batch_size`, `sequence`
        (tokens of the prompt), `new_tokens`, `repeats`, `device`.

    Raises:
        SvlError: if layers are not in memory, the model's generation does not go through its decoder layers, or memory
            ran out.
    """
    pair = {"dense": dense, "pruned": pruned}
    for model in pair.values():
        model.require_in_memory("measuring speed")
    advice = f"lower efficiency.batch_size (now {settings.batch_size}) or efficiency.new_tokens"
    with out_of_memory("measuring speed", advice), explained("speed cannot be measured"):
        asked = Asked(sample_text(dense, sample), sample, settings.batch_size)
        rounds, peaks = _rounds(pair, asked, settings, show)
        inputs = asked.encode(dense)
        costs = {
            name: {
                **model_size(model),
                **pass_counts(model, inputs),
                **_speeds(rounds[name], settings),
                "peak_bytes": max(peaks[name], default=None),
            }
            for name, model in pair.items()
        }
    return {
        **costs,
        "speedup": _speedup(rounds),
        "ideal": ideal_speed(dense, pruned),
        "batch_size": settings.batch_size,
        "sequence": inputs["input_ids"].shape[1],
        "new_tokens": settings.new_tokens,
        "repeats": settings.repeats,
        "device": dense.device_facts(settings.batch_size),
    }


def ideal_speed(dense: Lvlm, pruned: Lvlm) -> float:
    """What the speed of the decoder layers could be, as a multiple of the dense model's."""
    if not any(isinstance(module, NoAttention | NoMlp) for module in pruned.layers.modules()):
        return len(dense.layers) / len(pruned.layers)
    return active_parameters(dense) / active_parameters(pruned)


def active_parameters(lvlm: Lvlm) -> float:
    """Parameters of the decoder layers that act on a token: of experts, as many as a token is given to."""
    text = lvlm.model.config.get_text_config(decoder=True)
    chosen = next((n for name in EXPERTS_OF_A_TOKEN if isinstance(n := getattr(text, name, None), int)), None)
    total = float(sum(p.numel() for p in lvlm.layers.parameters()))
    for name, module in lvlm.layers.named_modules():
        if not name.endswith(".experts"):
            continue
        parameters = list(module.parameters())
        n_experts = len(module) if isinstance(module, nn.ModuleList) else len(parameters[0])
        if chosen is None:
            log.warning("  ideal speed counts all experts: how many of them a token is given to is not known")
            break
        total -= (1 - min(chosen / n_experts, 1)) * sum(p.numel() for p in parameters)
    return total


@dataclass(frozen=True)
class Asked:
    """A sample, as the text of its prompt has it, that is asked `n` times at once."""

    text: str
    sample: Sample
    n: int

    def encode(self, lvlm: Lvlm) -> dict[str, Tensor]:
        """Model inputs."""
        return encode_texts(lvlm, [self.text] * self.n, [self.sample] * self.n)


def _rounds(
    pair: dict[str, Lvlm], asked: Asked, settings: EfficiencySettings, show: Progress
) -> tuple[dict[str, list[Seconds]], dict[str, list[int]]]:
    """For both models, seconds of every part in every round that counts, and peaks of memory."""
    rounds: dict[str, list[Seconds]] = {name: [] for name in pair}
    peaks: dict[str, list[int]] = {name: [] for name in pair}
    total = settings.warmup + settings.repeats
    for i in show(range(total), "measure", total):
        for name in pair if i % 2 else reversed(pair):  # neither is always the first
            with _peak(pair[name].devices) as peak:
                seconds = answer_parts(pair[name], asked, settings.new_tokens)
            if i >= settings.warmup:
                rounds[name].append(seconds)
                peaks[name] += peak
    return rounds, peaks


def _speeds(rounds: list[Seconds], settings: EfficiencySettings) -> dict[str, Any]:
    """What a model's rounds come to."""
    found = {part: _quartiles([seconds[part] for seconds in rounds]) for part in rounds[0]}
    return {
        "seconds": {part: quartiles["value"] for part, quartiles in found.items()},
        "quartiles": {part: [quartiles["low"], quartiles["high"]] for part, quartiles in found.items()},
        "decode_tokens_per_second": settings.batch_size * (settings.new_tokens - 1) / found["decode"]["value"],
        "samples_per_second": settings.batch_size / found["total"]["value"],
    }


def _speedup(rounds: dict[str, list[Seconds]]) -> dict[str, dict[str, float]]:
    """Dense over pruned seconds of each part, round by round."""
    both = list(zip(rounds["dense"], rounds["pruned"], strict=True))
    return {
        part: _quartiles([dense[part] / pruned[part] for dense, pruned in both if pruned[part]])
        for part in rounds["dense"][0]
    }


def model_size(lvlm: Lvlm) -> dict[str, int]:
    """Parameters, decoder layers, and bytes of the parameters (tied ones counted once)."""
    size = sum(_stored_bytes(tensor) for tensor in lvlm.model.parameters())
    return {"parameters": lvlm.parameters(), "layers": len(lvlm.layers), "bytes": size}


def _stored_bytes(tensor: Any) -> int:
    """Bytes of a tensor; of a quantised one, of what it is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return sum(_stored_bytes(part) for part in parts if isinstance(part, Tensor))


def pass_counts(lvlm: Lvlm, inputs: dict[str, Tensor]) -> dict[str, int]:
    """FLOPs (multiplications and additions) and KV-cache bytes of one prefill."""
    counted = sdpa_kernel(SDPBackend.MATH) if lvlm.device.type == "cpu" else nullcontext()
    # torch's counter does not know the products of all experts at once, where torch or transformers has them
    named = ((torch.ops.aten, "_grouped_mm"), (torch.ops.transformers, "grouped_mm_fallback"))
    experts: Any = {getattr(library, name): _grouped_flops for library, name in named if hasattr(library, name)}
    with torch.inference_mode(), counted, FlopCounterMode(display=False, custom_mapping=experts) as counter:
        cache = lvlm.model(**inputs, use_cache=True).past_key_values
    return {"prefill_flops": counter.get_total_flops(), "cache_bytes": _cache_bytes(cache)}


def _grouped_flops(rows: Sequence[int], matrices: Sequence[int], *_: Any, **__: Any) -> int:
    """Of rows [N, n_in], each times one of the matrices [E, n_in, n_out]."""
    return 2 * rows[0] * matrices[-2] * matrices[-1]


def _cache_bytes(cache: Any) -> int:
    """Bytes of all tensors of a cache's layers."""
    layers = getattr(cache, "layers", None) or []
    tensors = {id(x): x for layer in layers for x in vars(layer).values() if isinstance(x, Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def answer_parts(lvlm: Lvlm, asked: Asked, new_tokens: int) -> Seconds:
    """Seconds of every part of one batch of answers of exactly `new_tokens` tokens, and their total.

    Raises:
        SvlError: if the model's generation does not go through its decoder layers.
    """
    entered: list[float] = []  # the first decoder layer, in the first pass
    left: list[float] = []  # the model, then
    model: Any = lvlm.model
    devices = lvlm.devices
    begin = _now(devices)
    inputs = asked.encode(lvlm)
    encoded = _now(devices)

    def note(moments: list[float], hook: int) -> None:
        moments.append(_now(devices))
        handles[hook].remove()  # or the device would be waited for at every token

    handles = [
        lvlm.layers[0].register_forward_pre_hook(lambda *_: note(entered, 0)),
        lvlm.model.register_forward_hook(lambda *_: note(left, 1)),
    ]
    try:
        with torch.inference_mode():
            model.generate(**inputs, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False)
    finally:
        for handle in handles:
            handle.remove()
    done = _now(devices)
    if not entered or not left:
        raise SvlError(
            f"'{lvlm.name}' generates without passing its decoder layers, so its speed cannot be taken apart"
        )
    return {
        "image": encoded - begin,
        "vision": entered[0] - encoded,
        "prefill": left[0] - entered[0],
        "decode": done - left[0],
        "total": done - begin,
    }


def _now(devices: Sequence[torch.device]) -> float:
    synchronize(devices)
    return time.perf_counter()


@contextmanager
def _peak(devices: Sequence[torch.device]) -> Iterator[list[int]]:
    """A list that gets, at the end of the block, the peak of memory above what was taken at its start, in bytes.

    Of CUDA devices: torch's own counts, summed. Else the resident memory of the process; the list stays empty where
    Linux's counter cannot be reset.
    """
    peak: list[int] = []
    if cuda := [device for device in devices if device.type == "cuda"]:
        for device in cuda:
            torch.cuda.reset_peak_memory_stats(device)
        before = sum(map(torch.cuda.memory_allocated, cuda))
        yield peak
        peak.append(sum(map(torch.cuda.max_memory_allocated, cuda)) - before)
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
