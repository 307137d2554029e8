"""The data of a configuration: calibration samples and benchmarks, found or not."""

from __future__ import annotations

from omegaconf import DictConfig

from svl.core.errors import SvlError
from svl.data.samples import Sample, Samples
from svl.doctor.findings import Section
from svl.evaluation import benchmarks, held_out
from svl.evaluation.settings import TaskOptions
from svl.run.inputs import calibration_source, task_options, told_of


def examine_samples(cfg: DictConfig, settings: DictConfig, group: str, section: Section) -> Samples | None:
    """The samples that the settings of a group describe, if they are files here; of a data set of the hub, whether it
    can be had."""
    found: Samples | None = None
    with section.examined(f"{group}.path={settings.path}"), told_of(group):
        source = calibration_source(settings)
        held_out.check_not_evaluated_on(settings.path, source.hub, task_options(cfg.benchmark), group)
        if not source.on_hub:
            found = source.read()
            _describe(found, section)
        else:
            _ask_hub(settings, section)
    return found


def _describe(samples: Samples, section: Section) -> None:
    pictured = sum(bool(sample.images) for sample in samples)
    several = sum(len(sample.images) > 1 for sample in samples)
    answered = sum(bool(sample.answer.strip()) or sample.plain for sample in samples)
    text = f"{len(samples)} samples from '{samples.source}': {pictured} with a picture"
    section.ok(f"{text}, {several} with several, {sum(bool(s.frames) for s in samples)} with a video")
    if answered < len(samples):
        section.note(f"{len(samples) - answered} have no answer: what measures losses or trains needs answers")


def _ask_hub(settings: DictConfig, section: Section) -> None:
    """Whether a data set and its split are there, by its description alone."""
    from datasets import load_dataset_builder

    builder = load_dataset_builder(settings.path, settings.name, revision=settings.revision)
    if settings.image_table:
        load_dataset_builder(settings.path, settings.image_table.name, revision=settings.revision)
    splits = sorted(builder.info.splits or builder.config.data_files or {})
    if splits and settings.split.partition("[")[0] not in splits:
        raise SvlError(f"'{settings.path}' has no split '{settings.split}'; it has: {', '.join(splits)}")
    section.ok(f"data set '{settings.path}' on the hub or in its cache; rows are streamed, none was read")
    licence = builder.info.license
    section.note(f"licence: {licence}" if licence else "its card names no licence")


def examine_benchmarks(cfg: DictConfig, section: Section) -> None:
    """Each task: whether its settings can be scored, and whether its data are here or on the hub."""
    for task, options in task_options(cfg.benchmark).items():
        with section.examined(f"task '{task}'"):
            benchmarks.check_settings(task, options)
            benchmarks.check_evaluator(task, options.include_path, cfg.evaluator.name)
            benchmarks.check_data(task, options)
            section.ok(f"{task}: {_where(task, options)}")
    if not cfg.benchmark.tasks:
        section.note("none: the model is pruned, but not scored")


def _where(task: str, options: TaskOptions) -> str:
    settings = benchmarks.task_settings(task, options.include_path)
    path = settings.get("dataset_path") or ""
    if copy := benchmarks.local_data_copy(settings, options.data):
        return f"a copy in '{copy}'"
    return f"{path} on the hub or in its cache" if benchmarks.is_hub_name(path) else "files beside its YAML"


def longest_text(samples: Samples, answered: bool = False) -> Sample:
    """The sample with the longest text among those with most pictures; if `answered`, its answer is text, too."""

    def size(sample: Sample) -> tuple[int, int]:
        text = sample.prompt + (sample.answer or "" if answered else "")
        return len(sample.images) + len(sample.frames), len(text)

    return max(samples, key=size)
