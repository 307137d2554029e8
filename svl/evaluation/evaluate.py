"""Score a model on a benchmark, with lmms-eval.

Decisions (lmms-eval is pinned to 0.7.3; its stock adapters are not used, they turn errors into empty answers):

* One benchmark per call, and every document's prompt through the model's own chat template, at once for the dense and
  the pruned model: what differs between two scores is the model.
* Always greedy and always capped: `max_new_tokens` of the caller, else of the task, else `NEW_TOKENS`. A pruned model
  may never end its answer. The checkpoint's other generation settings (end of text, repetition penalty) stay.
* `until` strings cut an answer only where the task's YAML names them (lmms-eval would add a blank line by default).
* An error is an error: it names the task and the documents, is never retried, and never becomes an empty answer.
* No caches (they would not notice that weights changed in place), no seeding, no clean-up of the model.
* A limit takes the first documents, or the first share of them; of documents that are scored together, all or none.
* Of the first questions answered wrong, small images are kept: of whatever two models answer differently, one of them
  has the image, for as long as there are few.
* Where svl/evaluation/tasks corrects lmms-eval, the metrics of both are computed, from the same answers.
* With `likelihood`, the options of closed questions are compared after the same prompt, too: a task's metrics as if the
  likeliest were the answer. Answers and their time are those without.
* Standard errors: from every document's part in a metric where it is a mean or the task says what the parts are; a
  bootstrap where the task marks a metric with `bootstrap: true`, that is, says that its aggregation has no side
  effects; else None, as for a value that is undefined in some resample. Documents of one `unit` (questions on one
  image) count as one, in errors, intervals and tests.
* Intervals of shares of answers are Wilson's: they stay in [0, 1] and have a width where the error is 0.
* NaN (a metric that is not defined, such as precision without a "yes") becomes None, never a number.
* Started by torchrun, every process answers its share of the documents with a copy of the model; the first gathers.
* Models that were pruned from one may be evaluated together: see svl.evaluation.shared_prefill and lock_step. Their
  speeds are then unknown.
"""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from svl import processes
from svl.core import one_of
from svl.core.errors import explained
from svl.evaluation.answerer import Answerer, Reader
from svl.evaluation.lmms_eval_internals import Model, quiet, run_task
from svl.evaluation.lmms_tasks import ScoredSample, ScoredTask, load_task, sample_score
from svl.evaluation.settings import TaskOptions
from svl.models.lvlm import Lvlm

THUMBNAILS = 100  # wrong answers whose (first) image is kept
THUMBNAIL = 192  # pixels of its longer side


def evaluate(model: Lvlm | Model, task: str, options: TaskOptions, folder: Path) -> dict[str, Any]:
    """Score a model on the lmms-eval task `task`; it is left as it was.

    Args:
        model: the model in evaluation mode, on its device, with its processor; or what `vllm_answerer` gives.
        task: name of one task (not a group) that asks for generated answers or for the likelihood of given ones.
        options: how it is scored.
        folder: where `samples.jsonl` goes: one line per document, ascending by `doc_id` (its row in the data), with
            `question`, `target`, `prediction` and `score` (of the main metric, None if it has no per-sample score);
            where documents are not independent, their `unit`; where the main metric is no mean of scores, its `part`
            of it (None where that is not known) and `stratum` (see svl.evaluation.score_statistics).
            `thumbnails.json` has the images of the first questions answered wrong: data URIs by `doc_id`.

    Returns:
        JSON values: `task`, `metric`, `higher_is_better`, `n`, `metrics` ({name: {"value", "stderr", "low", "high"}},
        the last two a 95 % interval of metrics that are shares of answers), `scored_together` (whether the documents
        of a unit are scored as one), `seconds` (spent answering), `samples_per_second`, `device`, `limit`,
        `max_new_tokens`, `prompt` (style and the whole text of the first), `versions`. In a process that torchrun
        started, but for the first one: nothing.

    Raises:
        SvlError: if there is no such task, metric, style or data, the model cannot take the task's documents or fails
            on one of them (which it names), or memory ran out.
    """
    answerer: Any = model
    if isinstance(model, Lvlm):
        answerer = Answerer([model], options.batch_size, task)
    return _score(answerer, task, options, folder)


