"""Score a text model (or the language side of an LVLM) on running text: how well it predicts every next token.

Tasks say `output_type: perplexity` in their YAML and name a local file with a `text` column. lmms-eval has none,
so this is our own: one forward pass per batch, no generation, fp32 losses. Each sample is read on its own, without a
chat template; its first token has no prediction.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from svl.core import SvlError, one_of
from svl.core.errors import explained, out_of_memory
from svl.data.sample_files import read_samples
from svl.evaluation import benchmarks
from svl.evaluation.score_statistics import Part, standard_error
from svl.evaluation.settings import TaskOptions, taken_by_limit
from svl.models.lvlm import Lvlm
from svl.models.positions import looked_up_positions
from svl.processes import all_or_none, gather_shares, gather_values, join_processes, my_share
from svl.text.progress import show_progress

if TYPE_CHECKING:
    from svl.data.samples import Sample

METRICS = ("loss", "perplexity", "bits_per_byte")
TOKENS = 2048  # whose logits are computed at once


@dataclass(frozen=True)
class TextLoss:
    """How well a model predicts one text.

    Attributes:
        loss: sum over its tokens but the first, in nats; not finite if the model overflows.
        tokens: how many are predicted.
        size: bytes of the predicted text.
    """

    loss: float
    tokens: int
    size: int


def evaluate_perplexity(lvlm: Lvlm, task: str, options: TaskOptions, folder: Path) -> dict[str, Any]:
    """Score `lvlm` on the texts of `task`.

    Arguments and result are those of `svl.evaluation.evaluate.evaluate`. Metrics: `loss`, nats per token over all
    tokens of the task; `perplexity`, its exponential; `bits_per_byte`, bits per byte of the predicted text, which
    compares models of different vocabularies; all None if a loss is not finite, and a perplexity that no float holds.
    Started by torchrun, every process reads its share of the batches, and all have the whole result.
    Standard errors take samples as independent. In `samples.jsonl`, `score` is a sample's mean loss and `part` what it
    adds to the task's metric (None where that is undefined).

    Raises:
        SvlError: if there is no such task, metric or data, a text has fewer than two tokens, the model fails on one
            (which it names), or memory ran out.
    """
    one_of(f"metric of task '{task}'", options.metric, METRICS)
    samples = limited_texts(task, options)
    join_processes()
    began = time.perf_counter()
    losses = text_losses(lvlm, task, samples, options)
    seconds = max(gather_values(time.perf_counter() - began))
    tokens = sum(text.tokens for text in losses)
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as file:
        for sample, text, part in zip(samples, losses, metric_parts(losses, options.metric), strict=True):
            file.write(json.dumps(_line(sample, text, part)) + "\n")
    return {
        "task": task,
        "metric": options.metric,
        "n": len(samples),
        "tokens": tokens,
        "higher_is_better": False,
        "metrics": loss_metrics(losses),
        "seconds": round(seconds, 3),
        "samples_per_second": round(len(samples) / seconds, 3),
        "device": lvlm.device_facts(options.batch_size),
        "limit": options.limit,
    }


def limited_texts(task: str, options: TaskOptions) -> Sequence[Sample]:
    """The texts of a task, as many as the limit takes."""
    source = benchmarks.find_task(task, options.include_path)
    settings = benchmarks.task_settings(task, options.include_path)
    (file,) = benchmarks.task_data_files(source, settings)
    samples = read_samples(file).samples
    return samples[: taken_by_limit(len(samples), options.limit)]


def text_losses(lvlm: Lvlm, task: str, samples: Sequence[Sample], options: TaskOptions) -> list[TextLoss]:
    """How well the model predicts each text, in their order; of processes of one run, each reads its share."""
    size = options.batch_size
    batches = [samples[start : start + size] for start in range(0, len(samples), size)]
    mine = my_share(len(batches))

    def read_share() -> list[list[TextLoss]]:
        return [batch_losses(lvlm, task, batches[k], size) for k in show_progress(mine, task, len(mine))]

    return list(chain.from_iterable(gather_shares(all_or_none(read_share), len(batches))))


@torch.inference_mode()
def batch_losses(lvlm: Lvlm, task: str, batch: Sequence[Sample], size: int) -> list[TextLoss]:
    """How well the model predicts the texts of one batch, which are at most `size`."""
    rows, losses = ", ".join(str(sample.row) for sample in batch), []
    with (
        out_of_memory(f"evaluation of task '{task}'", f"lower benchmark.batch_size (now {size})"),
        explained(f"task '{task}': documents [{rows}] do not go through the model"),
    ):
        inputs = lvlm.encode([sample.prompt for sample in batch])
        inputs = lvlm.with_answers(inputs, inputs["attention_mask"].sum(1).tolist())
        logits = lvlm.model(**inputs, **looked_up_positions(lvlm, inputs), use_cache=False).logits
        for b, sample in enumerate(batch):
            real = inputs["attention_mask"][b].bool()
            tokens = inputs["input_ids"][b][real]
            if len(tokens) < 2:
                raise SvlError(f"task '{task}', row {sample.row}: a text of fewer than two tokens predicts nothing")
            text = str(lvlm.tokenizer.decode(tokens[1:]))
            losses.append(TextLoss(_loss(logits[b][real], tokens), len(tokens) - 1, len(text.encode())))
    return losses


def _loss(logits: Tensor, tokens: Tensor) -> float:
    """Sum of the losses [nats] of all tokens [T] but the first, by logits [T, vocabulary]; in fp32."""
    pieces = zip(logits[:-1].split(TOKENS), tokens[1:].split(TOKENS), strict=True)
    return sum(float(F.cross_entropy(z.float(), y, reduction="sum")) for z, y in pieces)


def loss_metrics(losses: Sequence[TextLoss]) -> dict[str, dict[str, float | None]]:
    """Value and standard error of each metric; None if a loss, or this metric, is not finite: the model has none."""
    unknown = {"value": None, "stderr": None, "low": None, "high": None}
    if not all(math.isfinite(text.loss) for text in losses):
        return {name: dict(unknown) for name in METRICS}
    tokens = sum(text.tokens for text in losses)
    loss = math.fsum(text.loss for text in losses) / tokens
    # the error of a ratio of sums (delta method): what samples add, beyond their share of tokens
    error = standard_error(Part((text.loss - loss * text.tokens) / tokens, i) for i, text in enumerate(losses))
    per_byte = tokens / sum(text.size for text in losses) / math.log(2)
    perplexity = _exponential(loss)
    scales = {"loss": 1.0, "perplexity": perplexity, "bits_per_byte": per_byte}
    values = {"loss": loss, "perplexity": perplexity, "bits_per_byte": loss * per_byte}
    errors = {name: None if error is None else error * scale for name, scale in scales.items()}
    found = {name: {**unknown, "value": values[name], "stderr": errors[name]} for name in METRICS}
    return found if math.isfinite(perplexity) else found | {"perplexity": dict(unknown)}


def metric_parts(losses: Sequence[TextLoss], metric: str) -> list[float | None]:
    """What each text adds to a metric of all, which is their sum; None where the metric is undefined.

    To the perplexity: its first-order change with each text, plus an equal part of the whole.
    """
    if loss_metrics(losses)[metric]["value"] is None:
        return [None] * len(losses)
    tokens, size = sum(text.tokens for text in losses), sum(text.size for text in losses)
    if metric != "perplexity":
        whole = tokens if metric == "loss" else size * math.log(2)
        return [text.loss / whole for text in losses]
    loss = math.fsum(text.loss for text in losses) / tokens
    changes = ((text.loss - loss * text.tokens) / tokens for text in losses)
    return [_exponential(loss) * (1 / len(losses) + change) for change in changes]


def _exponential(loss: float) -> float:
    """exp(loss), infinite where a float ends (above 709 nats)."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _line(sample: Sample, text: TextLoss, part: float | None) -> dict[str, Any]:
    """A line of `samples.jsonl`."""
    return {
        "doc_id": sample.row,
        "question": sample.prompt[:80],
        "target": "",
        "prediction": "",
        "score": text.loss / text.tokens if math.isfinite(text.loss) else None,
        "part": part,
        "unit": sample.row,
        "stratum": "",
    }
