"""Score a model on a benchmark, with lmms-eval. The only file (besides svl/tasks) that imports lmms-eval.

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
* Where svl/tasks corrects lmms-eval, the metrics of both are computed, from the same answers.
* Standard errors: from every document's part in a metric where it is a mean or the task says what the parts are; a
  bootstrap (`RESAMPLES`, fixed seed) where the task marks a metric with `bootstrap: true`, that is, says that its
  aggregation has no side effects; else None, as for a value that is undefined in some resample.
* NaN (a metric that is not defined, such as precision without a "yes") becomes None, never a number.
* lmms-eval's bars are hidden, its prints go to stderr, its warnings and errors to the logger `lmms_eval`.
* Started by torchrun, every process answers its share of the documents with a copy of the model; the first gathers.
* Models that were pruned from one may be evaluated together: see svl.prefix. Their speeds are then unknown.
"""

from __future__ import annotations

import base64
import copy
import gc
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import numbers
import random
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

import datasets
import loguru
import torch
from lmms_eval import evaluator
from lmms_eval.api import task as upstream
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.utils import load_yaml_config
from PIL import Image
from tqdm import tqdm

from svl import benchmarks, parallel, results
from svl.core import SvlError, one_of
from svl.loading import Lvlm
from svl.prefix import SharedPrefix

NEW_TOKENS = 128  # cap where neither the caller nor the task sets one
RESAMPLES = 500
THUMBNAILS = 100  # wrong answers whose (first) image is kept
THUMBNAIL = 192  # pixels of its longer side

T = TypeVar("T")
Conversation = list[dict[str, Any]]  # Hugging Face messages: role and content, a list of image and text parts


def _to_logging(message: Any) -> None:
    logging.getLogger("lmms_eval").log(message.record["level"].no, message.record["message"])


loguru.logger.configure(handlers=[{"sink": _to_logging, "level": "WARNING", "format": "{message}"}])


def evaluate(
    model: Lvlm | lmms,
    task: str,
    *,
    include_path: str | None,
    metric: str,
    limit: float | None,
    batch_size: int,
    max_new_tokens: int | None,
    folder: Path,
    data: str | None = None,
    style: str = "default",
    describe: str = "",
) -> dict[str, Any]:
    """Score a model on the lmms-eval task `task`; it is left as it was.

    Args:
        model: the model in evaluation mode, on its device, with its processor; or what `served` gives.
        task: name of one task (not a group) that asks for generated answers or for the likelihood of given ones.
        include_path: folder with the task's YAML; None for the tasks of svl and those that come with lmms-eval.
        metric: the main metric, by the name it has in the task.
        limit: only the first so many documents, below 1 the first share of them; None for all.
        batch_size: questions answered at once; the answers do not depend on it, up to rounding.
        max_new_tokens: cap of an answer's length, see the module.
        folder: where `samples.jsonl` goes: one line per document, ascending by `doc_id` (its row in the data), with
            `question`, `target`, `prediction` and `score` (of the main metric, None if it has no per-sample score);
            where the main metric is no mean of scores, its `part` of it, and `unit` and `stratum`, see svl.results.
            `thumbnails.json` has the images of the first questions answered wrong: data URIs by `doc_id`.
        data: folder with copies of data sets; None for the hub (or its cache).
        style: the task's variant of its prompts, a key of its `lmms_eval_specific_kwargs`.
        describe: what the progress bar says; the task's name if empty.

    Returns:
        JSON values: `task`, `metric`, `higher_is_better`, `n`, `metrics` ({name: {"value", "stderr"}}), `seconds`
        (spent answering), `samples_per_second`, `device`, `limit`, `max_new_tokens`, `prompt` (style and the whole
        text of the first), `versions`. In a process that torchrun started, but for the first one: nothing.

    Raises:
        SvlError: if there is no such task, metric, style or data, the model cannot take the task's documents, or
            memory ran out.
        RuntimeError: if the model failed on a document; names it.
    """
    options: dict[str, Any]
    options = {"include_path": include_path, "metric": metric, "limit": limit, "max_new_tokens": max_new_tokens}
    options |= {"data": data, "style": style}
    answerer = Answerer([model], batch_size, describe or task) if isinstance(model, Lvlm) else model
    return _score_answers(answerer, task, folder=folder, **options)


