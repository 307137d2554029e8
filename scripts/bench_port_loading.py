"""How much memory loading a port's checkpoint takes, as a multiple of the checkpoint.

    python scripts/bench_port_loading.py MODEL FOLDER [--layers N] [--format safetensors|bin] [--shard GB] [--keep]

Writes a random checkpoint of the full-size MODEL (in bf16, shard by shard, its decoder cut to N layers) to the new
folder FOLDER, loads it in another process as svl does, reads every weight once, and removes it. Memory is the
high-water mark of resident memory, mapped files included, above that of the interpreter with its libraries. Where
memory is short, the system drops mapped pages before that; so what is not backed by files is given, too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

# what the original config.json says beyond the defaults of the port's config
MODELS = {
    "qwen_vl": {"model_type": "qwen", "torch_dtype": "bfloat16"},
    "mplug_owl2": {"model_type": "mplug_owl2", "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5},
}
LOAD = """
import re, sys, time
import torch
import svl
from svl.models.loading import read_model_config
from svl.models.transformers_internals import empty_model

def memory(field):
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

config, auto = read_model_config(sys.argv[1])
import safetensors.torch  # noqa
empty_model(auto, config, torch.bfloat16, shapes_only=True)  # imports what loading does
base, own, began = memory("VmHWM"), memory("RssAnon"), time.perf_counter()
model = auto.from_pretrained(sys.argv[1], dtype="auto").eval()
seconds = time.perf_counter() - began
with torch.inference_mode():
    weights = model.state_dict().values()
    for p in weights:
        p.view(-1)[:: 1024].sum()
size = sum(p.numel() * p.element_size() for p in weights)
print(base, memory("VmHWM") - base, memory("RssAnon") - own, seconds, size)
"""


def shapes(config: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of the model that a config describes."""
    from svl.models.loading import read_model_config
    from svl.models.transformers_internals import empty_model

    described, auto = read_model_config(config)
    model = empty_model(auto, described, torch.bfloat16, shapes_only=True)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def shards(sizes: dict[str, tuple[int, ...]], limit: float) -> Iterator[list[str]]:
    """Names in order, in groups of at most `limit` bytes."""
    group, used = [], 0
    for name, shape in sizes.items():
        size = 2 * torch.Size(shape).numel()
        if group and used + size > limit:
            yield group
            group, used = [], 0
        group.append(name)
        used += size
    yield group


def write(folder: Path, kind: str, limit: float) -> int:
    """The weights of the model of folder/config.json; bytes."""
    from safetensors.torch import save_file

    sizes, total = shapes(folder), 0
    groups, where = list(shards(sizes, limit)), {}
    noise = 0.02 * torch.randn(2**24, dtype=torch.float32).bfloat16()
    for number, names in enumerate(groups):
        tensors: dict[str, Tensor] = {}
        for name in names:
            n = torch.Size(sizes[name]).numel()
            tensors[name] = noise.repeat(-(-n // len(noise)))[:n].clone().view(sizes[name])  # no larger than it is
            total += 2 * n
        stem = "model" if kind == "safetensors" else "pytorch_model"
        file = f"{stem}-{number + 1:05}-of-{len(groups):05}.{kind}"
        where |= dict.fromkeys(names, file)
        if kind == "safetensors":
            save_file(tensors, folder / file, {"format": "pt"})
        else:
            torch.save(tensors, folder / file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return total


def measure(model: str, folder: Path, layers: int | None = None, kind: str = "safetensors", limit: float = 2e9,
            sizes: dict | None = None) -> dict[str, float]:  # fmt: skip
    """Bytes on disk and in memory, seconds, and peak: memory above the interpreter's, over bytes on disk.

    `anonymous` is what of the model is not backed by files in the end.
    """
    folder.mkdir(parents=True)
    config = {**MODELS[model], **({"num_hidden_layers": layers} if layers else {}), **(sizes or {})}
    (folder / "config.json").write_text(json.dumps(config))
    size = write(folder, kind, limit)
    out = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(out.stderr)
    base, peak, own, seconds, resident = map(float, out.stdout.split())
    return {"size": size, "base": base, "above": peak, "anonymous": own, "weights": resident, "seconds": seconds,
            "peak": peak / size}  # fmt: skip


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--format", default="safetensors", choices=("safetensors", "bin"))
    parser.add_argument("--shard", type=float, default=2)
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    began = time.perf_counter()
    try:
        found = measure(given.model, given.folder, given.layers, given.format, given.shard * 1e9)
    finally:
        if not given.keep:
            shutil.rmtree(given.folder, ignore_errors=True)
    print(
        f"{given.model}, {given.layers or 'all'} layers, {given.format}: {found['size'] / 1e9:.2f} GB on disk, loaded "
        f"in {found['seconds']:.1f} s, peak {found['above'] / 1e9:.2f} GB = {found['peak']:.3f} x above the "
        f"interpreter's {found['base'] / 1e9:.2f} GB, {found['anonymous'] / 1e9:.2f} GB not backed by files; "
        f"{time.perf_counter() - began:.0f} s in all"
    )


if __name__ == "__main__":
    main()
