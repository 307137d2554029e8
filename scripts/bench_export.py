"""What exporting costs: time and peak memory, as ratios of one run.

    python scripts/bench_export.py FOLDER [--repeats 5] [--threads 1] [--width 2048] [--mergekit PYTHON]

On a random Llama in bf16 (12 layers, 3 of them removed) in FOLDER: `cp -r` of a folder of the very bytes that are
exported; svl-export without and with compensation (a rank-4 update of every kept layer's down_proj); loading with
transformers, pruning in memory and `save_pretrained`; mergekit's passthrough of the kept slices, if PYTHON is an
environment that has it. Every variant is a process of its own; they take turns, so that a noisy machine disturbs all
alike. Seconds are those of the work, without imports; memory is the resident set's high-water mark above what was
resident after imports (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from svl.checkpoints.safetensors_files import read_header, read_tensors
from svl.checkpoints.safetensors_writing import NewTensor, write_weights
from svl.core import Patch, Plan, Update
from svl.models.transformers_internals import empty_model
from svl.pruning import patch_file

LAYERS, REMOVED = 12, (4, 5, 8)
MEASURE = """
import json, re, sys, time
from pathlib import Path
def resident(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024
source, plan, out, patch = sys.argv[1:]
IMPORTS
import torch; torch.set_num_threads(THREADS)
Path("/proc/self/clear_refs").write_text("5")
before, began = resident("VmRSS"), time.perf_counter()
WORK
print(json.dumps([time.perf_counter() - began, resident("VmHWM") - before, resident("VmHWM")]))
"""
OURS = (
    """
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.llama import modeling_llama
from svl.checkpoints import export, new_checkpoint
from svl.core import Plan
from svl.models import anatomy, loading, lvlm
from svl.pruning import patch_file, surgery
""",
    """
export.save(source, Plan.from_json(Path(plan).read_text()), out, patch_file.load_patch(Path(patch)) if patch else None)
""",
)
MEMORY = (
    OURS[0],
    """
model = AutoModelForCausalLM.from_pretrained(source)
dense = lvlm.Lvlm(model, None, anatomy.find_anatomy(model))
surgery.apply(dense, Plan.from_json(Path(plan).read_text())).model.save_pretrained(out)
""",
)
MERGEKIT = (
    """
import yaml
from transformers.models.llama import modeling_llama
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
""",
    """
kept = json.loads(Path(plan).read_text())["kept"]
slices = [{"sources": [{"model": source, "layer_range": [i, i + 1]}]} for i in kept]
config = {"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"}
run_merge(MergeConfiguration.model_validate(config), out, MergeOptions(copy_tokenizer=False, lazy_unpickle=True))
""",
)


def write_source(folder: Path, width: int) -> None:
    """A random Llama in bf16."""
    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_attention_heads": width // 64}
    config = LlamaConfig(**sizes, num_hidden_layers=LAYERS, vocab_size=32000, architectures=["LlamaForCausalLM"])
    model = empty_model(AutoModelForCausalLM, config, torch.bfloat16)
    tensors = [NewTensor(n, "BF16", tuple(p.shape), partial(noise, p.shape)) for n, p in model.state_dict().items()]
    folder.mkdir(parents=True)
    write_weights(folder, tensors, 5 * 10**9)
    model.config.save_pretrained(folder)


def noise(shape: torch.Size) -> list[torch.Tensor]:
    """A random tensor, in one block."""
    return [(torch.randn(shape) * 0.02).bfloat16()]


def child(python: str, code: tuple[str, str], threads: int, *arguments: str) -> list[float]:
    """Seconds, MiB above the imports, MiB in all, of code in a process of its own."""
    text = MEASURE.replace("IMPORTS", code[0]).replace("WORK", code[1]).replace("THREADS", str(threads))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [python, "-c", text, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def copy(source: str, target: str) -> list[float]:
    """Seconds of `cp -r`; its memory is not worth a column."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    return [time.perf_counter() - began, 0, 0]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--mergekit")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        measure(Path(scratch), args)


def measure(folder: Path, args: argparse.Namespace) -> None:
    """All variants in turn, `repeats` times, and a table of them."""
    source, plan, patch, model = (str(folder / n) for n in ("source", "plan.json", "patch", "model"))
    write_source(Path(source), args.width)
    chosen = Plan(LAYERS, REMOVED)
    Path(plan).write_text(chosen.to_json())
    low = Update(torch.randn(args.width, 4) * 0.02, torch.randn(4, args.width) * 0.02)
    patch_file.save_patch(Patch({(i, "mlp"): low for i in chosen.kept}), Path(patch))

    def run(code: tuple[str, str], out: str, patch: str = "", python: str = sys.executable) -> list[float]:
        return child(python, code, args.threads, source, plan, out, patch)

    run(OURS, model)
    describe(Path(model), args)
    variants: dict[str, Callable[[str], list[float]]] = {
        "cp -r of the same bytes": partial(copy, model),
        "svl-export": partial(run, OURS),
        "svl-export, compensated": partial(run, OURS, patch=patch),
        "load, prune, save_pretrained": partial(run, MEMORY),
    }
    if args.mergekit:
        variants["mergekit passthrough"] = partial(run, MERGEKIT, python=args.mergekit)
    results: dict[str, list[list[float]]] = {name: [] for name in variants}
    for _ in range(args.repeats):
        for name, variant in variants.items():
            os.sync()
            results[name].append(variant(str(folder / "out")))
            if name == "mergekit passthrough":
                check_same(Path(model), folder / "out")
            shutil.rmtree(folder / "out")
    print_table(results)


def describe(model: Path, args: argparse.Namespace) -> None:
    """What is exported."""
    stored = read_tensors(model).values()
    size, largest = sum(t.size for t in stored) / 2**20, max(t.size for t in stored if len(t.shape) > 1) / 2**20
    matrix = args.width * (11 * args.width // 4) * 2 / 2**20
    print(
        f"torch {torch.__version__}, {args.threads} threads; {size:.0f} MiB exported; largest tensor {largest:.0f} "
        f"MiB, largest matrix that is changed {matrix:.0f} MiB; median of {args.repeats} (min)"
    )


def print_table(results: dict[str, list[list[float]]]) -> None:
    """Seconds and memory of every variant, and how many times as long as copying it takes."""
    base = [row[0] for row in results["cp -r of the same bytes"]]
    for name, rows in results.items():
        seconds, above, whole = zip(*rows, strict=True)
        median, least = statistics.median(seconds), min(seconds)
        print(
            f"{name:30s} {median:7.2f} s  x {median / statistics.median(base):6.2f} (x {least / min(base):6.2f})   "
            f"+ {statistics.median(above):6.0f} MiB, {statistics.median(whole):6.0f} MiB in all"
        )


def check_same(ours: Path, theirs: Path) -> None:
    """Raise unless two exports hold the same tensors."""
    a = read_tensors(ours)
    files = sorted(theirs.glob("*.safetensors"))
    b = {name: tensor for file in files for name, tensor in read_header(file).items()}
    if a.keys() != b.keys() or not all(torch.equal(a[n].read(), b[n].read()) for n in list(a)[::9]):
        raise RuntimeError("the exports differ")


if __name__ == "__main__":
    main()