def evaluate_together(
    models: Sequence[Lvlm], task: str, folders: Sequence[Path], *, batch_size: int, describe: str = "", **options: Any
) -> list[dict[str, Any]]:
    """`evaluate` of several models that were pruned from one: the same answers, but for their speed, which is None.

    What models share is computed once (svl.prefix); `seconds` is each one's share of the whole time.

    Args:
        models: of one depth or several, with one tokenizer and processor.
        task: as for `evaluate`.
        folders: one for each model.
        batch_size: as for `evaluate`.
        describe: as for `evaluate`.
        options: all others of `evaluate`.

    Raises:
        SvlError: as `evaluate`, or if the models keep caches that cannot be shared.
        RuntimeError: as `evaluate`.
    """
    answerer = Answerer(models, batch_size, describe or task)
    found = []
    for answerer.current, folder in enumerate(folders):
        found.append(_score_answers(answerer, task, folder=folder, **options))
    seconds = round(answerer.seconds / len(models), 3)
    return [{**scores, "seconds": seconds, "samples_per_second": None} for scores in found]


def _score_answers(
    answerer: Any, task: str, *, include_path: str | None, metric: str, limit: float | None,
    max_new_tokens: int | None, folder: Path, data: str | None = None, style: str = "default",
) -> dict[str, Any]:  # fmt: skip
    """See `evaluate`."""
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit == int(limit))):
        raise SvlError(f"limit is {limit:g}, but must be a whole number, a share below 1, or null for all documents")
    parallel.join()
    with _quiet():
        benchmark = _load(task, include_path, data, style, max_new_tokens)
        one_of(f"metric of task '{task}'", metric.partition(",")[0], list(benchmark.aggregation()))
        rows = benchmark.take(limit)
        answerer.task_dict[task], answerer.rows = benchmark.dataset, rows
        found = evaluator.evaluate(
            lm=answerer,
            task_dict={task: benchmark},
            bootstrap_iters=0,
            process_docs_parallel=1,
            distributed_executor_backend="torchrun" if parallel.size() > 1 else "accelerate",
            # without media: or every image is decoded once more for scoring
            cli_args=Namespace(process_with_media=False, output_path=str(folder), reasoning_tags=None),
        )
    seconds = max(parallel.gather(answerer.seconds))
    if found is None:
        return {}
    by_document = {s["doc_id"]: s for s in reversed(found["samples"][task])}  # of several filters, the first one's
    samples = [by_document[i] for i in sorted(by_document)]
    metrics = benchmark.metrics(found["results"][task], samples)
    one_of(f"metric of task '{task}'", metric, list(metrics))
    having = [s["doc_id"] for s in samples if metric in s]
    columns = benchmark.parts(metric, metrics[metric]["value"], samples) if benchmark.parts_of(metric) else ((),) * 3
    parts = dict(zip(having, zip(*columns, strict=True), strict=False))
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as file:
        for sample in samples:
            row = {
                "doc_id": rows[sample["doc_id"]],
                "question": sample["arguments"][0],
                "target": sample["target"],
                "prediction": benchmark.prediction(sample),
                "score": _score(sample.get(metric)),
            }
            if sample["doc_id"] in parts:
                row |= dict(zip(("part", "unit", "stratum"), parts[sample["doc_id"]], strict=True))
            file.write(json.dumps(row, default=str, ensure_ascii=False) + "\n")
    wrong = [s["doc_id"] for s in samples if (score := _score(s.get(metric))) is not None and score < 0.5]
    images = {rows[i]: _thumbnail(shown[0]) for i in wrong[:THUMBNAILS] if (shown := benchmark.images(i))}
    (folder / "thumbnails.json").write_text(json.dumps(images))
    return {
        "task": task,
        "metric": metric,
        "higher_is_better": benchmark.higher_is_better().get(metric.partition(",")[0], True),
        "n": len(samples),
        "metrics": metrics,
        "seconds": round(seconds, 3),
        "samples_per_second": round(len(samples) / seconds, 3),
        "device": answerer.place(),
        "limit": int(limit) if limit is not None and limit >= 1 else limit,
        "max_new_tokens": (benchmark.config.generation_kwargs or {}).get("max_new_tokens"),
        "prompt": {"style": style, "first": answerer.first},
        "versions": {"lmms_eval": importlib.metadata.version("lmms_eval")},
    }


