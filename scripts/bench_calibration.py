"""What calibration costs above the forward pass that it rides on: time and peak memory, as ratios of one run.

    python scripts/bench_calibration.py [--repeats 5] [--threads 2]

(a) the plain forward pass over the calibration set; (b) svl with cosines only; (c) svl with cosines and attention
statistics for TIS; (d) what one would write without svl: eager attention with `output_hidden_states` and
`output_attentions`, reduced likewise. The variants take turns, so that a noisy machine disturbs all alike.
Peak memory is the resident set's high-water mark above what was resident before (Linux).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.utils import logging

import svl
from svl.calibration.calibrate import calibrate
from svl.calibration.hooks import run_decoder
from svl.config import PACKAGE
from svl.data.samples import Samples
from svl.models.anatomy import find_anatomy
from svl.models.lvlm import Lvlm
from svl.models.sample_inputs import encode_samples

LIBC = ctypes.CDLL("libc.so.6")


class Large:
    """A random LLaVA of width 1024 with 16 layers; 576 visual and 64 text tokens per sample, no tokenizer needed."""

    def __init__(self) -> None:
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
                                           num_attention_heads=4, image_size=336, patch_size=14),
            text_config=LlamaConfig(hidden_size=1024, intermediate_size=2752, num_hidden_layers=16,
                                    num_attention_heads=16, vocab_size=1000),
            image_token_id=999, image_seq_length=576, vision_feature_layer=-1,
        )  # fmt: skip
        torch.manual_seed(0)
        self.model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()

    def lvlm(self) -> Lvlm:
        model = self.model

        class Inputs(Lvlm):
            def prompt(self, text: str, image: bool) -> str:
                return text

            def encode(self, texts: list[str], images: list | None = None) -> dict[str, torch.Tensor]:
                text = torch.arange(64).repeat(len(texts), 1) + 7 * torch.arange(len(texts))[:, None]
                ids = torch.cat([torch.full((len(texts), 576), 999), text], 1)
                pixels = torch.linspace(-1, 1, 3 * 336 * 336).view(1, 3, 336, 336).repeat(len(texts), 1, 1, 1)
                return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

        return Inputs(model, None, find_anatomy(model), "random LLaVA, width 1024, 16 layers, T=640")


def plain(lvlm: Lvlm, data: Samples, size: int) -> None:
    """(a) the forward pass alone."""
    with torch.inference_mode():
        for i in range(0, len(data), size):
            run_decoder(lvlm, encode_samples(lvlm, data.samples[i : i + size])[0])


def measured(*statistics: str) -> Callable[[Lvlm, Samples, int], None]:
    """(b), (c) svl's calibration, written to disk as a run does."""

    def run(lvlm: Lvlm, data: Samples, size: int) -> None:
        folder = Path(tempfile.mkdtemp())
        calibrate(lvlm, data, statistics=statistics, batch_size=size, folder=folder)
        shutil.rmtree(folder)

    return run


def naive(lvlm: Lvlm, data: Samples, size: int) -> None:
    """(d) all hidden states and all attention maps, then the same reductions."""
    model = lvlm.model
    model.set_attn_implementation({"text_config": "eager"})
    with torch.inference_mode():
        for i in range(0, len(data), size):
            inputs, present, visual = encode_samples(lvlm, data.samples[i : i + size])
            out = model(**inputs, use_cache=False, output_hidden_states=True, output_attentions=True)
            for before, after in zip(out.hidden_states[:-1], out.hidden_states[1:], strict=True):
                torch.cosine_similarity(before.float(), after.float(), dim=-1)
            modality = torch.stack([visual & present, ~visual & present], 1).float()
            for attention in out.attentions:
                mean = attention.mean(1)
                modality @ mean, mean @ modality.mT
            del out
    model.set_attn_implementation({"text_config": "sdpa"})


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MiB."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


def peak(run: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and MiB of resident memory above the start at the worst moment."""
    gc.collect()
    LIBC.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the high-water mark
    before, began = resident("VmRSS"), time.perf_counter()
    run()
    return time.perf_counter() - began, resident("VmHWM") - before


VARIANTS = {
    "(a) plain forward": plain,
    "(b) svl, cosine": measured("cosine"),
    "(c) svl, cosine + TIS statistics": measured("cosine", "attention"),
    "(d) eager, all states and maps": naive,
}


def bench(lvlm: Lvlm, data: Samples, size: int, repeats: int) -> None:
    print(f"\n{lvlm.name}: {len(data)} samples in batches of {size}, median of {repeats} (min)")
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    memory: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for repeat in range(repeats + 1):
        for name, variant in VARIANTS.items():
            took, above = peak(lambda variant=variant: variant(lvlm, data, size))
            if repeat:  # the first round warms up
                seconds[name].append(took)
                memory[name].append(above)
    base, least = statistics.median(seconds["(a) plain forward"]), min(seconds["(a) plain forward"])
    for name in VARIANTS:
        median, best = statistics.median(seconds[name]), min(seconds[name])
        print(
            f"  {name:34s} {median:7.2f} s   x {median / base:.3f} (x {best / least:.3f})"
            f"   peak + {statistics.median(memory[name]):6.0f} MiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, fp32")

    demo = svl.load(PACKAGE / "demo" / "demo_lvlm", name="demo LVLM, width 128, 16 layers, T about 80")
    data = svl.read_samples(PACKAGE / "demo" / "data" / "calibration.parquet")
    bench(demo, data, 8, 3 * args.repeats)

    large, example = Large().lvlm(), data.samples[0]
    bench(large, Samples("synthetic", (example,) * 4), 1, args.repeats)

    print("\nPeak memory of (c) on the large model against the number of samples:")
    for n in (2, 4, 8, 16):
        _, above = peak(lambda n=n: measured("cosine", "attention")(large, Samples("synthetic", (example,) * n), 1))
        print(f"  {n:3d} samples: + {above:.0f} MiB")


if __name__ == "__main__":
    main()
