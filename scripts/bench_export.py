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
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from svl import checkpoint, skeleton, surgery
from svl.checkpoint import Piece
from svl.core import Patch, Plan, Update

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
from svl import card, checkpoint, export, loading, skeleton, surgery
from svl.core import Plan
""",
    """
export.save(source, Plan.from_json(Path(plan).read_text()), out, surgery.load_patch(Path(patch)) if patch else None)
""",
)
MEMORY = (
    OURS[0],
    """
model = AutoModelForCausalLM.from_pretrained(source)
lvlm = loading.Lvlm(model, None, loading.find_anatomy(model))
surgery.apply(lvlm, Plan.from_json(Path(plan).read_text())).model.save_pretrained(out)
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
    model = skeleton.hollow(AutoModelForCausalLM, config, torch.bfloat16)

    def block(shape: torch.Size) -> list[torch.Tensor]:
        return [(torch.randn(shape) * 0.02).bfloat16()]

    pieces = [Piece(n, "BF16", tuple(p.shape), lambda s=p.shape: block(s)) for n, p in model.state_dict().items()]
    folder.mkdir(parents=True)
    checkpoint.write(folder, pieces, 5 * 10**9)
    model.config.save_pretrained(folder)


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


def copy(source: Path, target: Path) -> list[float]:
    """Seconds of `cp -r`; its memory is not worth a column."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    return [time.perf_counter() - began, 0, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--mergekit")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        source, plan, patch, model = (str(folder / n) for n in ("source", "plan.json", "patch", "model"))
        write_source(Path(source), args.width)
        chosen = Plan(LAYERS, REMOVED)
        Path(plan).write_text(chosen.to_json())
        low = Update(torch.randn(args.width, 4) * 0.02, torch.randn(4, args.width) * 0.02)
        surgery.save_patch(Patch({(i, "mlp"): low for i in chosen.kept}), Path(patch))
        child(sys.executable, OURS, args.threads, source, plan, model, "")
        stored = checkpoint.read(Path(model)).values()
        size, largest = sum(t.size for t in stored) / 2**20, max(t.size for t in stored if len(t.shape) > 1) / 2**20
        matrix = args.width * (11 * args.width // 4) * 2 / 2**20
        print(
            f"torch {torch.__version__}, {args.threads} threads; {size:.0f} MiB exported; largest tensor {largest:.0f} "
            f"MiB, largest matrix that is changed {matrix:.0f} MiB; median of {args.repeats} (min)"
        )
        variants = {
            "cp -r of the same bytes": lambda out: copy(Path(model), Path(out)),
            "svl-export": lambda out: child(sys.executable, OURS, args.threads, source, plan, out, ""),
            "svl-export, compensated": lambda out: child(sys.executable, OURS, args.threads, source, plan, out, patch),
            "load, prune, save_pretrained": lambda out: child(
                sys.executable, MEMORY, args.threads, source, plan, out, ""
            ),
        }
        if args.mergekit:
            variants["mergekit passthrough"] = lambda out: child(
                args.mergekit, MERGEKIT, args.threads, source, plan, out, ""
            )
        results: dict[str, list[list[float]]] = {name: [] for name in variants}
        for _ in range(args.repeats):
            for name, run in variants.items():
                os.sync()
                results[name].append(run(str(folder / "out")))
                if name == "mergekit passthrough":
                    check_same(Path(model), folder / "out")
                shutil.rmtree(folder / "out")
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
    a = checkpoint.read(ours)
    files = sorted(theirs.glob("*.safetensors"))
    b = {name: tensor for file in files for name, tensor in checkpoint.header(file).items()}
    if a.keys() != b.keys() or not all(torch.equal(a[n].read(), b[n].read()) for n in list(a)[::9]):
        raise RuntimeError("the exports differ")


if __name__ == "__main__":
    main()
