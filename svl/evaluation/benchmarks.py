"""Where a benchmark is and what it consists of, without importing torch or lmms-eval.

A benchmark is an lmms-eval task: a YAML file, in a folder of one's own (`include_path`), in `svl/evaluation/tasks`, or
among the tasks that lmms-eval ships; the first place that has the name counts. Task names are found by reading the
files' text (0.15 s for the 1,900 of lmms-eval; its own index parses them, in 6 s).

Files of one's own and those of `svl/evaluation/tasks` may say more than lmms-eval understands; `lmms_tasks` acts on it:

    upstream: NAME     a task of lmms-eval, which this file changes; all that it does not say is as there. If it has
                       `process_results` of its own, the other's metrics stay, as `upstream_<name>`.
    together: FUNCTION documents of equal value (by row) are scored as one: a limit takes all of them or none.
    unit: FUNCTION or COLUMN  documents of equal value (those on one image) are not independent: they count as one in
                       standard errors, intervals and tests. Without it, those that are scored together.
    strata: COLUMN     the metric is a sum over the values of this column: for standard errors.
    images: {name: CONFIGURATION, key: COLUMN}  where the same data set keeps the images, by id.
    options: FUNCTION  document -> what a closed question may be answered with (`[]`: an open one); with
                       `benchmark.likelihood`, its metrics as if the likeliest were the answer, as `likelihood_<name>`.
    videos: COLUMN     names the file of a document's video, wherever in a copy of the data (`benchmark.data`) it is.
    bootstrap: true    of a metric: its aggregation has no side effects, so it may be resampled for a standard error.
    parts: FUNCTION    of a metric that is no mean: items -> what each adds to it.
    share_of: FUNCTION of a metric that is a share of answers, but not their mean score: items -> of how many.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import importlib.util
import logging
import re
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from svl.core import SvlError, did_you_mean, one_of
from svl.core.errors import explained
from svl.evaluation.settings import TaskOptions
from svl.store.files import digest, file_digest, nested_strings, remembered
from svl.text.escaping import for_terminal

log = logging.getLogger(__name__)
OWN = Path(__file__).parent / "tasks"
UPSTREAM = "upstream_"  # before the names of lmms-eval's metrics, where a task has its own beside
LIKELIHOOD = "likelihood_"  # before the names of a task's metrics, with the likeliest option as the answer
OFF_FORMAT, ABOVE_CHANCE = "off_format", "above_chance"  # metrics of svl's tasks beside the main one
NEW_TOKENS = 128  # cap of an answer where neither settings nor the task give one
LOWER = ("loss", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")  # better, where no YAML says so
LARGE = 64 * 2**20  # bytes from which on a data file counts by its size and its ends
LOADERS = ("parquet", "json", "csv", "text", "arrow")  # data sets that are files beside the YAML
# settings of generation that change nothing if they have one of these values
GREEDY: dict[str, tuple[Any, ...]] = {
    "do_sample": (False,),
    "temperature": (0,),
    "top_p": (1,),
    "top_k": (0, 1, 50),
    "num_beams": (1,),
    "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
}
OUTPUTS = ("generate_until", "multiple_choice", "loglikelihood", "perplexity")  # what a task may ask for

_NAME = re.compile(r"""^task:[ \t]*["']?([^\s"'#\[{]+)""", re.MULTILINE)


class _Loader(yaml.SafeLoader):
    """YAML that leaves `!function module.name` a string instead of importing it."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def task_files(folder: Path) -> dict[str, Path]:
    """The YAML file of every task below `folder`."""
    return {name: path for path in sorted(folder.rglob("*.yaml")) for name in _names(path)}


@remembered
def _names(path: Path) -> list[str]:
    return _NAME.findall(path.read_text("utf-8"))


@remembered
def _parsed(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text("utf-8"), _Loader) or {}


def find_task(task: str, include_path: str | None) -> Path:
    """The YAML file of `task`.

    Raises:
        SvlError: if there is none, naming the closest task there is, if `include_path` is no folder, or if lmms-eval
            is looked for and not installed.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise SvlError(f"benchmark folder '{include_path}' does not exist")
    known = task_files(Path(include_path)) if include_path is not None else {}
    if task not in known:
        known = task_files(OWN) | known
    if task not in known:
        known = _shipped_tasks() | known
    if task in known:
        return known[task]
    where = f"'{include_path}' or lmms-eval" if include_path is not None else "lmms-eval"
    raise SvlError(f"no benchmark task '{task}' in {where}{did_you_mean(task, known)}")


def benchmark_fingerprint(task: str, include_path: str | None, data: str | None = None) -> str:
    """16 hex digits that change when the benchmark does.

    They cover the task's YAML with what it includes and changes, the Python files beside those, the content of data
    files on this machine (of those above 64 MiB: size, first and last MiB), and for a task of lmms-eval its version.
    Data on the hub count by name and revision only.

    Raises:
        SvlError: if there is no such task, or no copy of its data in the folder `data`.
    """
    files = sorted(set(_files(find_task(task, include_path))))
    version = None
    if importlib.util.find_spec("lmms_eval") and any(_shipped() in path.parents for path in files):
        version = importlib.metadata.version("lmms_eval")
    parts = [task, version, [[path.name, _content(path)] for path in files]]
    if data is not None and (copy := local_data_copy(task_settings(task, include_path), data)):
        parts.append([[str(p.relative_to(copy)), _content(p)] for p in sorted(copy.rglob("*")) if p.is_file()])
    return digest(parts)


def task_settings(task: str, include_path: str | None) -> dict[str, Any]:
    """What the YAML of `task` says, with what it includes and what it changes; functions by name."""

    config = _with_included(find_task(task, include_path))
    if "upstream" not in config:
        return config
    return _with_included(find_task(config["upstream"], None)) | config


def _with_included(path: Path) -> dict[str, Any]:
    """What a YAML file says, with the files it includes; of these, the first that names a setting counts."""
    config = deepcopy(_parsed(path))
    included: dict[str, Any] = {}
    for name in reversed(list(nested_strings(config.pop("include", None)))):
        included |= _with_included(path.parent / name)
    return included | config


def local_data_copy(config: dict[str, Any], data: str | None) -> Path | None:
    """Where in the folder `data` a task's data set is: in the folder named like it; None for a task with own files.

    Raises:
        SvlError: if there is no such folder.
    """
    path = config.get("dataset_path") or ""
    if data is None or not is_hub_name(path):
        return None
    copy = Path(data).expanduser() / path.split("/")[1]
    if not copy.is_dir():
        raise SvlError(f"benchmark.data: '{data}' has no folder '{copy.name}', a copy of the data set {path}")
    return copy.absolute()


def data_hint(config: dict[str, Any]) -> str:
    """What may help where the data of a task with these settings cannot be had."""
    if not is_hub_name(config.get("dataset_path") or ""):
        return ""
    return "; if its data are not on the hub or in its cache, set benchmark.data to a folder with copies"


def is_hub_name(path: str) -> bool:
    """Whether a task's data set is one of the hub; else it is parquet, json or a folder, beside the YAML file."""
    return path.count("/") == 1 and not path.startswith((".", "/"))


def check_task(task: str, options: TaskOptions) -> None:
    """Raise SvlError unless `task` can be scored so, and warn of settings that do not count: for the start of a run."""
    check_settings(task, options)
    sampling = task_settings(task, options.include_path).get("generation_kwargs") or {}
    ignored = [f"{name}: {sampling[name]}" for name, same in GREEDY.items() if sampling.get(name) not in (None, *same)]
    if ignored:
        log.warning("  %s: answers are always greedy, so %s does not count", task, for_terminal(", ".join(ignored)))


def output_type(task: str, include_path: str | None) -> str:
    """What a task asks for."""
    return str(task_settings(task, include_path).get("output_type", OUTPUTS[0]))


def check_evaluator(task: str, include_path: str | None, evaluator: str) -> None:
    """Raise SvlError unless the evaluator gives what a task asks for: vLLM writes answers, and gives no likelihoods."""
    kind = output_type(task, include_path)
    if evaluator == "vllm" and kind != OUTPUTS[0]:
        raise SvlError(
            f"task '{task}' asks for {kind} (its output_type), but evaluator=vllm gives only {OUTPUTS[0]}: set "
            "evaluator=transformers, or leave the task out"
        )


def check_settings(task: str, options: TaskOptions) -> None:
    """Raise SvlError unless `task` can be scored so, as far as its YAML tells."""
    settings, kind = task_settings(task, options.include_path), output_type(task, options.include_path)
    one_of(f"output_type of task '{task}'", kind, OUTPUTS)
    if "class" in settings:
        raise SvlError(f"task '{task}' is a class of lmms-eval's; only tasks that their YAML describes can be scored")
    check_metric(task, options.metric, options.include_path, options.likelihood)
    if kind != "perplexity":
        check_style(task, options.style, options.include_path)
        _check_few_shot(task, settings)


def _check_few_shot(task: str, settings: dict[str, Any]) -> None:
    """Examples before the question: lmms-eval writes them into texts, but shows none where there are images."""
    if not settings.get("num_fewshot"):
        return
    if settings.get("doc_to_visual") or settings.get("doc_to_messages"):
        raise SvlError(
            f"task '{task}' asks for num_fewshot: {settings['num_fewshot']}, but questions on images are asked without "
            "examples: set it to 0 in a task file of your own (upstream: names the one that it changes)"
        )
    if not settings.get("fewshot_config"):
        raise SvlError(f"task '{task}': num_fewshot needs fewshot_config: {{sampler: default}} beside it")


def check_data(task: str, options: TaskOptions) -> None:
    """Raise SvlError unless the data of `task` can be had; of the hub, asks for their description, but no data.

    Imports lmms-eval. Not needed for scores that are stored.
    """
    settings = task_settings(task, options.include_path)
    path = settings.get("dataset_path") or ""
    if not is_hub_name(path):
        source = find_task(task, options.include_path)
        if path in LOADERS and not any(task_data_files(source, settings)):
            raise SvlError(f"task '{task}' has no data: '{source}' names files that do not exist")
        return
    if local_data_copy(settings, options.data):
        return
    from datasets import load_dataset_builder

    from svl.evaluation.lmms_eval_internals import data_cache_folder

    given = dataset_arguments(settings)
    known = {name: given[name] for name in ("data_files", "data_dir", "revision", "token") if name in given}
    names = [settings.get("dataset_name"), *([settings["images"]["name"]] if "images" in settings else [])]
    for name in names:
        with explained(f"task '{task}': the data set {path} cannot be had", data_hint(settings)):
            load_dataset_builder(path, name, cache_dir=data_cache_folder(), **known)


def dataset_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """What a task's data set is loaded with.

    lmms-eval's tasks say `token: true`, which asks for a login even where data are public: without one, it is left out.
    """
    from huggingface_hub import get_token

    given = dict(settings.get("dataset_kwargs") or {})
    if given.get("token") is True and get_token() is None:
        del given["token"]
    return given


def check_metric(task: str, metric: str, include_path: str | None, likelihood: bool = False) -> None:
    """Raise SvlError unless `task` (or what it includes or changes) lists `metric`; with `likelihood`, those of it."""
    config = task_settings(task, include_path)
    listed = [entry["metric"] for entry in config.get("metric_list") or []]
    if likelihood and "options" in config:
        listed += [LIKELIHOOD + name for name in listed if has_likelihood(name)]
    if (name := config.get("upstream")) and "process_results" in config:
        listed += [UPSTREAM + entry["metric"] for entry in task_settings(name, None)["metric_list"]]
    one_of(f"benchmark.tasks.{task}.metric", metric.partition(",")[0], listed)


def new_tokens(task: str, include_path: str | None) -> int:
    """A task's own cap of an answer's length, where settings give none."""
    settings = task_settings(task, include_path).get("generation_kwargs") or {}
    return int(settings.get("max_new_tokens") or NEW_TOKENS)


def higher_is_better(task: str, metric: str, include_path: str | None) -> bool:
    """Whether higher values of a task's metric are better: as its YAML says; True where nothing is known."""
    settings = task_settings(task, include_path)
    if output_type(task, include_path) == "perplexity":
        return False
    name, entries = metric.partition(",")[0].removeprefix(LIKELIHOOD), settings.get("metric_list") or []
    if "upstream" in settings and name not in {entry["metric"] for entry in entries}:
        name, entries = name.removeprefix(UPSTREAM), task_settings(settings["upstream"], None)["metric_list"]
    said = {entry["metric"]: entry.get("higher_is_better", name not in LOWER) for entry in entries}
    return bool(said.get(name, True))


def check_direction(task: str, metric: str, said: bool | None, include_path: str | None) -> None:
    """Raise SvlError if settings say another direction of a metric than its task does; None: they say nothing."""
    known = higher_is_better(task, metric, include_path)
    if said is not None and said != known:
        raise SvlError(
            f"benchmark.tasks.{task}.higher_is_better is {str(said).lower()}, but {'higher' if known else 'lower'} "
            f"values of {metric} are better: set it to {str(known).lower()}, or to null (what the task says)"
        )


def has_likelihood(metric: str) -> bool:
    """Whether a metric of closed questions is also scored by the likelihood of their options."""
    return metric != OFF_FORMAT and not metric.startswith(UPSTREAM)


def check_style(task: str, style: str, include_path: str | None) -> None:
    """Raise SvlError unless `task` has the prompt style (a key of its `lmms_eval_specific_kwargs`)."""
    styles = [k for k, v in (task_settings(task, include_path).get("lmms_eval_specific_kwargs") or {}).items() if v]
    one_of(f"benchmark.tasks.{task}.style", style, ["default", *(s for s in styles if s != "default")])


def _shipped() -> Path:
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or spec.origin is None:
        raise SvlError("this benchmark needs lmms-eval: pip install 'svl[eval]'")
    return Path(spec.origin).parent / "tasks"


@cache
def _shipped_tasks() -> dict[str, Path]:
    return task_files(_shipped())


def _content(path: Path) -> str:
    """Hash of a file: of its bytes, or of size and both ends if it is large."""
    size = path.stat().st_size
    if size < LARGE:
        return file_digest(path)
    with open(path, "rb") as file:
        ends = file.read(2**20)
        file.seek(-(2**20), 2)
        return hashlib.sha256(str(size).encode() + ends + file.read()).hexdigest()


def _files(path: Path) -> Iterator[Path]:
    """The files that a task's YAML consists of, itself included."""
    yield path
    yield from path.parent.glob("*.py")
    config = _parsed(path)
    for included in nested_strings(config.get("include")):
        yield from _files(path.parent / included)
    if "upstream" in config:
        yield from _files(find_task(config["upstream"], None))
    yield from task_data_files(path, config)


def task_data_files(path: Path, config: dict[str, Any]) -> Iterator[Path]:
    """The local data files that the YAML file at `path`, which says `config`, names relative to itself."""
    options = config.get("dataset_kwargs") or {}
    for name in nested_strings([config.get("dataset_path"), options.get("data_files"), options.get("data_dir")]):
        for place in map(Path, glob.glob(str(path.parent / name), recursive=True)):
            yield from [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]
