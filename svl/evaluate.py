"""Score a model in memory on a benchmark, with lmms-eval. The only file that imports lmms-eval.

Decisions (lmms-eval is pinned to 0.7.3; its stock adapters are not used, they turn errors into empty answers):

* One benchmark per call, one process, and every document's prompt through the model's own chat template, at once for
  the dense and the pruned model: what differs between two scores is the model.
* Always greedy and always capped: `max_new_tokens` of the caller, else of the task, else `NEW_TOKENS`. A pruned model
  may never end its answer. The checkpoint's other generation settings (end of text, repetition penalty) stay.
* `until` strings cut an answer only where the task's YAML names them (lmms-eval would add a blank line by default).
* An error is an error: it names the task and the documents, is never retried, and never becomes an empty answer.
* No caches (they would not notice that weights changed in place), no seeding, no clean-up of the model.
* Standard errors: std / sqrt(n) where a metric is the mean of per-sample scores; a bootstrap (`RESAMPLES`, fixed seed)
  where the task marks a metric with `bootstrap: true`, that is, says that its aggregation has no side effects; else
  None, as for a value that is undefined in some resample.
* NaN (a metric that is not defined, such as precision without a "yes") becomes None, never a number.
* lmms-eval's bars are hidden, its prints go to stderr, its warnings and errors to the logger `lmms_eval`.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import logging
import math
import numbers
import os
import platform
import random
import statistics
import sys
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

import datasets
import loguru
import torch
from lmms_eval import evaluator
from lmms_eval.api import task as upstream
from lmms_eval.api.model import lmms
from lmms_eval.utils import load_yaml_config
from PIL import Image
from tqdm import tqdm

from svl import benchmarks
from svl.core import SvlError, one_of
from svl.models import Lvlm

NEW_TOKENS = 128  # cap where neither the caller nor the task sets one
RESAMPLES = 500

T = TypeVar("T")
Conversation = list[dict[str, Any]]  # Hugging Face messages: role and content, a list of image and text parts


def _to_logging(message: Any) -> None:
    logging.getLogger("lmms_eval").log(message.record["level"].no, message.record["message"])


loguru.logger.configure(handlers=[{"sink": _to_logging, "level": "WARNING", "format": "{message}"}])


def evaluate(
    lvlm: Lvlm,
    task: str,
    *,
    include_path: str | None,
    metric: str,
    limit: int | None,
    batch_size: int,
    max_new_tokens: int | None,
    folder: Path,
    describe: str = "",
) -> dict[str, Any]:
    """Score `lvlm` on the lmms-eval task `task`; the model is left as it was.

    Args:
        lvlm: the model in evaluation mode, on its device, with its processor.
        task: name of one task (not a group) that asks for generated answers.
        include_path: folder of the task's YAML; None for the tasks that come with lmms-eval.
        metric: the main metric, by the name it has in the task.
        limit: only the first so many documents; None for all.
        batch_size: questions answered at once; the answers do not depend on it, up to rounding.
        max_new_tokens: cap of an answer's length, see the module.
        folder: where `samples.jsonl` goes: one line per document, ascending by `doc_id`, with `question`, `target`,
            `prediction` and `score` (of the main metric, None if it has no per-sample score).
        describe: what the progress bar says; the task's name if empty.

    Returns:
        JSON values: `task`, `metric`, `n`, `metrics` ({name: {"value", "stderr"}}), `seconds` (spent answering),
        `samples_per_second`, `device`, `limit`, `max_new_tokens`, `versions`.

    Raises:
        SvlError: if there is no such task, metric or data, the model cannot take the task's documents, or memory ran
            out.
        RuntimeError: if the model failed on a document; names it.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SvlError("evaluation runs in one process: start it without torchrun or accelerate launch")
    if limit is not None and limit < 1:
        raise SvlError(f"limit is {limit}, but must be at least 1 (or null for all documents)")
    with _quiet():
        benchmark = _load(task, include_path, max_new_tokens)
        one_of(f"metric of task '{task}'", metric.partition(",")[0], list(benchmark.aggregation()))
        answerer = Answerer(lvlm, batch_size, describe or task)
        answerer.task_dict[task] = benchmark.dataset
        results = evaluator.evaluate(
            lm=answerer,
            task_dict={task: benchmark},
            limit=limit,
            bootstrap_iters=0,
            process_docs_parallel=1,
            # without media: or every image is decoded once more for scoring
            cli_args=Namespace(process_with_media=False, output_path=str(folder), reasoning_tags=None),
        )
    samples = {s["doc_id"]: s for s in reversed(results["samples"][task])}  # of several filters, the first one's
    samples = dict(sorted(samples.items()))
    metrics = _metrics(benchmark, results["results"][task], list(samples.values()))
    one_of(f"metric of task '{task}'", metric, list(metrics))
    with open(folder / "samples.jsonl", "w") as file:
        for doc_id, sample in samples.items():
            row = {
                "doc_id": doc_id,
                "question": sample["arguments"][0],
                "target": sample["target"],
                "prediction": sample["filtered_resps"][0],
                "score": _score(sample.get(metric)),
            }
            file.write(json.dumps(row, default=str, ensure_ascii=False) + "\n")
    return {
        "task": task,
        "metric": metric,
        "n": len(samples),
        "metrics": metrics,
        "seconds": round(answerer.seconds, 3),
        "samples_per_second": round(len(samples) / answerer.seconds, 3),
        "device": _device(lvlm, batch_size),
        "limit": limit,
        "max_new_tokens": benchmark.config.generation_kwargs["max_new_tokens"],
        "versions": {"lmms_eval": importlib.metadata.version("lmms_eval")},
    }


