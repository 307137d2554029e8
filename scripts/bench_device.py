"""Short-LVLM on an accelerator, at real size: one command, one table.

    python scripts/bench_device.py OUT [--pieces a,b,c,d,e,f,g,h,i] [--disk FOLDER] [--repeats 3] [--small]

Models have the shape of LLaVA-1.5-7B and 13B (576 visual tokens), random bf16 weights made on the device, and a
processor made on the spot: speed and memory depend on neither. Nothing is fetched, and nothing but torch, transformers,
safetensors, numpy, pillow and svl is needed; int8 needs torchao, and `h` needs pytest.

Each piece writes OUT/<piece>.json when it is finished; run again, and finished pieces are read instead. The table is
printed and written to OUT/table.txt. `--small` takes tiny shapes, for a trial on a CPU.

(a) calibration against the plain forward pass; (b) compensations; (c) dense and pruned models of 7B and 13B: prefill,
decode, samples per second (13B: i); (d) int8, FastV and both; (e) plans evaluated one by one and in lock step;
(f) answers and plans on the device against the CPU; (g) a checkpoint from disk to disk, and whether it computes what
was scored; (h) the tests marked `gpu`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import itertools
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from device_table import lines_of
from PIL import Image
from random_llava import SHAPES, SMALL, WORDS, Shape, random_llava
from transformers.utils import logging

import svl
from svl.calibration.hooks import run_decoder
from svl.compensation.come import Come
from svl.compensation.ghosted import Ghosted
from svl.compensation.linear import Linear
from svl.compensation.linear_cosine import LinearCosine
from svl.compensation.linearpatch import LinearPatch
from svl.compensation.magnitude import Magnitude
from svl.compensation.mean_update import MeanUpdate
from svl.compensation.merge import Merge
from svl.compensation.refit import Refit
from svl.compensation.subspace import Subspace
from svl.compensation.subspace_fit import SubspaceFit
from svl.core.plan import layers_to_remove
from svl.data.samples import Sample, Samples
from svl.evaluation.efficiency import measure_efficiency
from svl.evaluation.lock_step import LockStep
from svl.evaluation.settings import EfficiencySettings
from svl.evaluation.shared_prefill import SharedPrefill
from svl.models.sample_inputs import encode_samples
from svl.quantization.torchao import Torchao
from svl.selectors.tis import Tis
from svl.strategies.cosine import Cosine
from svl.visual_tokens.fastv import Fastv

ROOT = Path(__file__).parents[1]
# Speed-up of samples/s in the paper, by the size of the model and the layers removed (of 32 and 40).
PAPER = {"7b": {3: 4.95 / 4.75, 6: 5.46 / 4.75, 10: 5.88 / 4.75}}


@dataclass
class Bench:
    """What the pieces work with.

    Attributes:
        device: where models are.
        shapes: by size, "7b" and "13b".
        disk: folder for checkpoints of piece `g`.
        samples: of the calibration set.
        repeats: of every measurement; the median counts.
        new_tokens: of an answer whose speed is measured.
        plans: how many are evaluated together.
    """

    device: torch.device
    shapes: dict[str, Shape]
    disk: Path
    samples: int = 64
    repeats: int = 3
    new_tokens: int = 32
    plans: int = 12
    batch_size: int = 8
    loaded: dict[str, svl.Lvlm] = field(default_factory=dict)

    def model(self, size: str) -> svl.Lvlm:
        """The random model of a size; the one before it is let go."""
        if size not in self.loaded:
            self.loaded.clear()
            free_memory()
            self.loaded[size] = random_llava(self.shapes[size], self.device)
        return self.loaded[size]

    @cached_property
    def data(self) -> Samples:
        """Pictures of noise, each with 62 words: 640 tokens for LLaVA-1.5."""
        noise = np.random.default_rng(0)
        words = random.Random(0)
        samples = []
        for row in range(self.samples):
            png = BytesIO()
            Image.fromarray(noise.integers(0, 256, (336, 336, 3), np.uint8)).save(png, "png")
            samples.append(Sample(row, " ".join(words.choices(WORDS, k=62)), (png.getvalue(),), words.choice(WORDS)))
        return Samples("made up", tuple(samples))

    def seconds(self, work: Callable[[], Any], rounds: int | None = None) -> dict[str, Any]:
        """Median seconds of a piece of work after one round that does not count, and its peak of memory, in GB, above
        what was there before (None where torch does not count it). Rounds are `repeats` unless given."""
        work()
        taken = []
        with self.peak() as peak:
            for _ in range(rounds or self.repeats):
                began = self.now()
                work()
                taken.append(self.now() - began)
        return {"seconds": statistics.median(taken), "low": min(taken), "high": max(taken), **peak}

    def now(self) -> float:
        """The clock, when the device has done what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def peak(self) -> Iterator[dict[str, float | None]]:
        """The peak of the device's memory within the block, above what was taken before."""
        found: dict[str, float | None] = {"peak_gb": None}
        if self.device.type == "cuda":
            free_memory()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        yield found
        if self.device.type == "cuda":
            found["peak_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9


def free_memory() -> None:
    """Give back what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------- the pieces


@dataclass(frozen=True)
class Encoded(svl.Lvlm):
    """A model whose inputs were made before: the clock then shows what the device does."""

    batches: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    @property
    def takes_images(self) -> bool:
        """No: samples come as their texts alone, and pictures with the inputs."""
        return False

    def encode(self, texts: list[str], images: Any = None, videos: Any = None) -> dict[str, torch.Tensor]:
        """The inputs of the batch that starts with this text."""
        return self.batches[texts[0]]


def calibration(bench: Bench) -> dict[str, Any]:
    """(a) What calibration costs above the forward pass that it rides on; preparing inputs is in none of them."""
    lvlm = bench.model("7b")
    batches = bench.data.batches(bench.batch_size)
    inputs = {batch[0].prompt: encode_samples(lvlm, batch)[0] for batch in batches}
    ready = Encoded(lvlm.model, lvlm.tokenizer, lvlm.anatomy, lvlm.name, inputs)

    @torch.inference_mode()
    def plain() -> None:
        for batch in batches:
            run_decoder(ready, encode_samples(ready, batch)[0])

    def measured(*names: str) -> None:
        svl.calibrate(ready, bench.data, statistics=names, batch_size=bench.batch_size)

    found = {
        "plain forward": bench.seconds(plain),
        "svl, cosine": bench.seconds(lambda: measured("cosine")),
        "svl, cosine and TIS": bench.seconds(lambda: measured("cosine", "attention")),
        "eager, all states and maps": bench.seconds(lambda: eager_maps(ready, batches)),
    }
    base = found["plain forward"]["seconds"]
    for row in found.values():
        row["times_forward"] = row["seconds"] / base
    return {"rows": found, "tokens": next(iter(inputs.values()))["input_ids"].shape[1], "samples": len(bench.data)}


@torch.inference_mode()
def eager_maps(lvlm: svl.Lvlm, batches: list[tuple[Sample, ...]]) -> None:
    """What one would write without svl."""
    lvlm.model.set_attn_implementation({"text_config": "eager"})
    for batch in batches:
        inputs, present, visual = encode_samples(lvlm, batch)
        out = lvlm.model(**inputs, use_cache=False, output_hidden_states=True, output_attentions=True, logits_to_keep=1)
        states = out.hidden_states
        pairs = itertools.pairwise(states)
        cosines = [torch.cosine_similarity(a.float(), b.float(), dim=-1) for a, b in pairs]
        modality = torch.stack([visual & present, ~visual & present], 1).float()
        means = [attention.float().mean(1) for attention in out.attentions]
        torch.stack(cosines).cpu(), [((modality @ m).cpu(), (modality @ m.mT).cpu()) for m in means]
        del out, states, means
    lvlm.model.set_attn_implementation({"text_config": "sdpa"})


COMPENSATIONS: dict[str, Any] = {
    "subspace (SCP)": Subspace,
    "subspace_guarded": lambda: Subspace(guard=25),
    "subspace_fit": SubspaceFit,
    "mean_update": MeanUpdate,
    "magnitude": Magnitude,
    "merge": Merge,
    "come": Come,
    "linear": Linear,
    "linearpatch": LinearPatch,
    "ghosted": Ghosted,
    "linear_cosine": LinearCosine,
    "refit, gaps": lambda: Refit(layers="gaps"),
    "refit": Refit,
}


def compensation(bench: Bench) -> dict[str, Any]:
    """(b) Seconds and memory of every compensation, after 20 % of the layers."""
    lvlm = bench.model("7b")
    stats = svl.calibrate(lvlm, bench.data, statistics=("cosine", "attention"), batch_size=bench.batch_size)
    plan = Cosine().plan(svl.select(stats, Tis()), layers_to_remove(0.2, lvlm.anatomy.n_layers))
    hidden = svl.Activations(lvlm, bench.data, svl.select(stats, Tis()), batch_size=bench.batch_size)
    found: dict[str, Any] = {"removed": list(plan.removed)}
    for name, made in COMPENSATIONS.items():
        with bench.peak() as peak:
            began = bench.now()
            made().fit(hidden, plan)
            taken = bench.now() - began
        found[name] = {"seconds": taken, **peak}
    return found


def speed(bench: Bench, sizes: Sequence[str] = ("7b",)) -> dict[str, Any]:
    """(c) Speed of pruned models beside dense ones, in the same rounds.

    The paper's speed is samples/s over benchmarks with answers of a few tokens; here: one picture, a question, four
    tokens, one sample at a time, preparation of the picture included.
    """
    found: dict[str, Any] = {}
    for size in sizes:
        shape, lvlm = bench.shapes[size], bench.model(size)
        kinds = (("short", 1, 4), ("batch 16", 16, bench.new_tokens))
        for ratio in shape.ratios:
            n = layers_to_remove(ratio, shape.layers)
            pruned = svl.apply(lvlm, middle(shape.layers, n))
            for name, batch_size, new_tokens in kinds:
                repeats = 4 * bench.repeats if new_tokens == 4 else bench.repeats  # the shorter, the noisier
                settings = EfficiencySettings(batch_size, new_tokens, warmup=1, repeats=repeats)
                measured = measure_efficiency(lvlm, pruned, bench.data.samples[0], settings)
                found[f"{size}, {n} of {shape.layers}, {name}"] = {**measured, "paper": PAPER.get(size, {}).get(n)}
    return found


def speed_of_13b(bench: Bench) -> dict[str, Any]:
    """(i) The same of 13B."""
    return speed(bench, ("13b",))


def middle(layers: int, n: int) -> svl.Plan:
    """A plan without `n` layers around the middle: which ones go makes no difference to speed."""
    start = (layers - n) // 2
    return svl.Plan(layers, tuple(range(start, start + n)))


def combined(bench: Bench) -> dict[str, Any]:
    """(d) int8 and FastV on top of 20 %, against the dense model."""
    lvlm = bench.model("7b")
    layers = lvlm.anatomy.n_layers
    pruned = svl.apply(lvlm, middle(layers, layers_to_remove(0.25, layers)))
    variants: dict[str, Callable[[], svl.Lvlm]] = {
        "pruned": lambda: pruned,
        "pruned, FastV": lambda: Fastv().apply(pruned),
    }
    if importlib.util.find_spec("torchao"):
        variants["pruned, int8"] = lambda: Torchao().apply(pruned)
        variants["pruned, int8, FastV"] = lambda: Fastv().apply(Torchao().apply(pruned))
    found = {}
    for name, made in variants.items():
        for batch_size in (1, 16):
            settings = EfficiencySettings(batch_size, bench.new_tokens, warmup=1, repeats=bench.repeats)
            found[f"{name}, batch {batch_size}"] = measure_efficiency(lvlm, made(), bench.data.samples[0], settings)
    return found


BATCH = 4  # prompts that plans answer at once


def lock_step(bench: Bench) -> dict[str, Any]:
    """(e) Uncompensated plans answer a batch: one by one, with the prompt's start shared, in lock step."""
    lvlm = bench.model("7b")
    layers = lvlm.anatomy.n_layers
    choice = random.Random(0)
    plans = [
        svl.Plan(layers, tuple(sorted(choice.sample(range(2, layers - 1), 1 + k * layers // 40))))
        for k in range(bench.plans)
    ]
    pruned = [svl.apply(lvlm, plan) for plan in plans]
    inputs, *_ = encode_samples(lvlm, bench.data.samples[:BATCH])
    found: dict[str, Any] = {"plans": len(plans), "batch_size": BATCH}
    for new_tokens in (4, bench.new_tokens):
        settings = copy.deepcopy(lvlm.model.generation_config)
        settings.update(do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0)
        ways = {
            "one by one": lambda settings=settings: [
                p.model.generate(**inputs, generation_config=settings) for p in pruned
            ],
            "shared prompt": lambda settings=settings: SharedPrefill(pruned).generate(inputs, settings),
            "lock step": lambda settings=settings: LockStep(lvlm, pruned, plans).generate(inputs, settings),
        }
        with torch.inference_mode():
            # long answers, of a dozen models, take long enough to be timed once
            rounds = bench.repeats if new_tokens == 4 else 1
            rows = {name: bench.seconds(work, rounds) for name, work in ways.items()}
            answers = {name: work() for name, work in ways.items()}
            again = ways["one by one"]()
        for name, row in rows.items():
            row["equal_answers"] = share_equal(answers[name], again)
            row["times"] = rows["one by one"]["seconds"] / row["seconds"]
        found[f"{new_tokens} tokens"] = rows
    return found


def share_equal(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """Share of the answers, rows of every model's tokens, that are the same."""
    return statistics.mean(float((a == b).all(1).float().mean()) for a, b in zip(some, others, strict=True))


def agreement(bench: Bench) -> dict[str, Any]:
    """(f) The bundled model's answers and plans on the device, against the CPU's."""
    from svl.demo import scenes

    folder = ROOT / "svl" / "demo" / "demo_lvlm"
    samples = []
    stream = scenes.stream(1, "test", {"existence": 2, "attribute": 2, "choice": 2})
    for scene, questions in stream:
        png = BytesIO()
        Image.fromarray(scenes.render(scene)).save(png, "png")
        samples += [Sample(len(samples) + i, q.prompt, (png.getvalue(),), q.answer) for i, q in enumerate(questions)]
        if len(samples) >= 96:
            break
    data = Samples("scenes", tuple(samples))
    places = {"CPU, fp32": ("cpu", "float32"), "CPU, bf16": ("cpu", "bfloat16")}
    places |= {"device, fp32": (str(bench.device), "float32"), "device, bf16": (str(bench.device), "bfloat16")}
    answers, plans, in_step = {}, {}, {}
    for name, (device, dtype) in places.items():
        lvlm = svl.load(folder, device=device, dtype=dtype)
        stats = svl.select(svl.calibrate(lvlm, data, statistics=("cosine", "attention")), Tis())
        plans[name] = [Cosine().plan(stats, n).removed for n in range(1, 9)]
        pruned = svl.apply(lvlm, Cosine().plan(stats, 4))
        answers[name] = [text for batch in data.batches(32) for text in short_answers(pruned, batch)]
        removals = [Cosine().plan(stats, n) for n in (1, 2, 3, 4, 6, 8)]
        in_step[name] = lock_step_agreement(lvlm, removals, data)
    first = "CPU, fp32"
    return {
        name: {
            "equal_answers": statistics.mean(a == b for a, b in zip(answers[name], answers[first], strict=True)),
            "right": statistics.mean(a == s.answer for a, s in zip(answers[name], data, strict=True)),
            "equal_plans": sum(a == b for a, b in zip(plans[name], plans[first], strict=True)),
            "plans": len(plans[first]),
            "lock_step": in_step[name],
        }
        for name in places
    }


@torch.inference_mode()
def lock_step_agreement(lvlm: svl.Lvlm, plans: Sequence[svl.Plan], data: Samples) -> float:
    """Share of the answers of plans in lock step that are those of the plans one by one."""
    models = [svl.apply(lvlm, plan) for plan in plans]
    settings = copy.deepcopy(lvlm.model.generation_config)
    settings.update(do_sample=False, max_new_tokens=8)
    shares = []
    for batch in data.batches(32):
        inputs, *_ = encode_samples(lvlm, batch)
        start = inputs["input_ids"].shape[1]
        ways = (
            [m.model.generate(**inputs, generation_config=settings) for m in models],
            LockStep(lvlm, models, list(plans)).generate(inputs, settings),
        )
        texts = [[lvlm.tokenizer.batch_decode(t[:, start:], skip_special_tokens=True) for t in way] for way in ways]
        shares += [a == b for one, other in zip(*texts, strict=True) for a, b in zip(one, other, strict=True)]
    return statistics.mean(shares)


@torch.inference_mode()
def short_answers(lvlm: svl.Lvlm, batch: tuple[Sample, ...]) -> list[str]:
    """Greedy answers."""
    inputs, *_ = encode_samples(lvlm, batch)
    model: Any = lvlm.model
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return [
        t.strip()
        for t in lvlm.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ]


def checkpoint(bench: Bench) -> dict[str, Any]:
    """(g) A checkpoint from disk to disk, and the logits of the exported one against the model that was scored."""
    folder = Path(tempfile.mkdtemp(dir=bench.disk))
    source, copied, out = folder / "source", folder / "copy", folder / "pruned"
    try:
        dense = bench.model("7b")
        dense.model.save_pretrained(source, max_shard_size="5GB")
        dense.processor.save_pretrained(source)
        bench.loaded.clear()
        del dense
        free_memory()
        found: dict[str, Any] = {"bytes": sum(file.stat().st_size for file in source.iterdir())}
        clock = [bench.now()]

        def lap(name: str) -> None:
            clock.append(bench.now())
            found[name] = clock[-1] - clock[-2]

        shutil.copytree(source, copied)
        lap("copy")
        lvlm = svl.load(source, device=str(bench.device))
        lap("load")
        shutil.rmtree(copied)
        clock.append(bench.now())
        stats = svl.calibrate(lvlm, bench.data, statistics=("cosine", "attention"), batch_size=bench.batch_size)
        lap("calibrate")
        plan = Cosine().plan(svl.select(stats, Tis()), layers_to_remove(0.2, lvlm.anatomy.n_layers))
        lap("plan")
        svl.save(source, plan, out)
        lap("export")
        taken = sum(found[name] for name in ("load", "calibrate", "plan", "export"))
        found["times_load_and_copy"] = taken / (found["load"] + found["copy"])
        shutil.rmtree(out)
        patch = Refit(layers="gaps").fit(svl.Activations(lvlm, bench.data, stats, bench.batch_size), plan)
        clock.append(bench.now())
        svl.save(source, plan, out, patch)
        lap("export, refitted")
        inputs, *_ = encode_samples(lvlm, bench.data.samples[:2])
        with torch.inference_mode():
            scored = svl.apply(lvlm, plan, patch).model(**inputs).logits
            again = svl.load(out, device=str(bench.device)).model(**inputs).logits
        found["logits_equal"] = bool(torch.equal(scored, again))
        found["largest_difference"] = float((scored.float() - again.float()).abs().max())
        return found
    finally:
        bench.loaded.clear()
        shutil.rmtree(folder, ignore_errors=True)


def tests(bench: Bench) -> dict[str, Any]:
    """(h) The tests that need an accelerator."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return {"status": done.returncode, "summary": (done.stdout + done.stderr).strip().splitlines()[-15:]}


PIECES = {
    "a": calibration,
    "b": compensation,
    "c": speed,
    "d": combined,
    "e": lock_step,
    "f": agreement,
    "g": checkpoint,
    "h": tests,
    "i": speed_of_13b,
}


def machine(bench: Bench) -> str:
    """What everything was measured on."""
    import transformers

    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"


def run_piece(bench: Bench, piece: str, out: Path) -> list[str]:
    """Measure a piece, unless its file is there; its part of the table."""
    file = out / f"{piece}.json"
    if not file.exists():
        began = time.perf_counter()
        try:
            found = PIECES[piece](bench)
        except Exception as error:  # noqa: BLE001 (the other pieces go on; the next run tries this one again)
            print(traceback.format_exc(), flush=True)
            return [f"({piece}) failed: {type(error).__name__}: {error}"]
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"took": time.perf_counter() - began, "found": found}, indent=1))
        partial.rename(file)
    stored = json.loads(file.read_text())
    title = (PIECES[piece].__doc__ or "").splitlines()[0]
    return [f"{title} [{stored['took']:.0f} s]", *lines_of(piece, stored["found"])]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pieces", default=",".join(PIECES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    logging.set_verbosity_error()
    bench = Bench(torch.device(args.device), SMALL if args.small else SHAPES, args.disk, repeats=args.repeats)
    if args.small:
        bench.samples, bench.repeats, bench.new_tokens, bench.plans = 8, 1, 6, 3
    args.out.mkdir(parents=True, exist_ok=True)
    table = [machine(bench)]
    for piece in args.pieces.split(","):
        lines = run_piece(bench, piece, args.out)
        print("\n".join(lines), flush=True)
        table += ["", *lines]
        (args.out / "table.txt").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
