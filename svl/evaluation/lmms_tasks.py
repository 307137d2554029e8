"""lmms-eval's tasks with what svl adds: whole limits, units of documents, parts of metrics, corrected settings."""

from __future__ import annotations

import math
import numbers
import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from svl.core import one_of
from svl.core.errors import explained
from svl.data.data_folder import find_data_files
from svl.data.pictures import open_picture
from svl.evaluation import benchmarks
from svl.evaluation.documents import Document, image_lookup, rows_of_limit, video_lookup, with_pictures
from svl.evaluation.lmms_eval_internals import GenerationTask, LikelihoodTask, likeliest, load_yaml_config
from svl.evaluation.score_statistics import Part, bootstrap_error, share_interval, standard_error
from svl.evaluation.settings import TaskOptions
from svl.evaluation.upstream_scoring import corrected_config

NOT_KNOWN = {"value": None, "stderr": None, "low": None, "high": None}
TASKS: dict[str, Any] = {
    "generate_until": GenerationTask,
    "multiple_choice": LikelihoodTask,
    "loglikelihood": LikelihoodTask,
}

# what lmms-eval logs of a document: its answers, and an item for each metric that it counts in
ScoredSample = dict[str, Any]


@dataclass(frozen=True)
class ScoredTask:
    """A task of lmms-eval with what svl adds to it.

    Attributes:
        task: the task, with the data that are scored.
        rows: of its documents, in the whole data.
        unit: of a document, equal for those that are not independent (of one image); None: each is by itself.
        strata: column of the data over whose values a metric is summed; None: it is not.
        scored_together: whether the documents of a unit are scored as one.
    """

    task: Any
    rows: Sequence[int]
    unit: Callable[[Document], Hashable] | None = None
    strata: str | None = None
    scored_together: bool = False

    def images(self, doc_id: int) -> list[Image.Image]:
        """The images of a document, which is numbered as lmms-eval does."""
        return [open_picture(image) for image in self.visuals(doc_id) if isinstance(image, Image.Image)]

    def visuals(self, doc_id: int) -> list[Any]:
        """All that a document shows: images, and videos by their paths."""
        return list(self.task.doc_to_visual(self.task.eval_docs[doc_id]) or [])

    def metrics(self, found: dict[str, Any], samples: Sequence[ScoredSample]) -> dict[str, dict[str, Any]]:
        """{name: {"value", "stderr", "low", "high"}} of every metric that is a number; unknown ones are None.

        Names are the task's; where it filters answers in several ways, the first filter's metrics have the plain name
        and the others "name,filter".
        """
        metrics: dict[str, dict[str, Any]] = {}
        aggregation = self.task.aggregation()
        for key, value in found.items():
            name = key.partition(",")[0]
            if name not in aggregation or not isinstance(value, numbers.Real):
                continue
            if name in metrics:
                metrics[key] = {**NOT_KNOWN, "value": defined(float(value))}
            else:
                metrics[name] = self._metric(name, float(value), samples)
        return metrics

    def _metric(self, name: str, value: float, samples: Sequence[ScoredSample]) -> dict[str, Any]:
        if math.isnan(value):
            return dict(NOT_KNOWN)
        stderr = self._error(name, value, samples)
        low, high = self._interval(name, value, stderr, samples)
        return {"value": value, "stderr": stderr, "low": low, "high": high}

    def _error(self, metric: str, value: float, samples: Sequence[ScoredSample]) -> float | None:
        """Standard error of a metric, None where it is not known."""
        if self._entry(metric).get("bootstrap"):
            having = [sample for sample in samples if metric in sample]
            items, units = [sample[metric] for sample in having], [self.unit_of(sample) for sample in having]
            return bootstrap_error(value, items, units, self.task.aggregation()[metric])
        return standard_error(self.parts(metric, value, samples).values())

    def _interval(
        self, metric: str, value: float, stderr: float | None, samples: Sequence[ScoredSample]
    ) -> tuple[float | None, float | None]:
        """95 % interval of a metric that is a share of answers; None of others."""
        having = [sample for sample in samples if metric in sample]
        items = [sample[metric] for sample in having]
        count = self._entry(metric).get("share_of")
        if count is not None:
            n = count(items)
        elif not self.sums_parts(metric) and are_shares(items, value):
            n = len(items)
        else:
            return None, None
        units = {self.unit_of(sample) for sample in having}
        return share_interval(value, stderr, n, len(units))

    def _entry(self, metric: str) -> dict[str, Any]:
        """What the task's YAML says of a metric."""
        entries = self.task.config.metric_list or []
        return next((entry for entry in entries if entry["metric"] == metric), {})

    def sums_parts(self, metric: str) -> bool:
        """Whether the task itself says what documents add to a metric, because it is no mean of their scores."""
        return "parts" in self._entry(metric)

    def parts(self, metric: str, value: float | None, samples: Sequence[ScoredSample]) -> dict[int, Part]:
        """By `doc_id`, what each sample that has this metric adds to it; nothing where that is not known."""
        having = [sample for sample in samples if metric in sample]
        items = [sample[metric] for sample in having]
        if value is None or math.isnan(value) or not items:
            return {}
        if self.sums_parts(metric):
            shares: list[float] | None = self._entry(metric)["parts"](items)
        else:
            shares = shares_of_mean(items, value)
        if shares is None:
            return {}
        stratified = self.strata is not None and self.sums_parts(metric)
        return {
            sample["doc_id"]: Part(share, self.unit_of(sample), sample["doc"][self.strata] if stratified else None)
            for sample, share in zip(having, shares, strict=True)
        }

    def unit_of(self, sample: ScoredSample) -> Hashable:
        """The unit of a sample's document."""
        return self.unit(sample["doc"]) if self.unit else sample["doc_id"]

    def prediction(self, sample: ScoredSample) -> Any:
        """The answer that was scored; of given ones, the likeliest."""
        if self.task.OUTPUT_TYPE != "multiple_choice":
            return sample["filtered_resps"][0]
        return likeliest(self.task.doc_to_choice(sample["doc"]), sample["filtered_resps"])