# --------------------------------------------------------------------------------------------- answering


class Answerer(lmms):
    """Models as lmms-eval sees them: chat messages in, greedy answers out.

    Several models answer together when the first of them is asked; `current` says whose answers are given. `seconds`
    is the time the last benchmark took: reading images, preparing inputs, generating. `first` is the prompt of its
    first document, as the model's tokenizer got it.
    """

    is_simple = False
    rows: Sequence[int] = ()  # of the documents, in the data
    device = torch.device("cpu")  # of lmms-eval's own bookkeeping between processes

    def __init__(self, models: Sequence[Lvlm], batch_size: int, describe: str):
        super().__init__()
        self.models, self.lvlm, self.batch_size, self.describe = models, models[0], batch_size, describe
        self.current = 0
        self.answers: list[Sequence[Any]] = []
        self.shared = SharedPrefix(models)
        self.seconds, self.first = 0.0, ""
        self.accelerator = None  # its presence keeps lmms-eval from setting up accelerate

    def clean(self) -> None:
        """Nothing: lmms-eval's own would drop the model after its first benchmark."""

    def place(self) -> dict[str, Any]:
        """What a speed depends on besides the model."""
        place = self.lvlm.place(self.batch_size)
        return {**place, "processes": parallel.size()} if parallel.size() > 1 else place

    def generate_until(self, requests: list[Any]) -> list[str]:
        """An answer to each request, in their order."""
        answers = self._all(requests, _settings, lambda batch, settings: self._batch(batch, settings[0]))
        return [_cut(text, _settings(r)[1]) for r, text in zip(requests, answers, strict=True)]

    def loglikelihood(self, requests: list[Any]) -> list[GenerationResult]:
        """(negative log-likelihood in nats, whether greedy decoding gives it) of each request's continuation.

        lmms-eval takes the lowest as the model's choice; it would turn a plain pair into text, hence the wrapping.
        """
        return self._all(requests, lambda _: None, lambda batch, _: self._batch(batch, None))

    def _all(self, requests: list[Any], kind: Callable, answer: Callable) -> list[Any]:
        """`answer(batch, kind)` of all requests, batches of one kind each, in the order of the requests."""
        if not requests:
            return []
        if self.current == 0:
            self.answers = self._everyone(requests, kind, answer)
        return [given[self.current] for given in self.answers]

    def _everyone(self, requests: list[Any], kind: Callable, answer: Callable) -> list[Sequence[Any]]:
        """For each request, every model's answer."""
        self.first = self.lvlm.render(self._conversation(min(requests, key=lambda r: r.args[-3])))
        warm = [r for r in requests if kind(r) == kind(requests[0])][: self.batch_size]
        self._batch(warm, kind(requests[0]) and 2)  # kernels and caches warm up outside the measured time
        began = time.perf_counter()
        answers: list[Sequence[Any]] = [()] * len(requests)
        bar = tqdm(total=len(requests), desc=self.describe, unit="question", disable=parallel.rank() > 0 or None)
        with bar:
            for settings, group in _grouped(range(len(requests)), lambda i: kind(requests[i])):
                # like with like wastes least padding; the longest first, so that memory runs out at once or never
                group.sort(key=lambda i: len(requests[i].args[0]), reverse=True)
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    for i, given in zip(batch, answer([requests[i] for i in batch], settings), strict=True):
                        answers[i] = given
                    bar.update(len(batch))
        self.seconds = time.perf_counter() - began
        return answers

    def _in_turn(self, ask: Callable[[Lvlm], list[Any]]) -> list[tuple[Any, ...]]:
        """What `ask` gives of every model (an item per conversation), item by item; the models read the same batch."""
        given: list[list[Any]] = [[] for _ in self.models]
        self.shared.forget()
        for k in self.shared.order:
            with self.shared.turn(k):
                given[k] = ask(self.models[k])
        self.shared.forget()
        return list(zip(*given, strict=True))

    def answer(self, conversations: list[Conversation], max_new_tokens: int) -> list[tuple[str, ...]]:
        """Greedy answers, every model's, to conversations with equally many images each."""
        tokenizer = self.lvlm.tokenizer
        images = [_images(c) for c in conversations] if _images(conversations[0]) else None
        inputs = self.lvlm.encode([self.lvlm.render(c) for c in conversations], images)

        def ask(lvlm: Lvlm) -> list[str]:
            settings = copy.deepcopy(lvlm.model.generation_config)
            settings.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None)
            settings.update(max_new_tokens=max_new_tokens, max_length=None)
            if settings.pad_token_id is None:
                settings.pad_token_id = tokenizer.pad_token_id
            tokens = lvlm.model.generate(**inputs, generation_config=settings)
            return tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

        return self._in_turn(ask)

    def likelihood(
        self, conversations: list[Conversation], continuations: list[str]
    ) -> list[tuple[GenerationResult, ...]]:
        """Of each continuation after its conversation (equally many images each), see `loglikelihood`."""
        images = [_images(c) for c in conversations] if _images(conversations[0]) else None
        prompts = [self.lvlm.render(c) for c in conversations]
        lengths = [self._tokens_of(p, c) for p, c in zip(prompts, continuations, strict=True)]
        inputs = self.lvlm.encode([p + c for p, c in zip(prompts, continuations, strict=True)], images)

        def ask(lvlm: Lvlm) -> list[GenerationResult]:
            with torch.inference_mode():
                logits = lvlm.model(**inputs, logits_to_keep=max(lengths) + 1, use_cache=False).logits.float()
            found = []
            for row, ids, length in zip(logits, inputs["input_ids"], lengths, strict=True):
                predicted, target = row[-length - 1 : -1].log_softmax(-1), ids[-length:]
                loss = -predicted.gather(1, target[:, None]).sum().item()
                found.append(GenerationResult(text=(loss, bool((predicted.argmax(-1) == target).all()))))
            return found

        return self._in_turn(ask)

    def _tokens_of(self, prompt: str, continuation: str) -> int:
        """How many of the last tokens of the two together are not the prompt's."""
        whole, start = self.lvlm.tokenizer([prompt + continuation, prompt])["input_ids"]
        shared = next((i for i, (a, b) in enumerate(zip(whole, start, strict=False)) if a != b), len(start))
        if shared >= len(whole):
            raise ValueError(f"the answer '{continuation}' has no tokens")
        return len(whole) - shared

    def _batch(self, requests: list[Any], max_new_tokens: int | None) -> list[Sequence[Any]]:
        """Every model's answers to requests of one task, in their order; without a cap, likelihoods of theirs."""
        task, documents = requests[0].task_name, sorted({self.rows[r.doc_id] for r in requests})
        answers: list[Sequence[Any]] = [()] * len(requests)
        try:
            conversations = [self._conversation(r) for r in requests]
            for _, group in _grouped(range(len(requests)), lambda i: len(_images(conversations[i]))):
                asked = [conversations[i] for i in group]
                if max_new_tokens is None:
                    given: list[Any] = self.likelihood(asked, [self._continuation(requests[i]) for i in group])
                else:
                    given = self.answer(asked, max_new_tokens)
                for i, of_all in zip(group, given, strict=True):
                    answers[i] = of_all
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
        doc_id, task, split = request.args[-3:]
        document = self.task_dict[task][split][doc_id]
        if request.request_type == "loglikelihood":
            text, _, to_visual = request.args[:3]
            pictures = [{"type": "image", "url": image} for image in to_visual(document) or []]
            messages: Any = [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]
        else:
            messages = request.args[1](document)
        conversation = []
        for message in messages:
            parts = [{"type": "text", "text": message["content"]}]
            if not isinstance(message["content"], str):
                parts = [_part(part, task) for part in message["content"]]
            conversation.append({"role": message["role"], "content": parts})
        if _images(conversation) and not self.lvlm.sees:
            raise SvlError(f"task '{task}' asks about images, but model '{self.lvlm.name}' reads text only")
        return conversation

    def _continuation(self, request: Any) -> str:
        """The text whose likelihood a request asks for."""
        _, continuation, _, doc_id, task, split = request.args
        if isinstance(continuation, str):
            return continuation
        return f" {continuation(self.task_dict[task][split][doc_id])}"  # of type loglikelihood: the target

    def generate_until_multi_round(self, requests: list[Any]) -> Any:
        """Not supported; `_load` refuses such tasks."""
        raise NotImplementedError


