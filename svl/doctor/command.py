"""`svl doctor model=... calibration=... benchmark=...`: one page; exit code 1 if a run of it cannot work."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from svl import config
from svl.data.samples import Samples
from svl.doctor.data_checks import examine_benchmarks, examine_samples, longest_text
from svl.doctor.findings import Section, can_work, page
from svl.doctor.memory import GUESSED_ANSWER, GUESSED_TOKENS, Load, Need, in_words, stage_needs
from svl.doctor.model_checks import Examined, examine_model
from svl.doctor.recovery_checks import count_tokens, examine_recovery
from svl.models.devices import find_device
from svl.plugins import import_plugins
from svl.run.keys import versions
from svl.run.messages import compose
from svl.store.artifacts import Store

LIBRARIES = (
    *("torch", "transformers", "datasets", "lmms_eval", "accelerate", "peft", "vllm", "wandb", "torchao"),
    "mlflow-skinny",  # the extra, which the whole of MLflow brings, too
)
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
    sections = examine(config.round_ratio(compose(words)))
    print(page(sections))
    if not can_work(sections):
        sys.exit(1)


def examine(cfg: DictConfig) -> list[Section]:
    """Everything that can be said of a configuration."""
    libraries, settings = Section("libraries"), Section("settings and methods")
    model, memory = Section(f"model {cfg.model.path}"), Section("memory")
    calibration, benchmark = Section("calibration"), Section(f"benchmark {cfg.benchmark.name}")
    recovery = Section("recovery")
    _examine_libraries(libraries)
    methods: dict[str, Any] = {}
    with settings.examined("the configuration"):
        methods = config.validate_config(cfg)
        settings.ok("every setting is known, and every method can be built")
    store = Store(cfg.paths.store, versions())
    examined = examine_model(cfg, store, model)
    samples = examine_samples(cfg, cfg.calibration, "calibration", calibration)
    heals, training = bool(methods) and not methods["recovery"].does_nothing, None
    if heals:
        asked = config.asked_removals(cfg, examined.shape.layers) if examined else 1
        model_alone = examined.lvlm if examined else None
        training = examine_recovery(cfg, methods["recovery"], model_alone, asked, samples, recovery)
    if examined:
        needs = methods["strategy"].needs if methods else frozenset()
        with memory.examined("memory"):
            n_remove = config.asked_removals(cfg, examined.shape.layers)
            load, room = _count_load(cfg, examined, samples, needs, memory), _room(cfg)
            for need in stage_needs(examined.shape, load, n_remove, training):
                _compare(need, room[need.place], memory)
    examine_benchmarks(cfg, benchmark)
    return [libraries, settings, model, calibration, *([recovery] if heals else []), benchmark, memory]


def _examine_libraries(section: Section) -> None:
    section.ok(f"Python {platform.python_version()}")
    for name in LIBRARIES:
        try:
            section.ok(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            section.note(f"{name} is not installed")


def _count_load(
    cfg: DictConfig, examined: Examined, samples: Samples | None, needs: frozenset[str], section: Section
) -> Load:
    """How much a run does, of which the section tells; `needs` are the strategy's."""
    tokens = count_tokens(examined.lvlm, longest_text(samples)) if samples else GUESSED_TOKENS
    told = f"{tokens} tokens in the longest sample" if samples else f"samples are not here: {tokens} tokens are assumed"
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
    return load


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
    memory, alone = None, cfg.model.device_map is None  # of several devices, transformers decides
    if alone and device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[1]
    elif alone and device.type == "cpu":
        memory = host
    target = Path(cfg.export.path or ".").absolute()
    while not target.exists():
        target = target.parent
    return {"device": memory, "host": host, "disk": shutil.disk_usage(target).free}