def evaluate_together(
    models: Sequence[Lvlm],
    task: str,
    options: TaskOptions,
    folders: Sequence[Path],
    reader: Reader | None = None,
) -> list[dict[str, Any]]:
    """`evaluate` of several models that were pruned from one: the same answers, but for their speed, which is None.

    What models share is computed once; `seconds` is each one's share of the whole time.

    Args:
        models: of one depth or several, with one tokenizer and processor.
        task: as for `evaluate`.
        options: as for `evaluate`.
        folders: one for each model.
        reader: how the models read a batch; None: one after the other (svl.evaluation.shared_prefill).

    Raises:
        SvlError: as `evaluate`, or if the models keep caches that cannot be shared.
    """
    answerer = Answerer(models, options.batch_size, task, reader)
    found = []
    for k, folder in enumerate(folders):
        answerer.current = k
        found.append(_score(answerer, task, options, folder))
    seconds = round(answerer.seconds / len(models), 3)
    return [{**scores, "seconds": seconds, "samples_per_second": None} for scores in found]


def _score(answerer: Any, task: str, options: TaskOptions, folder: Path) -> dict[str, Any]:
    """See `evaluate`."""
    processes.join_processes()
    with quiet():
        benchmark = load_task(task, options)
        one_of(f"metric of task '{task}'", options.metric.partition(",")[0], list(benchmark.task.aggregation()))
        answerer.rows, answerer.frames = benchmark.rows, options.frames
        with explained(f"task '{task}' cannot be scored"):
            found = run_task(answerer, task, benchmark.task, folder, processes.process_count())
    seconds = max(processes.gather_values(answerer.seconds))
    if found is None:
        return {}
    by_document = {s["doc_id"]: s for s in reversed(found["samples"][task])}  # of several filters, the first one's
    samples = [by_document[i] for i in sorted(by_document)]
    metrics = benchmark.metrics(found["results"][task], samples)
    one_of(f"metric of task '{task}'", options.metric, list(metrics))
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as file:
        for line in sample_lines(benchmark, options.metric, metrics[options.metric]["value"], samples):
            file.write(json.dumps(line, default=str, ensure_ascii=False) + "\n")
    images = wrong_images(benchmark, options.metric, samples)
    (folder / "thumbnails.json").write_text(json.dumps({row: thumbnail(image) for row, image in images.items()}))
    limit = options.limit
    return {
        "task": task,
        "metric": options.metric,
        "higher_is_better": benchmark.task.higher_is_better().get(options.metric.partition(",")[0], True),
        "n": len(samples),
        "scored_together": benchmark.scored_together,
        "metrics": metrics,
        "seconds": round(seconds, 3),
        "samples_per_second": round(len(samples) / seconds, 3),
        "device": answerer.device_facts(),
        "limit": int(limit) if limit is not None and limit >= 1 else limit,
        "max_new_tokens": (benchmark.task.config.generation_kwargs or {}).get("max_new_tokens"),
        "prompt": {"style": options.style, "first": answerer.first_prompt},
        "versions": {"lmms_eval": importlib.metadata.version("lmms_eval")},
    }


def sample_lines(
    benchmark: ScoredTask, metric: str, value: float | None, samples: Sequence[ScoredSample]
) -> Iterator[dict[str, Any]]:
    """The lines of `samples.jsonl`, see `evaluate`; `value` is that of the main metric."""
    parts = benchmark.parts(metric, value, samples)
    is_mean = bool(parts) and not benchmark.sums_parts(metric)
    for sample in samples:
        line = {
            "doc_id": benchmark.rows[sample["doc_id"]],
            "question": sample["arguments"][0],
            "target": sample["target"],
            "prediction": benchmark.prediction(sample),
            "score": sample_score(sample.get(metric)),
        }
        if benchmark.unit:
            line["unit"] = str(benchmark.unit_of(sample))
        if not is_mean and line["score"] is not None:
            part = parts.get(sample["doc_id"])
            line |= {"part": part.value, "stratum": part.stratum} if part else {"part": None}
        yield line


def wrong_images(benchmark: ScoredTask, metric: str, samples: Sequence[ScoredSample]) -> dict[int, Image.Image]:
    """The first image of each of the first questions that were answered wrong, by row; nothing where there is none."""
    scores = {sample["doc_id"]: sample_score(sample.get(metric)) for sample in samples}
    wrong = [doc_id for doc_id, score in scores.items() if score is not None and score < 0.5]
    images = {benchmark.rows[doc_id]: benchmark.images(doc_id) for doc_id in wrong[:THUMBNAILS]}
    return {row: shown[0] for row, shown in images.items() if shown}


def thumbnail(image: Image.Image) -> str:
    """A small copy as a data URI of a few kilobytes."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=75)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
