"""`svl doctor model=... calibration=... benchmark=...`: one page; exit code 1 if a run of it cannot work."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from svl import config
from svl.calibration.encoding import encode_samples
from svl.data.samples import Sample, Samples
from svl.doctor.data_checks import examine_benchmarks, examine_calibration, longest_text
from svl.doctor.findings import Section, can_work, page
from svl.doctor.memory import Load, Need, Training, in_words, stage_needs
from svl.doctor.model_checks import Examined, asked_removals, asked_training, examine_model
from svl.models.devices import find_device
from svl.plugins import import_plugins
from svl.run.keys import versions
from svl.run.messages import config_folders
from svl.store.artifacts import Store

LIBRARIES = (
    *("torch", "transformers", "datasets", "lmms_eval", "accelerate", "vllm", "wandb", "torchao"),
    "mlflow-skinny",  # the extra, which the whole of MLflow brings, too
)
GUESSED_TOKENS = 1024  # of a sample with one picture, where none is here to be counted
GUESSED_ANSWER = 32  # tokens, where the benchmark does not say
USAGE = """svl doctor: what of a configuration will work, found out before anything heavy.

  svl doctor model=llava_15_7b
  svl doctor model=local model.path=... calibration=local calibration.path=... benchmark=pope ratio=0.2

Takes the settings of a run. Reads configs, headers, cards and calibration files, but no weights; works offline on
folders and on the hub's cache. Exit code 1 if something cannot work."""


def run_doctor() -> None:
    """Examine the configuration that the command line describes, and print the page; exit code 1 if it cannot work.

    Raises:
        SvlError: if it cannot be composed.
    """
    words = sys.argv[2:]
    if set(words) & {"--help", "-h"}:
        print(USAGE)
        return
    for name in ("huggingface_hub", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)  # of a hub that does not answer, the page says enough
    import_plugins()
    sections = examine(compose(words))
    print(page(sections))
    if not can_work(sections):
        sys.exit(1)


def compose(words: Sequence[str]) -> DictConfig:
    """The configuration of these overrides."""
    where = f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in config_folders()[1:])}]"
    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        return config.round_ratio(hydra.compose("config", overrides=[where, *words]))


def examine(cfg: DictConfig) -> list[Section]:
    """Everything that can be said of a configuration."""
    libraries, methods = Section("libraries"), Section("settings and methods")
    model, memory = Section(f"model {cfg.model.path}"), Section("memory")
    calibration, benchmark = Section("calibration"), Section(f"benchmark {cfg.benchmark.name}")
    _examine_libraries(libraries)
    needs: frozenset[str] = frozenset()
    with methods.examined("the configuration"):
        config.validate_config(cfg)
        needs = config.build_method(cfg.strategy, "strategy").needs
        methods.ok("every setting is known, and every method can be built")
    store = Store(cfg.paths.store, versions())
    examined = examine_model(cfg, store, model)
    samples = examine_calibration(cfg, calibration)
    if examined:
        with memory.examined("memory"):
            _examine_memory(cfg, examined, samples, needs, memory)
    examine_benchmarks(cfg, benchmark)
    return [libraries, methods, model, calibration, benchmark, memory]


def _examine_libraries(section: Section) -> None:
    section.ok(f"Python {platform.python_version()}")
    for name in LIBRARIES:
        try:
            section.ok(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            section.note(f"{name} is not installed")


def _count_tokens(examined: Examined, sample: Sample) -> int:
    """Tokens of a sample, as the processor makes them."""
    inputs, _, _ = encode_samples(examined.lvlm, [sample])
    return int(inputs["input_ids"].shape[1])


def _examine_memory(
    cfg: DictConfig, examined: Examined, samples: Samples | None, needs: frozenset[str], section: Section
) -> None:
    """What each stage needs, beside what there is; `needs` are the strategy's."""
    sample = longest_text(samples)
    tokens = GUESSED_TOKENS if sample is None else _count_tokens(examined, sample)
    told = f"{tokens} tokens in the longest sample" if sample else f"samples are not here: {tokens} tokens are assumed"
    load = Load(
        samples=len(samples) if samples else cfg.calibration.samples or 0,
        tokens=tokens,
        calibration_batch=cfg.calibration.batch_size,
        evaluation_batch=cfg.benchmark.batch_size,
        new_tokens=cfg.benchmark.max_new_tokens or GUESSED_ANSWER,
        windows="windows" in needs.union(cfg.calibration.statistics),
        probes="probe" in needs and "gradients" not in needs,
        gradients="gradients" in needs,
    )
    section.note(f"lower bounds in these terms; {told}, calibration.batch_size={load.calibration_batch}")
    n_remove = asked_removals(cfg, examined.shape.layers)
    room = _room(cfg)
    for need in stage_needs(examined.shape, load, n_remove, _training(cfg, examined, sample, n_remove)):
        _compare(need, room[need.place], section)


def _training(cfg: DictConfig, examined: Examined, sample: Sample | None, n_remove: int) -> Training | None:
    """What recovery does, with answers as long as that of `sample`; None if nothing is trained."""
    recovery = config.build_method(cfg.recovery, "recovery")
    if not recovery.heals or not n_remove:
        return None
    answer = GUESSED_ANSWER
    if sample is not None and sample.plain:
        answer = _count_tokens(examined, sample)
    elif sample is not None and sample.answer:
        answer = len(examined.lvlm.tokenizer(sample.answer).input_ids)
    return asked_training(examined.lvlm, recovery, n_remove, answer)


def _compare(need: Need, room: int | None, section: Section) -> None:
    text = f"{need.stage}: {in_words(need.bytes)} on the {need.place} ({need.formula})"
    if room is None:
        section.note(text)
    elif need.bytes <= room:
        section.ok(f"{text}; there are {in_words(room)}")
    elif need.stage in ("load", "export"):
        section.fails(f"{text}; there are {in_words(room)}")
    else:
        section.note(f"{text}; there are only {in_words(room)}: lower batch size or samples")


def _room(cfg: DictConfig) -> dict[str, int | None]:
    """Bytes that there are: of the device's memory, of the CPU's, and of the disk that an export goes to."""
    device = find_device(cfg.model.device)
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = None
    if cfg.model.device_map is not None:  # device by device, transformers decides
        memory = None
    elif device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[1]
    elif device.type == "cpu":
        memory = host
    target = Path(cfg.export.path or ".").absolute()
    while not target.exists():
        target = target.parent
    return {"device": memory, "host": host, "disk": shutil.disk_usage(target).free}