def served(path: str, batch_size: int, options: dict[str, Any], template: str | None = None) -> Any:
    """A checkpoint in vLLM, as `evaluate` takes it: lmms-eval's own adapter, with two corrections.

    The adapter takes the larger of a task's cap and its own, which is no cap, and ignores stop strings.

    Args:
        path: folder, or hub id.
        batch_size: requests that are handed over at once.
        options: of `vllm.LLM`.
        template: chat template to use instead of the checkpoint's own.

    Raises:
        SvlError: if vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise SvlError("evaluator=vllm needs vLLM (pip install vllm) and a GPU that it supports")
    from lmms_eval.models.chat.vllm import VLLM

    class Served(VLLM):
        seconds, first = 0.0, ""

        def clean(self) -> None:
            """Nothing, as `Answerer.clean`."""

        def close(self) -> None:
            """Free the GPU for the next model."""
            core = getattr(getattr(self.client, "llm_engine", None), "engine_core", None)
            if core is not None:
                core.shutdown()
            del self.client
            gc.collect()
            torch.cuda.empty_cache()

        def place(self) -> dict[str, Any]:
            cuda = torch.cuda.is_available()
            return {"type": "vllm", "name": torch.cuda.get_device_name() if cuda else "cpu", "batch_size": batch_size}

        def _select_max_new_tokens(self, request_max_new_tokens: Any) -> int:
            return request_max_new_tokens

        def generate_until(self, requests: list[Any]) -> list[str]:
            began = time.perf_counter()
            answers = super().generate_until(requests)
            self.seconds, self.first = time.perf_counter() - began, requests[0].args[0]
            return [_cut(a.text, _settings(r)[1]) for r, a in zip(requests, answers, strict=True)]

    with tempfile.TemporaryDirectory() as folder:
        if template:  # as a file: in a text, the adapter takes a slash for a path
            Path(folder, "template.jinja").write_text(template.replace("IMAGE", "<image>"))
            options = {**options, "chat_template": str(Path(folder, "template.jinja"))}
        return Served(model=path, batch_size=batch_size, **options)


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


class _Scoring:
    """What svl adds to a task of lmms-eval: whole limits, parts of metrics, and errors that show.

    (lmms-eval tries loading and scoring five times, two seconds apart.)
    """

    together: Callable[[dict[str, Any]], Any] | None = None  # see svl.benchmarks
    strata: str | None = None

    def take(self, limit: float | None) -> list[int]:
        """Leave only the documents of a limit in the data; their rows."""
        documents: Any = self.eval_docs_no_media  # type: ignore[attr-defined]
        n = len(documents)
        if limit is not None:
            n = min(n, math.ceil(limit * n) if limit < 1 else int(limit))
        rows = list(range(n))
        if self.together and n < len(documents):
            keys = list(map(self.together, documents))
            chosen = set(keys[:n])
            rows = [i for i, key in enumerate(keys) if key in chosen]
        if len(rows) < len(documents):
            split = self.config.test_split or self.config.validation_split  # type: ignore[attr-defined]
            for data in (self.dataset, self.dataset_no_image):  # type: ignore[attr-defined]
                data[split] = data[split].select(rows)
            self.task_docs = self.eval_docs  # type: ignore[attr-defined]
        return rows

    def images(self, doc_id: int) -> list[Image.Image]:
        """The images of a document, which is numbered as lmms-eval does."""
        split = self.config.test_split or self.config.validation_split  # type: ignore[attr-defined]
        shown = self.doc_to_visual(self.dataset[split][doc_id]) or []  # type: ignore[attr-defined]
        return [image for image in shown if isinstance(image, Image.Image)]

    def metrics(self, found: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """{name: {"value", "stderr"}} of every metric that is a number.

        Names are the task's; where it filters answers in several ways, the first filter's metrics have the plain name
        and the others "name,filter".
        """
        metrics: dict[str, dict[str, Any]] = {}
        aggregation: Any = self.aggregation()  # type: ignore[attr-defined]
        pure = {m["metric"] for m in self.config.metric_list or [] if m.get("bootstrap")}  # type: ignore[attr-defined]
        for key, value in found.items():
            name = key.partition(",")[0]
            if name not in aggregation or not isinstance(value, numbers.Real):
                continue
            first, value = name not in metrics, float(value)
            stderr = None
            if first and name in pure:
                stderr = _bootstrap(value, [s[name] for s in samples if name in s], aggregation[name])
            elif first and (parts := self.parts(name, value, samples))[0]:
                stderr = results.spread(*parts)
            metrics[name if first else key] = {"value": None if math.isnan(value) else value, "stderr": stderr}
        return metrics

    def parts_of(self, metric: str) -> Callable[[list[Any]], list[float]] | None:
        """The task's own function for the parts of a metric."""
        entries = self.config.metric_list or []  # type: ignore[attr-defined]
        return next((m.get("parts") for m in entries if m["metric"] == metric), None)

    def parts(
        self, metric: str, value: float | None, samples: list[dict[str, Any]]
    ) -> tuple[list[float], list[Any], list[Any]]:
        """What each sample that has this metric adds to it, its unit and stratum; nothing where that is not known."""
        having = [s for s in samples if metric in s]
        items = [s[metric] for s in having]
        if value is None or math.isnan(value) or not items:
            return [], [], []
        if own := self.parts_of(metric):
            parts = own(items)
        else:
            scores = [s for item in items if (s := _score(item)) is not None]
            if len(scores) < len(items) or not math.isclose(value, statistics.fmean(scores), abs_tol=1e-9):
                return [], [], []
            parts = [score / len(scores) for score in scores]
        units = [self.together(s["doc"]) if self.together else s["doc_id"] for s in having]
        return parts, units, [s["doc"][self.strata] if own and self.strata else None for s in having]

    def prediction(self, sample: dict[str, Any]) -> Any:
        """The answer that was scored; of given ones, the likeliest."""
        if self.OUTPUT_TYPE != "multiple_choice":  # type: ignore[attr-defined]
            return sample["filtered_resps"][0]
        losses = [loss for loss, _ in sample["filtered_resps"]]
        return self.doc_to_choice(sample["doc"])[losses.index(min(losses))]  # type: ignore[attr-defined]