def _device(lvlm: Lvlm, batch_size: int) -> dict[str, Any]:
    """What a speed depends on besides the model."""
    cuda = lvlm.device.type == "cuda"
    name = (
        torch.cuda.get_device_name(lvlm.device) if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    return {"type": lvlm.device.type, "name": name, "batch_size": batch_size}


# --------------------------------------------------------------------------------------------- answering


class Answerer(lmms):
    """The model as lmms-eval sees it: chat messages in, greedy answers out.

    `seconds` is the time the last `generate_until` took: reading images, preparing inputs, generating.
    """

    is_simple = False

    def __init__(self, lvlm: Lvlm, batch_size: int, describe: str):
        super().__init__()
        self.lvlm, self.batch_size, self.describe = lvlm, batch_size, describe
        self.seconds = 0.0
        self.accelerator = None  # its presence keeps lmms-eval from setting up accelerate

    def clean(self) -> None:
        """Nothing: lmms-eval's own would drop the model after its first benchmark."""

    def generate_until(self, requests: list[Any]) -> list[str]:
        """An answer to each request, in their order."""
        self._batch(requests[: self.batch_size], 2)  # kernels and caches warm up outside the measured time
        began = time.perf_counter()
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc=self.describe, unit="question", disable=None) as bar:
            for (cap, until), group in _grouped(range(len(requests)), lambda i: _settings(requests[i])):
                # like with like wastes least padding; the longest first, so that memory runs out at once or never
                group.sort(key=lambda i: len(requests[i].args[0]), reverse=True)
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    texts = self._batch([requests[i] for i in batch], cap)
                    for i, text in zip(batch, texts, strict=True):
                        answers[i] = _cut(text, until)
                    bar.update(len(batch))
        self.seconds = time.perf_counter() - began
        return answers

    def answer(self, conversations: list[Conversation], max_new_tokens: int) -> list[str]:
        """Greedy answers to conversations with equally many images each."""
        model, tokenizer = self.lvlm.model, self.lvlm.tokenizer
        images = [_images(c) for c in conversations] if _images(conversations[0]) else None
        inputs = self.lvlm.encode([self.lvlm.render(c) for c in conversations], images)
        settings = copy.deepcopy(model.generation_config)
        settings.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None)
        settings.update(max_new_tokens=max_new_tokens, max_length=None)
        if settings.pad_token_id is None:
            settings.pad_token_id = tokenizer.pad_token_id
        tokens = model.generate(**inputs, generation_config=settings)
        return tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _batch(self, requests: list[Any], max_new_tokens: int) -> list[str]:
        """Answers to requests of one task, in their order."""
        task, documents = requests[0].task_name, sorted(r.doc_id for r in requests)
        answers = [""] * len(requests)
        try:
            conversations = [self._conversation(r) for r in requests]
            for _, group in _grouped(range(len(requests)), lambda i: len(_images(conversations[i]))):
                texts = self.answer([conversations[i] for i in group], max_new_tokens)
                for i, text in zip(group, texts, strict=True):
                    answers[i] = text
        except SvlError:
            raise
        except torch.OutOfMemoryError as error:
            raise SvlError(f"out of memory on task '{task}': set a batch_size below {self.batch_size}") from error
        except Exception as error:
            raise RuntimeError(
                f"task '{task}': no answer to documents {documents}: {type(error).__name__}: {error}"
            ) from error
        return answers

    def _conversation(self, request: Any) -> Conversation:
        """The messages of a request, with its images read."""
        _, to_messages, _, doc_id, task, split = request.args
        conversation = []
        for message in to_messages(self.task_dict[task][split][doc_id]):
            parts = [{"type": "text", "text": message["content"]}]
            if not isinstance(message["content"], str):
                parts = [_part(part, task) for part in message["content"]]
            conversation.append({"role": message["role"], "content": parts})
        if _images(conversation) and not self.lvlm.sees:
            raise SvlError(f"task '{task}' asks about images, but model '{self.lvlm.name}' reads text only")
        return conversation

    def loglikelihood(self, requests: list[Any]) -> Any:
        """Not supported; `_load` refuses such tasks."""
        raise NotImplementedError

    def generate_until_multi_round(self, requests: list[Any]) -> Any:
        """Not supported; `_load` refuses such tasks."""
        raise NotImplementedError


