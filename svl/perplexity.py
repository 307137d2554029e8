"""Score a text model (or the language side of an LVLM) on running text: how well it predicts every next token.

Tasks say `output_type: perplexity` in their YAML and name a local file with a `text` column. lmms-eval has none,
so this is our own: one forward pass per batch, no generation, fp32 losses. Each sample is read on its own, without a
chat template; its first token has no prediction.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from svl import benchmarks
from svl.core import SvlError, one_of
from svl.data import read_samples
from svl.loading import Lvlm
from svl.results import spread

METRICS = ("loss", "perplexity", "bits_per_byte")
TOKENS = 2048  # whose logits are computed at once


@torch.inference_mode()
def evaluate(
    lvlm: Lvlm,
    task: str,
    *,
    include_path: str | None,
    metric: str,
    limit: float | None,
    batch_size: int,
    folder: Path,
    describe: str = "",
) -> dict[str, Any]:
    """Score `lvlm` on the texts of `task`.

    Arguments and result are those of `svl.evaluate.evaluate`. Metrics: `loss`, nats per token over all tokens of the
    task; `perplexity`, its exponential; `bits_per_byte`, bits per byte of the predicted text, which compares models of
    different vocabularies; all None if a loss is not finite. Standard errors take samples as independent. In
    `samples.jsonl`, `score` is a sample's mean loss and `part` what it adds to the task's.

    Raises:
        SvlError: if there is no such task, metric or data, or a text has fewer than two tokens.
    """
    one_of(f"metric of task '{task}'", metric, METRICS)
    (texts,) = benchmarks.data_files(benchmarks.find(task, include_path), benchmarks.settings(task, include_path))
    examples = read_samples(texts).items
    if limit is not None:
        examples = examples[: int(limit) if limit >= 1 else math.ceil(limit * len(examples))]
    began, losses, counts, sizes = time.perf_counter(), [], [], []
    for start in tqdm(range(0, len(examples), batch_size), desc=describe or task, unit="batch", disable=None):
        batch = examples[start : start + batch_size]
        inputs = lvlm.encode([e.prompt for e in batch])
        output = lvlm.model(**inputs, use_cache=False)
        for b, example in enumerate(batch):
            there = inputs["attention_mask"][b].bool()
            tokens, logits = inputs["input_ids"][b][there], output.logits[b][there]
            if len(tokens) < 2:
                raise SvlError(f"task '{task}', row {example.row}: a text of fewer than two tokens predicts nothing")
            pairs = zip(logits[:-1].split(TOKENS), tokens[1:].split(TOKENS), strict=True)
            losses.append(sum(float(F.cross_entropy(z.float(), y, reduction="sum")) for z, y in pairs))
            counts.append(len(tokens) - 1)
            sizes.append(len(lvlm.tokenizer.decode(tokens[1:]).encode()))
    seconds, total = time.perf_counter() - began, sum(counts)
    defined = all(map(math.isfinite, losses))  # else the model overflows somewhere, and has no loss
    loss = math.fsum(losses) / total if defined else math.nan
    # the error of a ratio of sums (delta method): what samples add, beyond their share of tokens
    parts = [(x - loss * n) / total for x, n in zip(losses, counts, strict=True)]
    error = spread(parts, range(len(parts)), [0] * len(parts))
    scale = total / sum(sizes) / math.log(2)
    metrics: dict[str, dict[str, float | None]] = {name: {"value": None, "stderr": None} for name in METRICS}
    if defined:
        metrics = {
            "loss": {"value": loss, "stderr": error},
            "perplexity": {"value": math.exp(loss), "stderr": error and error * math.exp(loss)},
            "bits_per_byte": {"value": loss * scale, "stderr": error and error * scale},
        }
    with open(folder / "samples.jsonl", "w") as file:
        for example, x, n in zip(examples, losses, counts, strict=True):
            row = {"doc_id": example.row, "question": example.prompt[:80], "target": "", "prediction": ""}
            score, part = (x / n, x / total) if math.isfinite(x) else (None, None)
            row |= {"score": score, "part": part, "unit": example.row, "stratum": ""}
            file.write(json.dumps(row) + "\n")
    return {
        "task": task,
        "metric": metric,
        "n": len(examples),
        "tokens": total,
        "higher_is_better": False,
        "metrics": metrics,
        "seconds": round(seconds, 3),
        "samples_per_second": round(len(examples) / seconds, 3),
        "device": lvlm.place(batch_size),
        "limit": limit,
    }