class _Questions(_Scoring, upstream.ConfigurableMessagesTask):
    """A task that asks for generated answers."""

    download = upstream.ConfigurableMessagesTask.download.__wrapped__
    process_results = upstream.ConfigurableMessagesTask.process_results.__wrapped__


class _Likelihoods(_Scoring, upstream.ConfigurableTask):
    """A task that asks for the likelihood of given answers."""

    download = upstream.ConfigurableTask.download.__wrapped__

    def process_results(self, doc: Any, results: list[Any], full_docs: Any = None) -> Any:
        """As upstream, which looks for the pair of a `loglikelihood` task one level too high."""
        score = upstream.ConfigurableTask.process_results.__wrapped__
        return score(self, doc, results[0] if self.OUTPUT_TYPE == "loglikelihood" else results, full_docs)


TASKS = {"generate_until": _Questions, "multiple_choice": _Likelihoods, "loglikelihood": _Likelihoods}


def _load(task: str, include_path: str | None, data: str | None, style: str, max_new_tokens: int | None) -> Any:
    """The task with its data, and the cap, the stop strings and the prompt style that hold."""
    config = load_yaml_config(str(benchmarks.find(task, include_path)))
    if "upstream" in config:
        config = _corrected(load_yaml_config(str(benchmarks.find(config.pop("upstream"), None))), config)
    kind = config.get("output_type", "generate_until")
    if "class" in config or kind not in TASKS:
        raise SvlError(f"task '{task}' asks for neither answers nor likelihoods, which is all this evaluation can do")
    benchmarks.check_style(task, style, include_path)
    together, strata, images = (config.pop(name, None) for name in ("together", "strata", "images"))
    if kind == "generate_until":
        settings = config.get("generation_kwargs") or {}
        cap = max_new_tokens or settings.get("max_new_tokens") or NEW_TOKENS
        greedy = {"do_sample": False, "temperature": 0.0, "top_p": 1.0}
        config["generation_kwargs"] = {"until": [], **settings, **greedy, "max_new_tokens": cap}
    if copy := benchmarks.local_data(config, data):
        saved = (copy / "dataset_dict.json").is_file()  # by `save_to_disk`, which knows no configurations
        config |= {"dataset_path": str(copy), "dataset_kwargs": {"load_from_disk": True} if saved else None}
        config["dataset_name"] = None if saved else config.get("dataset_name")
    try:
        if images:
            config |= {"process_docs": None, "doc_to_visual": _looked_up(config, **images)}
        benchmark: Any = TASKS[kind](config=config, model_name=style)
    except OSError as error:  # missing files, no network, no access
        raise SvlError(f"cannot load the data of task '{task}': {error}") from error
    benchmark.together, benchmark.strata = together, strata
    benchmark.set_config("num_fewshot", benchmark.config.num_fewshot or 0)
    benchmark.set_fewshot_seed(0)
    return benchmark