def _part(part: dict[str, Any], task: str) -> dict[str, Any]:
    """One piece of an lmms-eval message as Hugging Face wants it, images in RGB."""
    if part["type"] == "text":
        return part
    if part["type"] != "image":
        raise SvlError(f"task '{task}' has {part['type']} in its questions; only images and text are supported")
    image = part["url"]
    if isinstance(image, Image.Image) and image.mode != "RGB":
        image = image.convert("RGB")
    return {"type": "image", "image": image}


def _images(conversation: Conversation) -> list[Any]:
    return [part["image"] for message in conversation for part in message["content"] if part["type"] == "image"]


def _settings(request: Any) -> tuple[int, tuple[str, ...]]:
    """Cap of new tokens and stop strings of a request."""
    settings = request.args[2]
    until = settings.get("until") or []
    return settings["max_new_tokens"], (until,) if isinstance(until, str) else tuple(until)


def _cut(text: str, until: Iterable[str]) -> str:
    """`text` up to the first stop string."""
    for stop in until:
        text = text.partition(stop)[0] if stop else text
    return text


def _grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> Iterable[tuple[Any, list[T]]]:
    """Items by the value of `key`, in order of first appearance."""
    groups: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups.items()


# ---------------------------------------------------------------------------------------------- scoring


class _Task(upstream.ConfigurableMessagesTask):
    """A task whose errors show: lmms-eval tries loading and scoring five times, two seconds apart."""

    download = upstream.ConfigurableMessagesTask.download.__wrapped__
    process_results = upstream.ConfigurableMessagesTask.process_results.__wrapped__


def _load(task: str, include_path: str | None, max_new_tokens: int | None) -> _Task:
    """The task with its data, and the cap and the stop strings that hold."""
    config = load_yaml_config(str(benchmarks.find(task, include_path)))
    if "class" in config or config.get("output_type", "generate_until") != "generate_until":
        raise SvlError(f"task '{task}' does not ask for generated answers, which is all this evaluation can do")
    settings = config.get("generation_kwargs") or {}
    cap = max_new_tokens or settings.get("max_new_tokens") or NEW_TOKENS
    config["generation_kwargs"] = {"until": [], **settings, "max_new_tokens": cap}
    try:
        benchmark = _Task(config=config)
    except OSError as error:  # missing files, no network, no access
        raise SvlError(f"cannot load the data of task '{task}': {error}") from error
    benchmark.set_config("num_fewshot", benchmark.config.num_fewshot or 0)
    benchmark.set_fewshot_seed(0)
    return benchmark


def _metrics(benchmark: _Task, results: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{name: {"value", "stderr"}} of every metric that is a number.

    Names are the task's; where it filters answers in several ways, the first filter's metrics have the plain name and
    the others "name,filter".
    """
    metrics: dict[str, dict[str, Any]] = {}
    pure = {m["metric"] for m in benchmark.config.metric_list or [] if m.get("bootstrap")}
    for key, value in results.items():
        name = key.partition(",")[0]
        if name not in benchmark.aggregation() or not isinstance(value, numbers.Real):
            continue
        first = name not in metrics
        items = [s[name] for s in samples if name in s] if first else []
        aggregate = benchmark.aggregation()[name] if name in pure else None
        metrics[name if first else key] = {
            "value": None if math.isnan(value) else float(value),
            "stderr": _stderr(float(value), items, aggregate),
        }
    return metrics


def _stderr(value: float, items: list[Any], aggregate: Callable[[list[Any]], float] | None) -> float | None:
    """Standard error of `value`, see the module; `aggregate` may be resampled if it is not None."""
    if len(items) < 2 or math.isnan(value):
        return None
    if aggregate is not None:
        rng = random.Random(0)
        values = [aggregate(rng.choices(items, k=len(items))) for _ in range(RESAMPLES)]
        return None if any(map(math.isnan, values)) else statistics.stdev(values)
    scores = [s for item in items if (s := _score(item)) is not None]
    if len(scores) < len(items) or not math.isclose(value, statistics.fmean(scores), abs_tol=1e-9):
        return None
    return statistics.stdev(scores) / math.sqrt(len(scores))


def _score(item: Any) -> float | None:
    """The per-sample score in what a task keeps of a document: a number, or a dict with `score`."""
    score = item.get("score") if isinstance(item, dict) else item
    return float(score) if isinstance(score, numbers.Real) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """lmms-eval and datasets without progress bars, and their prints on stderr."""

    def silent(*args: Any, **kwargs: Any) -> tqdm:
        return tqdm(*args, **{**kwargs, "disable": True})

    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    evaluator.tqdm = upstream.tqdm = silent
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        evaluator.tqdm = upstream.tqdm = tqdm
        if shown:
            datasets.enable_progress_bars()
