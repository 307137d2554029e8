"""What a run starts from: its configuration, checked, and everything that can be known without the model."""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from svl.checkpoints import export
from svl.checkpoints.fingerprint import checkpoint_fingerprint
from svl.config import load_options, plain_values, round_ratio, training_data, validate_config
from svl.core import SvlError, one_of
from svl.core.errors import out_of_memory
from svl.core.methods import STATISTICS
from svl.data.sample_files import read_samples
from svl.data.samples import Samples, write_samples
from svl.demo import bundled
from svl.evaluation import benchmarks, held_out
from svl.evaluation.settings import EfficiencySettings, TaskOptions
from svl.plugins import import_plugins
from svl.processes import process_count, process_rank
from svl.recovery.base import check_answers
from svl.run.inputs import calibration_source, task_options, told_of
from svl.run.keys import method_identity, method_settings, read_code, stage_code, versions
from svl.run.stages import StageLog
from svl.store.artifacts import Store
from svl.store.files import digest
from svl.store.layout import FINGERPRINTS
from svl.text.redaction import redact_text, redact_values

if TYPE_CHECKING:
    from svl.models.lvlm import Lvlm

COMBINED = ("quantization", "visual_tokens")  # groups of what a pruned model is combined with
SAMPLES_FILE = "samples.parquet"
NAMED_SETTINGS = tuple(
    f"{group}." for group in ("strategy", "selector", "compensation", "recovery", "calibration", *COMBINED)
)