def _corrected(original: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The configuration of lmms-eval's task with what svl changes; of two ways of scoring, both."""
    kept = [m for m in original["metric_list"] if m["metric"] != "submission"]  # files for a server
    ours, theirs = own.get("process_results"), original.get("process_results")
    if ours is None or theirs is None:
        return {**original, **own, "metric_list": own.get("metric_list") or kept}

    def both(doc: dict[str, Any], answers: list[str]) -> dict[str, Any]:
        items = ours(doc, answers)
        chance = random.getstate()
        random.seed(repr(doc))  # some draw letters where they cannot read one: the same in every run, at least
        try:
            beside = theirs(doc, answers)
        finally:
            random.setstate(chance)
        return {**{benchmarks.UPSTREAM + name: item for name, item in beside.items()}, **items}

    beside = [{**m, "metric": benchmarks.UPSTREAM + m["metric"]} for m in kept]
    return {**original, **own, "metric_list": [*own["metric_list"], *beside], "process_results": both}


def _looked_up(config: dict[str, Any], name: str, key: str) -> Callable[[dict[str, Any]], list[Any]]:
    """A `doc_to_visual` that finds a document's image in another configuration of its data set, by its id."""
    split, options = config["test_split"], dict(config.get("dataset_kwargs") or {})
    if options.pop("load_from_disk", False):
        images = datasets.load_from_disk(str(Path(config["dataset_path"], name)))[split]
    else:
        images = datasets.load_dataset(config["dataset_path"], name, split=split, **options)
    rows = {identity: row for row, identity in enumerate(images["id"])}
    return lambda doc: [images[rows[doc[key]]]["image"].convert("RGB")]


def _bootstrap(value: float, items: list[Any], aggregate: Callable[[list[Any]], float]) -> float | None:
    """Standard error of `value`, see the module."""
    if len(items) < 2 or math.isnan(value):
        return None
    rng = random.Random(0)
    values = [aggregate(rng.choices(items, k=len(items))) for _ in range(RESAMPLES)]
    return None if any(map(math.isnan, values)) else statistics.stdev(values)


def _score(item: Any) -> float | None:
    """The per-sample score in what a task keeps of a document: a number, or a dict with `score`."""
    score = item.get("score") if isinstance(item, dict) else item
    return float(score) if isinstance(score, numbers.Real) else None


def _thumbnail(image: Image.Image) -> str:
    """A small copy as a data URI of a few kilobytes."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file := io.BytesIO(), "WEBP", quality=75)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


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