def shares_of_mean(items: Sequence[Any], value: float) -> list[float] | None:
    """What each item adds to their mean score, None if `value` is not that."""
    scores = [score for item in items if (score := sample_score(item)) is not None]
    if len(scores) < len(items) or not math.isclose(value, statistics.fmean(scores), abs_tol=1e-9):
        return None
    return [score / len(scores) for score in scores]


def are_shares(items: Sequence[Any], value: float) -> bool:
    """Whether `value` is the mean of scores from 0 to 1."""
    shares = shares_of_mean(items, value) if items else None
    return shares is not None and all(0 <= share * len(items) <= 1 for share in shares)


def sample_score(item: Any) -> float | None:
    """The per-sample score in what a task keeps of a document: a number, or a dict with `score`."""
    score = item.get("score") if isinstance(item, dict) else item
    return float(score) if isinstance(score, numbers.Real) else None


def defined(value: float) -> float | None:
    """A metric's value, None instead of NaN."""
    return None if math.isnan(value) else value


# ------------------------------------------------------------------------------------------------- loading


def load_task(task: str, options: TaskOptions) -> ScoredTask:
    """The task with its data, and the cap, the stop strings and the prompt style that hold.

    Raises:
        SvlError: if there is no such task or style, its data cannot be loaded, or it asks for something else than
            answers or likelihoods.
    """
    benchmarks.check_settings(task, options)
    config = read_task_config(task, options.include_path)
    config["dataset_kwargs"] = benchmarks.dataset_arguments(config) or None
    kind = config.get("output_type", "generate_until")
    own = {name: config.pop(name, None) for name in ("together", "unit", "strata", "images", "videos", "options")}
    if options.likelihood and own["options"]:
        config["metric_list"] = with_likelihoods(config["metric_list"])
    if kind == "generate_until":
        config["generation_kwargs"] = greedy_settings(config.get("generation_kwargs") or {}, options.max_new_tokens)
    hint = benchmarks.data_hint(config)
    with explained(f"cannot load task '{task}'", hint):
        if images := own["images"]:
            theirs = {**config, "dataset_name": images["name"]}
            theirs |= data_settings(theirs, options.data)
            config |= {"process_docs": None, "doc_to_visual": image_lookup(theirs, **images)}
        if own["videos"] and (copy := benchmarks.local_data_copy(config, options.data)):
            config["doc_to_visual"] = video_lookup(copy, own["videos"])
        config |= data_settings(config, options.data)
        loaded = TASKS[kind](config=config, model_name=options.style)
    if options.likelihood and own["options"]:
        loaded.options_of, loaded.likely = own["options"], benchmarks.LIKELIHOOD
    loaded.set_config("num_fewshot", loaded.config.num_fewshot or 0)
    loaded.set_fewshot_seed(0)
    unit = by_function_or_column(loaded, task, own["unit"] or own["together"])
    rows = rows_of_limit(loaded.eval_docs_no_media, options.limit, own["together"])
    prepare_documents(loaded, rows)
    return ScoredTask(loaded, rows, unit, own["strata"], own["together"] is not None)


