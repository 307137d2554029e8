"""A model that does not fit in memory: calibrated layer by layer from disk, exported without a quarter of its layers.

    python scripts/bench_large.py FOLDER [--texts 3] [--threads 2] [--keep]

Writes a random checkpoint in the shape of LLaVA-1.5-13B in bf16 (26 GB, shard by shard, never holding more than 64 MB
of it) into FOLDER, measures what Short-LVLM needs on one picture (576 visual tokens) and a few short texts, removes
10 of 40 layers, exports, checks the result, and deletes everything. Peaks are the resident set's high-water marks
(Linux), which count pages of files that are mapped, too; "own" is the part that is not backed by a file, sampled
every 50 ms.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.utils import logging

from svl.calibration import offload
from svl.calibration.calibrate import calibrate, select
from svl.checkpoints import export
from svl.checkpoints.safetensors_writing import NewTensor, write_weights
from svl.checkpoints.skeleton import Skeleton, read_skeleton
from svl.core import Plan
from svl.data.samples import Sample, Samples
from svl.models.transformers_internals import empty_model
from svl.selectors.tis import Tis
from svl.strategies.cosine import Cosine

NOISE = (torch.randn(2**25, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()  # 64 MB, used all over
IMAGE, VISUAL = 32000, 576


class Inputs(offload.Offloaded):
    """The offloaded model with made-up tokens: no tokenizer is needed."""

    def prompt(self, text: str, image: bool, answer: str | None = None) -> str:
        return text

    def encode(self, texts: list[str], images: list | None = None) -> dict[str, torch.Tensor]:
        words = torch.stack([torch.arange(16) * 7 + sum(map(ord, text)) % 1000 for text in texts])
        if not images:
            return {"input_ids": words, "attention_mask": torch.ones_like(words)}
        ids = torch.cat([torch.full((len(texts), VISUAL), IMAGE), words], 1)
        pixels = torch.linspace(-1, 1, 3 * 336 * 336).view(1, 3, 336, 336).expand(len(texts), -1, -1, -1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(torch.bfloat16)}


def config() -> LlavaConfig:
    """LLaVA-1.5-13B: CLIP ViT-L/14 at 336 pixels, Vicuna-13B."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32064,
        max_position_embeddings=4096,
    )  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=VISUAL)


def write_source(folder: Path) -> int:
    """The random checkpoint; its bytes."""
    model = empty_model(AutoModelForImageTextToText, config(), torch.bfloat16)
    tensors = []
    for number, (name, p) in enumerate(model.state_dict().items()):
        if p.is_floating_point():
            blocks = partial(noise_blocks, p.numel(), 977 * number, is_norm=p.ndim == 1)
            tensors.append(NewTensor(name, "BF16", tuple(p.shape), blocks))
    total = sum(tensor.size for tensor in tensors)
    export.check_disk_space(folder, int(1.8 * total))
    folder.mkdir(parents=True)
    write_weights(folder, tensors, 5 * 10**9)
    model.config.save_pretrained(folder)
    return total


def noise_blocks(size: int, start: int, is_norm: bool) -> Iterator[torch.Tensor]:
    """So many random numbers, around 1 for a norm, otherwise around 0."""
    while size:
        part = NOISE[start : start + size]
        yield part + 1 if is_norm else part
        size, start = size - len(part), 0


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024


@contextmanager
def stage(name: str, bytes_read: int = 0) -> Iterator[None]:
    """Time and peak memory of a block, printed."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the high-water mark
    own, done = [resident("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            own.append(resident("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began = time.perf_counter()
    yield
    took = time.perf_counter() - began
    done.set()
    watcher.join()
    speed = f", {bytes_read / took / 1e6:.0f} MB/s" if bytes_read else ""
    print(
        f"{name:34s} {took:7.1f} s{speed}; peak {resident('VmHWM') / 1e9:.2f} GB, own {max(own) / 1e9:.2f} GB",
        flush=True,
    )


def plan_removal(lvlm: Inputs, texts: int, size: int) -> Plan:
    """Which 10 layers go, after calibration on a black picture and so many texts; `size` bytes are read."""
    png = BytesIO()
    Image.new("RGB", (3, 3)).save(png, "png")
    samples = [Sample(0, "What is it?", (png.getvalue(),)), *(Sample(i, f"Text {i}") for i in range(1, texts + 1))]
    began = time.perf_counter()

    def show(items: Iterable[int], what: str, n: int) -> Iterator[int]:
        for i in items:
            print(f"  layer {i} of {n}, {time.perf_counter() - began:.0f} s", flush=True)
            yield i

    with stage(f"calibrate, {len(samples)} samples, all layers", size):
        statistics = ["cosine", "attention"]
        stats = calibrate(lvlm, Samples("made up", tuple(samples)), statistics=statistics, batch_size=1, show=show)
        return Cosine().plan(select(stats, Tis()), 10)


def check(out: Path, dense: Skeleton, plan: Plan) -> None:
    """Compare every 40th tensor of an export with the source's, and print what was found."""
    pruned, wrong = read_skeleton(out), []
    for key, tensor in list(pruned.stored.items())[::40]:
        layer = pruned.layer(pruned.places[key].name)
        old = key if layer is None else key.replace(f".{layer}.", f".{plan.kept[layer]}.", 1)
        wrong += [] if torch.equal(tensor.read(), dense.stored[old].read()) else [key]
    depth = json.loads((out / "config.json").read_text())["text_config"]["num_hidden_layers"]
    written = sum(tensor.size for tensor in pruned.stored.values())
    print(f"  {written / 1e9:.1f} GB, {depth} layers, {len(pruned.stored)} tensors, wrong: {wrong}")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    source, out = args.folder / "source", args.folder / "pruned"
    total = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text()).group(1)) * 1024
    print(f"torch {torch.__version__}, {args.threads} threads, {total / 1e9:.1f} GB of memory in the machine")
    print(f"after imports: {resident('VmRSS') / 1e9:.2f} GB", flush=True)
    try:
        with stage("write the random checkpoint"):
            size = write_source(source)
        print(f"  {size / 1e9:.1f} GB in {len(list(source.glob('*.safetensors')))} shards")
        with stage("open it"):
            dense = read_skeleton(source)
            opened = offload.assemble_offloaded(dense, None, "random LLaVA-1.5-13B", "cpu")
            lvlm = Inputs(opened.model, None, opened.anatomy, opened.name, skeleton=dense)
        plan = plan_removal(lvlm, args.texts, size)
        print(f"  without layers {list(plan.removed)}")
        with stage("export without 10 of 40 layers", int(0.75 * size)):
            export.save(source, plan, out)
        with stage("check"):
            check(out, dense, plan)
    finally:
        if not args.keep:
            shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