class RunSetup:
    """One configuration, ready to run.

    Attributes:
        cfg: the configuration.
        selector, strategy, compensation, recovery: its methods.
        trackers: where it is mirrored, by name.
        combined: methods by group that the pruned model is combined with; those called `none` are left out.
        store: where finished stages are.
        checkpoint: the folder or hub id that the model is loaded from.
        fingerprint: the checkpoint's content, see svl.checkpoints.fingerprint.
        options: how it is loaded.
        model: all that the model depends on, for keys.
        tasks: how the models are scored, by task.
        task_fingerprints: what the tasks consist of.
        calibrates: whether anything asks for the calibration pass.
        selects: whether the strategy reads statistics, so that the selector has a part in choosing layers.
        probes: what the strategy tries on the model: "probe", "weights".
        rescores: whether it measures the model again after each removal.
        seconds_loading: spent on loading the model, which belongs to no stage.
        log: what is told of stages.
        tried: what svl.run.early_checks has found to work in this run: "layers", "recovery".

    Raises:
        SvlError: on bad input.
    """

    def __init__(self, cfg: DictConfig, log: StageLog | None = None):
        read_code()
        import_plugins()
        self.cfg = cfg = round_ratio(cfg)
        self.log = log or StageLog()
        methods = validate_config(cfg)
        self.selector, self.strategy = methods["selector"], methods["strategy"]
        self.compensation, self.recovery = methods["compensation"], methods["recovery"]
        self.trackers = methods["tracker"].each(self.choice("tracker"))
        self.combined: dict[str, Any] = {group: methods[group] for group in COMBINED if not methods[group].does_nothing}
        if self.combined and self.uses_vllm:
            raise SvlError(f"{' and '.join(self.combined)}: only evaluator=transformers can combine these with pruning")
        if process_rank() == 0:
            methods["tracker"].check()
        self.store = Store(cfg.paths.store, versions(self.recovers))
        self._find_model()
        if cfg.export.path:
            export.check_export_path(cfg.export.path)
        self._find_tasks()
        self._find_needs()
        if self.recovers:
            self.recovery.passes_of_each(process_count())
        if self.needs_samples:
            self.samples  # noqa: B018 (read now, so that bad data is found before the model is loaded)
        if self.recovers:
            check_answers(self.training_samples)
        self.seconds_loading = 0.0
        self.tried: set[str] = set()

    def _find_model(self) -> None:
        model = self.cfg.model
        self.checkpoint = bundled.resolve_bundled(model.path, self.store)
        remembered = self.store.root / FINGERPRINTS
        self.fingerprint = checkpoint_fingerprint(self.checkpoint, model.revision, remembered, model.full_hash)
        commit = self.fingerprint.partition("@")[2] or None  # the very one that keys are made of
        self.options = load_options(model, commit)
        if isinstance(self.options.device_map, str) and process_count() > 1:
            raise SvlError(
                f"model.device_map={self.options.device_map} spreads a model over all devices, but torchrun started "
                f"{process_count()} processes: start one, or leave model.device_map out"
            )
        self.prompt_style = model.prompt
        self.image_processor = plain_values(model.image_processor)
        self.model: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "dtype": model.dtype,
            "layers": model.layers,
            "image_token": model.image_token,
            "code": stage_code("model"),
        }
        if self.options.attn_implementation != "auto":  # another sum of the same products
            self.model["attn_implementation"] = self.options.attn_implementation
        if self.prompt_style != "chat":
            from svl.models.prompts import style_template  # imports torch

            self.model["prompt"] = self.prompt_style
            self.model["prompt_template"] = digest(style_template(self.prompt_style))
        if self.image_processor:
            self.model["image_processor"] = self.image_processor

    def _find_tasks(self) -> None:
        benchmark = self.cfg.benchmark
        self.tasks = task_options(benchmark)
        for task, options in self.tasks.items():
            benchmarks.check_task(task, options)
            benchmarks.check_evaluator(task, options.include_path, self.cfg.evaluator.name)
            said = benchmark.tasks[task].higher_is_better
            benchmarks.check_direction(task, options.metric, said, benchmark.include_path)
        self.task_fingerprints = {
            task: benchmarks.benchmark_fingerprint(task, benchmark.include_path, benchmark.data) for task in self.tasks
        }

    def _find_needs(self) -> None:
        needs = self.strategy.needs | self.compensation.needs
        self.selects = bool(self.strategy.needs.intersection(STATISTICS))
        self.probes = self.strategy.needs & {"probe", "weights"}
        self.rescores = "rescoring" in self.strategy.needs
        self.calibrates = bool(needs.intersection((*STATISTICS, "hidden")))
        statistics = self.strategy.needs.intersection(STATISTICS)
        if self.calibrates:
            statistics |= self.selector.needs
        if not self.cfg.model.offload:  # which has all batches under way at once
            statistics |= set(self.cfg.calibration.statistics)
        for name in statistics:
            one_of("calibration.statistics", name, sorted(STATISTICS))
        self.statistics = sorted(statistics)
        if self.cfg.model.offload and (self.tasks or needs & {"probe", "rescoring"}):
            what = "benchmarks run" if self.tasks else "this strategy tries"
            raise SvlError(f"model.offload leaves the model on disk, but {what} it whole; see README, Large models")

    @property
    def needs_samples(self) -> bool:
        """Whether any stage reads calibration samples."""
        return self.calibrates or self.rescores or "probe" in self.probes or bool(self.cfg.efficiency.repeats)

    @property
    def generated(self) -> int:
        """How many texts of the dense model's own the compensation is fitted to."""
        asked = self.cfg.calibration.generated
        if "hidden" not in self.compensation.needs:
            return 0
        return int(self.compensation.own_texts if asked is None else asked)

    @property
    def compensates(self) -> bool:
        """Whether weights that stay are changed."""
        return not self.compensation.does_nothing

    @property
    def recovers(self) -> bool:
        """Whether the pruned model is trained."""
        return not self.recovery.does_nothing

    @property
    def losses_on(self) -> list[str] | None:
        """What losses are measured on: fingerprints of the samples and of their answers; None if none is."""
        return [self.samples.fingerprint, self.samples.answers] if "probe" in self.probes else None

    @property
    def uses_vllm(self) -> bool:
        """Whether vLLM answers the questions."""
        return bool(self.cfg.evaluator.name == "vllm")

    @property
    def name(self) -> str:
        """What the model is called."""
        return str(self.options.name)

    @property
    def efficiency_settings(self) -> EfficiencySettings:
        """How speed is measured."""
        return EfficiencySettings(**plain_values(self.cfg.efficiency))

    # ----------------------------------------------------------------------------------- samples and model

    @cached_property
    def samples(self) -> Samples:
        """The calibration set, read once."""
        return self._read_samples(self.cfg.calibration)

    @cached_property
    def training_samples(self) -> Samples:
        """What recovery trains on, read once."""
        data = training_data(self.cfg.recovery)
        return self.samples if data.path is None else self._read_samples(data, "recovery.data")

    def _read_samples(self, c: DictConfig, group: str = "calibration") -> Samples:
        """The samples that a group of settings describes, none of which a benchmark may be scored on."""
        with told_of(group):
            source = calibration_source(c)
        held_out.check_not_evaluated_on(c.path, source.hub, self.tasks, group)
        if not source.on_hub:
            with told_of(group):
                return source.read()

        def draw(folder: Path) -> dict[str, Any]:
            with told_of(group):
                write_samples(source.read(), folder / SAMPLES_FILE)
            return {}

        # What was drawn is kept: a run that is repeated needs no hub, and sees the same samples.
        inputs = {**source.identity(), "code": stage_code("data")}
        return read_samples(self.store.make("data", inputs, draw).path / SAMPLES_FILE)

    @cached_property
    def dense(self) -> Lvlm:
        """The model as it comes, loaded on first use."""
        began = time.perf_counter()
        dense = self._load()
        self.seconds_loading += time.perf_counter() - began
        return dense

    def release_model(self) -> None:
        """Forget the loaded model; it is loaded again if need be."""
        self.__dict__.pop("dense", None)

    def _load(self) -> Lvlm:
        from svl.calibration import offload
        from svl.models import loading
        from svl.models.prompts import with_prompt_style

        load = offload.load_offloaded if self.cfg.model.offload else loading.load
        with out_of_memory("loading the model", "set model.dtype=bfloat16, model.device=cpu, or model.offload=true"):
            lvlm = load(self.checkpoint, self.options)
        if self.prompt_style == "chat" and not self.image_processor:
            return lvlm
        return with_prompt_style(lvlm, self.prompt_style, self.image_processor)

    # ------------------------------------------------------------------------------------- names and records

    def combined_identities(self) -> dict[str, Any]:
        """What the pruned model is combined with, for keys."""
        return {group: method_identity(method) for group, method in self.combined.items()}

    def choice(self, group: str) -> str:
        """The name under which a group's option was chosen; Hydra knows none of a list of them (strategy=[tail])."""
        from hydra.core.hydra_config import HydraConfig

        if HydraConfig.initialized() and group in (choices := HydraConfig.get().runtime.choices):
            inner = choices.get(f"{group}@{group}.of")  # of a method around another one
            return f"{choices[group]}-{inner}" if inner else str(choices[group])
        return str(self.cfg[group]["_target_"].split(".")[-2])

    def depends_on_seed(self) -> bool:
        """Whether another `seed` would change any setting of what chooses, measures or changes layers."""
        groups = ["model", "calibration", "selector", "strategy", "compensation", *COMBINED]
        groups += ["recovery"] if self.recovers else []
        other = self.cfg.copy()
        other.seed = self.cfg.seed + 1
        return any(plain_values(self.cfg[group]) != plain_values(other[group]) for group in groups)

    def settings_given(self) -> list[str]:
        """Settings of methods and of calibration that were given on the command line, such as "rank=8"."""
        from hydra.core.hydra_config import HydraConfig

        if not HydraConfig.initialized():
            return []
        words = [word.lstrip("+") for word in HydraConfig.get().overrides.task]
        return [redact_text(word.partition(".")[2]) for word in words if word.startswith(NAMED_SETTINGS)]

    def distinguishing_settings(self) -> dict[str, Any]:
        """What tells runs of one experiment apart, besides names: settings by group."""
        methods = {"strategy": self.strategy, "selector": self.selector, "compensation": self.compensation}
        settings: dict[str, Any] = {
            group: {"_target_": self.cfg[group]["_target_"], **method_settings(method)}
            for group, method in (methods | self.combined).items()
        }
        calibration = self.cfg.calibration
        if self.calibrates or "probe" in self.probes:
            file = Path(calibration.path).name
            settings["calibration"] = {"file": file, "samples": calibration.samples, "seed": calibration.seed}
            if self.generated:
                settings["calibration"]["generated"] = [self.generated, calibration.generated_tokens]
        if self.recovers:
            named = method_settings(self.recovery)
            named = {name: value for name, value in named.items() if name not in self.recovery.unrelated}
            samples = self.training_samples
            file = Path(samples.source).name
            data = {"data": file, "samples": len(samples), "digest": digest([samples.fingerprint, samples.answers])}
            settings["recovery"] = {"_target_": self.cfg.recovery["_target_"], **named, **data}
        if self.combined:
            settings["combined"] = {group: self.choice(group) for group in self.combined}
        settings["model"] = {"dtype": self.options.dtype}
        unusual: dict[str, tuple[Any, Any]] = {
            "protect": (self.options.protect, "auto"),
            "layers": (self.options.layers, None),
            "attn_implementation": (self.options.attn_implementation, "auto"),
            "prompt": (self.prompt_style, "chat"),
            "image_processor": (self.image_processor, {}),
        }
        settings["model"] |= {name: value for name, (value, usual) in unusual.items() if value != usual}
        styles = {task: options.style for task, options in self.tasks.items() if options.style != "default"}
        if styles:
            settings["style"] = styles
        if unusual_evaluation := self._evaluation_settings():
            settings["evaluation"] = unusual_evaluation
        return settings

    def _evaluation_settings(self) -> dict[str, Any]:
        """What changes answers, beside prompts, and is not as usual: caps that are not the task's own, by task."""
        caps = {
            task: options.max_new_tokens
            for task, options in self.tasks.items()
            if options.max_new_tokens not in (None, benchmarks.new_tokens(task, options.include_path))
        }
        frames = {options.frames for options in self.tasks.values()} - {TaskOptions.frames}
        found: dict[str, Any] = {"max_new_tokens": caps} if caps else {}
        if frames:
            found["frames"] = frames.pop()
        if self.uses_vllm:
            found["evaluator"] = redact_values(plain_values(self.cfg.evaluator))
        return found