def prepare_documents(task: Any, rows: Sequence[int]) -> None:
    """Leave only the documents in `rows` in a task's data, and have their pictures read as everywhere in svl."""
    split = task.config.test_split or task.config.validation_split
    if len(rows) < len(task.eval_docs_no_media):
        for data in (task.dataset, task.dataset_no_image):
            data[split] = data[split].select(rows)
    task.dataset[split] = with_pictures(task.dataset[split])
    task.task_docs = task.eval_docs


def by_function_or_column(task: Any, name: str, unit: Any) -> Callable[[Document], Hashable] | None:
    """What a task's YAML names as `unit`, as a function of a document.

    Raises:
        SvlError: if it is a column that the data do not have.
    """
    if unit is None or callable(unit):
        return unit
    columns = list(task.eval_docs_no_media.features)
    one_of(f"task '{name}': unit", unit, columns)
    return lambda document: document[unit]


def read_task_config(task: str, include_path: str | None) -> dict[str, Any]:
    """A task's YAML, with that of the task it changes; functions are imported."""
    config = load_yaml_config(str(benchmarks.find_task(task, include_path)))
    if "upstream" not in config:
        return config
    original = load_yaml_config(str(benchmarks.find_task(config.pop("upstream"), None)))
    return corrected_config(original, config)


def with_likelihoods(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A task's metrics, and beside each that of the likeliest options."""
    beside = [entry for entry in entries if benchmarks.has_likelihood(entry["metric"])]
    return [*entries, *({**entry, "metric": benchmarks.LIKELIHOOD + entry["metric"]} for entry in beside)]


def greedy_settings(settings: dict[str, Any], max_new_tokens: int | None) -> dict[str, Any]:
    """A task's settings of generation: always greedy, always capped, and cut only where the task says so."""
    cap = max_new_tokens or settings.get("max_new_tokens") or benchmarks.NEW_TOKENS
    greedy = {"do_sample": False, "temperature": 0.0, "top_p": 1.0}
    return {"until": [], **settings, **greedy, "max_new_tokens": cap}


def data_settings(config: dict[str, Any], data: str | None) -> dict[str, Any]:
    """What a task's settings have to be for its data to come from a copy in the folder `data`."""
    copy = benchmarks.local_data_copy(config, data)
    if copy is None:
        return {}
    if (copy / "dataset_dict.json").is_file():  # by `save_to_disk`, which knows no configurations
        return {"dataset_path": str(copy), "dataset_kwargs": {"load_from_disk": True}, "dataset_name": None}
    name = config.get("dataset_name")
    if name is not None and not ((copy / "README.md").is_file() or (copy / name).is_dir()):
        name = None  # a copy of nothing but this configuration
    builder, files = find_data_files(copy, name, "benchmark.data")
    return {"dataset_path": builder, "dataset_kwargs": {"data_files": files}, "dataset_name": None}
