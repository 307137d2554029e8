"""The schema of the configuration: the groups that are plain values, with their defaults, and the root.

Groups of methods have none here: their dataclasses are their schemas (see svl.config_methods).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig

from svl.evaluation.settings import EfficiencySettings


def _open_mapping() -> Any:
    """Settings whose names are not known here: Hydra takes any, one by one or together; who uses them checks them."""
    return DictConfig({}, flags={"struct": False})


@dataclass
class Model:
    """What is pruned: a checkpoint folder or hub id."""

    path: str = MISSING  # checkpoint folder or hub id
    name: str | None = None  # in plans and reports; default: last part of the path
    revision: str | None = None  # branch, tag or commit on the hub
    dtype: str = "auto"  # auto (as stored) | float32 | bfloat16 | float16
    device: str = "auto"  # auto (the first accelerator, else the CPU) | cuda:1 | cpu | ...
    device_map: Any = None  # instead of one device: auto | balanced | balanced_low_0 | sequential | {module: device}
    max_memory: Any = None  # of device_map: {device: size}, such as {0: 20GiB, cpu: 60GiB}; null: all that is free
    attn_implementation: str = "auto"  # auto (transformers' choice) | sdpa | eager | flash_attention_2
    offload: bool = False  # leave decoder layers on disk and read each once per calibration pass: for large models
    prompt: str = "chat"  # chat (the template of the checkpoint) | a style of svl.models.prompts
    # its settings, such as `size`: caps visual tokens
    image_processor: dict[str, Any] = field(default_factory=_open_mapping)
    layers: str | None = None  # dotted path of the decoder layers, where structure does not tell
    image_token: Any = None  # the image placeholder or its id, where config and processor do not tell
    protect: Any = "auto"  # layers that must stay: auto (those that others depend on) | none | a list
    trust_remote_code: bool = False  # run model code that comes with the checkpoint
    full_hash: bool = False  # read all of the checkpoint in every run: for storage whose times cannot be relied on


@dataclass
class Calibration:
    """Samples that statistics are measured on."""

    path: str = MISSING  # a file, a folder of images, or (with `format`) a data set of the hub or a copy of it
    format: str | None = None  # how rows become samples, see svl.data.row_formats; null: of own files, by their columns
    name: str | None = None  # configuration of the data set
    split: str = "train"  # of the data set
    revision: str | None = None  # branch, tag or commit of the data set on the hub
    # {name: configuration with the images, column: the one that names an image}
    image_table: dict[str, str] = field(default_factory=_open_mapping)
    images: str | None = None  # folder that paths of pictures and videos are relative to; null: the file's own
    # {prompt: question}: the rows' names of columns
    columns: dict[str, str | None] = field(default_factory=_open_mapping)
    prompt: str | None = None  # asked about images without a question
    turns: str = "all"  # of conversations: all (the last question, after everything before it) | first
    frames: int = 8  # of a video file
    samples: int | None = None  # null: all; else a subset drawn by `seed`
    # of the subset and of generated texts; independent of the root seed, so that random strategies share a calibration
    seed: int = 0
    # texts that the dense model writes itself, which compensations are fitted to beside the samples; null: as many as
    # the compensation asks for
    generated: int | None = None
    generated_tokens: int = 128  # of each
    batch_size: int = 8  # samples at once
    # measured in the one pass: cosine, windows, sublayers, attention; what the methods need is added
    statistics: list[str] = field(default_factory=lambda: ["cosine", "attention"])


@dataclass
class TrainingData(Calibration):
    """Samples that recovery trains on: `recovery.data`."""

    path: Any = None  # as calibration.path; null: the calibration set


@dataclass
class Task:
    """One lmms-eval task of a benchmark."""

    metric: str = MISSING  # the main one, in averages
    higher_is_better: bool | None = None  # what the task's YAML says of the metric; null: whatever it says
    scale: float = 1.0  # divides the main metric in averages (MME: 2000)
    max_new_tokens: int | None = None  # cap per answer; null: the task's own
    style: str = "default"  # variant of the task's prompts


@dataclass
class Benchmark:
    """What models are scored on."""

    name: str = MISSING  # in reports
    tasks: dict[str, Task] = field(default_factory=dict)  # settings by name of an lmms-eval task
    include_path: str | None = None  # folder of task YAML files besides svl's and lmms-eval's own
    data: str | None = None  # folder with copies of the data sets, named like them; null: the hub or its cache
    limit: float | None = None  # first samples of each task only (below 1: share); shown wherever such a result is
    batch_size: int = 16  # questions at once
    max_new_tokens: int | None = None  # cap per answer of all tasks; null: each task's
    frames: int = 8  # of a video that are shown
    likelihood: bool = False  # score closed questions by the likelihood of their options, too: a pass for each


@dataclass
class Evaluator:
    """What answers the questions."""

    name: str = "transformers"  # transformers | vllm
    options: dict[str, Any] = field(default_factory=_open_mapping)  # of vllm.LLM


@dataclass
class Paths:
    """Where results go."""

    outputs: str = MISSING  # folders of runs and sweeps
    store: str = MISSING  # finished stages, which runs share


@dataclass
class Export:
    """The pruned checkpoint."""

    path: str | None = None  # folder for it; null: none is written


@dataclass
class Svl:
    """The root."""

    model: Model = field(default_factory=Model)
    calibration: Calibration = field(default_factory=Calibration)
    selector: Any = field(default_factory=_open_mapping)
    strategy: Any = field(default_factory=_open_mapping)
    compensation: Any = field(default_factory=_open_mapping)
    recovery: Any = field(default_factory=_open_mapping)
    quantization: Any = field(default_factory=_open_mapping)
    visual_tokens: Any = field(default_factory=_open_mapping)
    benchmark: Benchmark = field(default_factory=Benchmark)
    evaluator: Evaluator = field(default_factory=Evaluator)
    efficiency: EfficiencySettings = field(default_factory=EfficiencySettings)
    tracker: Any = field(default_factory=_open_mapping)
    paths: Paths = field(default_factory=Paths)
    export: Export = field(default_factory=Export)
    name: str | None = None
    ratio: float = 0.25
    n_remove: int | None = None
    seed: int = 0
    together: int = 1
