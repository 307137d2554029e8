"""The story of a run: calibrate, plan, compensate, evaluate, record. One function per stage, each kept in the store.

A stage's inputs are written out in its call to `store.make`; what is there already is read instead of computed, so
a run that was interrupted, and one that shares stages with another, needs no special case. The model is loaded only
when a stage has to compute.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import logging
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from svl import benchmarks, bundled, export, parallel, results
from svl.config import PACKAGE, describe, validate
from svl.core import Patch, Plan, Probe, Stats, SvlError, layers_to_remove, one_of
from svl.data import Examples, draw, read_samples, save
from svl.record import Record
from svl.store import Entry, Store, checkpoint_fingerprint, digest, file_digest

if TYPE_CHECKING:
    from svl.loading import Lvlm

log = logging.getLogger(__name__)
COMBINED = ("quantization", "visual_tokens")  # groups of what a pruned model is combined with
MEASURED = frozenset({"cosine", "windows", "attention"})  # by the calibration pass
PACKAGES = ("svl", "torch", "transformers", "lmms_eval", "datasets", "hydra-core", "wandb")


SAMPLES = "samples.parquet"
SPECTRUM = 128  # singular values of a compensation that are kept


class Run:
    """One configuration on its way through the stages. Raises SvlError on bad input before any heavy work."""

    def __init__(self, cfg: DictConfig, folder: Path):
        self.cfg, self.folder = cfg, folder
        parts = validate(cfg)
        self.selector, self.strategy, self.compensation = parts["selector"], parts["strategy"], parts["compensation"]
        self.tracker = parts["tracker"]
        extras = {group: parts[group] for group in COMBINED}
        self.combined = {group: part for group, part in extras.items() if not type(part).__module__.endswith(".none")}
        if self.combined and cfg.evaluator.name == "vllm":
            raise SvlError(f"{' and '.join(self.combined)}: only evaluator=transformers can combine these with pruning")
        self.store = Store(cfg.paths.store, versions())
        self.loading = 0.0  # seconds spent on loading the model, which are no stage's own
        model = cfg.model
        one_of("model.dtype", model.dtype, ("auto", "float32", "bfloat16", "float16"))
        self.protect = list(model.protect) if OmegaConf.is_list(model.protect) else model.protect
        if not isinstance(self.protect, list):
            one_of("model.protect", self.protect, ("auto", "none"))
        self.path = bundled.resolve(model.path, self.store)
        self.fingerprint = checkpoint_fingerprint(self.path, model.revision, self.store.root / "fingerprint")
        located = {"layers": model.layers, "image_token": model.image_token}
        self.model = {"fingerprint": self.fingerprint, "dtype": model.dtype, **located}
        self.written = {"prompt": model.prompt} if model.prompt != "chat" else {}  # how prompts and images are prepared
        self.written |= {"image_processor": describe(model.image_processor)} if model.image_processor else {}
        self.model |= self.written
        self.name = model.name or Path(model.path).name
        if cfg.export.path:
            export.check(cfg.export.path)
        own, data = cfg.benchmark.include_path, cfg.benchmark.data
        for task, settings in cfg.benchmark.tasks.items():
            benchmarks.check_metric(task, settings.metric, own)
            benchmarks.check_style(task, settings.style, own)
        self.tasks = {t: benchmarks.fingerprint(t, own, data) for t in cfg.benchmark.tasks}
        needs = self.strategy.needs | self.compensation.needs
        self.measures = bool(self.strategy.needs & MEASURED)  # otherwise the selector plays no part in choosing layers
        self.needs = needs & (MEASURED | {"hidden"})  # what asks for the calibration pass
        if model.offload and (cfg.benchmark.tasks or "probe" in needs):
            what = "benchmarks run" if cfg.benchmark.tasks else "this strategy tries"
            raise SvlError(f"model.offload leaves the model on disk, but {what} it whole; see README, Large models")
        if self.needs:
            self.needs |= self.selector.needs
        if self.needs or "probe" in needs or cfg.efficiency.repeats:
            self.examples  # noqa: B018 (read now, so that bad data is found before the model is loaded)

    @cached_property
    def examples(self) -> Examples:
        """The calibration set."""
        c, tasks = self.cfg.calibration, self.cfg.benchmark.tasks
        benchmarks.check_apart(c.path, c.split if c.format else None, tasks, self.cfg.benchmark.include_path)
        if c.format is None:
            return read_samples(c.path, c.samples, c.seed, c.prompt)
        source = {
            "format": c.format, "n": c.samples, "seed": c.seed, "name": c.name, "split": c.split,
            "revision": c.revision, "prompt": c.prompt, "images": dict(c.images) or None,
        }  # fmt: skip
        if Path(c.path).expanduser().is_dir():
            return draw(c.path, **source)
        # what was drawn is kept: a run that is repeated needs no hub, and sees the same samples
        drawn = lambda folder: save(draw(c.path, **source), folder / SAMPLES)  # noqa: E731
        kept = self.store.make("data", {"path": c.path, **source}, drawn)
        return read_samples(kept.path / SAMPLES)

    @cached_property
    def dense(self) -> Lvlm:
        """The model as it comes."""
        from svl import loading, offload

        model, began = self.cfg.model, time.perf_counter()
        commit = self.fingerprint.partition("@")[2] or model.revision  # the very one that keys are made of
        lvlm: Lvlm = (offload.load if model.offload else loading.load)(
            self.path, dtype=model.dtype, device=model.device, revision=commit, layers=model.layers,
            image_token=model.image_token, protect=self.protect, name=self.name,
            trust_remote_code=model.trust_remote_code,
        )  # fmt: skip
        self.loading += time.perf_counter() - began
        if self.written:
            from svl.prompts import styled

            lvlm = styled(lvlm, model.prompt, self.written.get("image_processor"))
        return lvlm

    def make(self, stage: str, inputs: dict[str, Any], build: Callable[[Path], dict[str, Any]]) -> Entry:
        """`store.make`, with the seconds that the stage itself took as its output `work`."""

        def timed(folder: Path) -> dict[str, Any]:
            began, loading = time.perf_counter(), self.loading
            output = build(folder)
            return {**output, "work": round(time.perf_counter() - began - (self.loading - loading), 3)}

        return parallel.make(self.store, stage, inputs, timed, shared=stage == "score")

    def show(self, items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
        """Progress over batches, with the time left."""
        return tqdm(items, desc=f"  {what}", total=total, leave=False, dynamic_ncols=True, disable=None)

    # ------------------------------------------------------------------------------------------ stages

    def calibrate(self) -> Entry | None:
        """Stage `stats`: per-token measurements; None if nothing asks for data. Independent of method and ratio."""
        if not self.needs:
            return None
        extra = () if self.cfg.model.offload else self.cfg.calibration.statistics  # all batches are under way at once
        asked = sorted(set(extra) | (self.needs & MEASURED))

        def build(folder: Path) -> dict[str, Any]:
            from svl import calibrate, surgery

            for name in asked:
                one_of("calibration.statistics", name, calibrate.STATISTICS)
            self.n_remove(self.statistics(None))  # what can be found wrong now should not cost a calibration
            calibrate.check_selector(self.dense, self.examples, self.selector)
            if self.compensation.needs:
                surgery.check_foldable(self.dense)
            size = self.cfg.calibration.batch_size
            calibrate.calibrate(
                self.dense, self.examples, statistics=asked, batch_size=size, folder=folder, show=self.show
            )
            calibrate.keep_example(self.dense, self.examples, folder)
            anatomy = self.dense.anatomy
            found = {"removable": anatomy.removable, "protected": anatomy.protected, "n_layers": anatomy.n_layers}
            return {"samples": len(self.examples), **found}

        inputs = {"model": self.model, "examples": self.examples.fingerprint, "statistics": asked}
        inputs["protect"] = self.protect
        return self.done("calibrate", self.make("stats", inputs, build))

    def statistics(self, entry: Entry | None) -> Stats:
        """What a strategy reads: the calibration seen through the selector, or the bare depth of the model."""
        if entry is None:
            anatomy = self.dense.anatomy
            return Stats(anatomy.n_layers, anatomy.removable)
        from svl.calibrate import TraceFolder

        return Stats(entry.output["n_layers"], tuple(entry.output["removable"]), TraceFolder(entry.path), self.selector)

    def n_remove(self, stats: Stats) -> int:
        """How many layers go: `n_remove`, or the ratio of the model's depth.

        Raises:
            SvlError: if that many may not be removed.
        """
        n = layers_to_remove(self.cfg.ratio, stats.n_layers) if self.cfg.n_remove is None else self.cfg.n_remove
        stats.candidates(n)
        return n

    def plan(self, stats: Entry | None) -> Entry:
        """Stage `plan`: which layers go."""
        cfg, source = self.cfg, stats if self.measures else None
        tries = self.strategy.needs & {"probe", "weights"}
        losses = [self.examples.fingerprint, self.examples.answers] if "probe" in tries else None

        def build(folder: Path) -> dict[str, Any]:
            measured = self.statistics(source)
            n_remove = self.n_remove(measured)
            if tries:
                measured = dataclasses.replace(measured, probe=self.probe(losses))
            plan = self.strategy.plan(measured, n_remove)
            if source:
                score_example(measured, source.path, folder)
            data = self.examples.fingerprint if source or losses else None
            honoured = cfg.n_remove is None and len(plan.removed) == n_remove
            protected = source.output["protected"] if source else self.dense.anatomy.protected
            provenance = {
                **plan.provenance,
                "ratio": cfg.ratio if honoured else len(plan.removed) / plan.n_layers, "n_remove": len(plan.removed),
                "model_fingerprint": self.fingerprint, "calibration": data,
            }  # fmt: skip
            provenance |= {"protected": {str(i): why for i, why in protected.items()}} if protected else {}
            (folder / "plan.json").write_text(dataclasses.replace(plan, provenance=provenance).to_json())
            return {"removed": plan.removed}

        inputs = {
            "model": self.model, "stats": source and source.key, "selector": source and identity(self.selector),
            "strategy": identity(self.strategy), "ratio": cfg.ratio if cfg.n_remove is None else None,
            "n_remove": cfg.n_remove, "protect": self.protect, **({"losses": losses} if losses else {}),
        }  # fmt: skip
        entry = self.make("plan", inputs, build)
        removed = entry.output["removed"]
        return self.done("plan", entry, f"removes layers {removed}, {len(removed)} in all")

    def probe(self, losses: list[str] | None) -> Probe:
        """The dense model to try removals on; whatever it measures is kept in the store, so that searches resume."""
        from svl.probe import ModelProbe

        def remember(what: str, inputs: dict[str, Any], compute: Callable[[], Any]) -> Any:
            entry = self.make(
                "probe", {"model": self.model, "losses": losses, "what": what, **inputs}, lambda _: {"value": compute()}
            )
            return entry.output["value"]

        return ModelProbe(self.dense, self.examples if losses else None, remember=remember, show=self.show)

    def compensate(self, stats: Entry | None, plan: Plan) -> Entry | None:
        """Stage `patch`: updates of kept weights; None if no layer is removed."""
        if not plan.removed:
            return None

        def build(folder: Path) -> dict[str, Any]:
            from svl import surgery
            from svl.calibrate import Activations

            hidden = None
            if self.compensation.needs:
                surgery.check_foldable(self.dense)
                size = self.cfg.calibration.batch_size
                hidden = Activations(self.dense, self.examples, self.statistics(stats), size, self.show)
            patch: Patch = self.compensation.fit(hidden, plan)
            if patch:
                surgery.save_patch(patch, folder / "patch.safetensors")
            return {
                "notes": patch.notes,
                "spectra": spectra(patch),
                "changed": sorted(
                    {f"{layer}.{role}" for layer, role in patch.updates} | {f"{layer}.*" for layer in patch.blends}
                ),
            }

        source = stats if self.compensation.needs else None
        inputs = {
            "model": self.model, "stats": source and source.key, "selector": source and identity(self.selector),
            "removed": plan.removed, "compensation": identity(self.compensation),
            **({"merges": plan.merges} if plan.merges else {}),
        }  # fmt: skip
        entry = self.make("patch", inputs, build)
        for note in entry.output["notes"]:
            log.warning("  compensation: %s", note)
        return self.done("compensate", entry, f"changes {', '.join(entry.output['changed']) or 'nothing'}")

    def check(self, plan: Plan) -> None:
        """Stage `check`: without these layers, the model computes what it computes when it skips them.

        Raises:
            SvlError: if it does not.
        """
        if not plan.removed:
            return
        if self.cfg.model.offload:
            log.warning("  model.offload: the check that pruning equals skipping layers is left out")
            return

        def build(folder: Path) -> dict[str, Any]:
            from svl import surgery

            inputs, pruned = surgery.example(self.dense), surgery.apply(self.dense, plan)
            return {"difference": surgery.check(self.dense, pruned, plan, inputs)}

        entry = self.make("check", {"model": self.model, "protect": self.protect, "removed": plan.removed}, build)
        self.done("check", entry, f"differs by {entry.output['difference']:.1g} from skipping these layers")

    def prune(self, plan: Plan, patch: Entry | None) -> Lvlm:
        """The pruned model, sharing the dense one's tensors."""
        from svl import surgery

        return surgery.apply(self.dense, plan, self.patch(patch))

    def combine(self, lvlm: Lvlm) -> Lvlm:
        """A model with everything that pruning is combined with."""
        for part in self.combined.values():
            lvlm = part.apply(lvlm)
        return lvlm

    def patch(self, entry: Entry | None) -> Patch | None:
        """The patch that a stage stored, if there is one."""
        from svl import surgery

        file = entry.path / "patch.safetensors" if entry else None
        return surgery.load_patch(file) if file and file.exists() else None

    def score(self, plan: Plan, patch: Entry | None, combined: bool = False) -> dict[str, Entry]:
        """Stage `score`, one artifact per task: equal layers and weights are evaluated once, whatever led to them."""
        pruned = cache(lambda: self.combine(self.prune(plan, patch)) if combined else self.prune(plan, patch))
        served = cache(lambda: self.serve(plan, patch))
        what = f"{len(plan.removed)} of {plan.n_layers} layers removed" if plan.removed or combined else "dense"

        def evaluate(task: str) -> Entry:
            options = self.evaluation(task)

            def build(folder: Path) -> dict[str, Any]:
                if not self.answers(task):
                    from svl.perplexity import evaluate as read

                    names = ("metric", "limit", "batch_size", "include_path", "describe")
                    scores = read(pruned(), task, folder=folder, **{name: options[name] for name in names})
                else:
                    from svl.evaluate import evaluate

                    scores = evaluate(served() if self.serves else pruned(), task, folder=folder, **options)
                return {**scores, "params": pruned().parameters()}

            entry = self.make("score", self.score_inputs(plan, patch, task, combined), build)
            metric = options["metric"]
            value = entry.output["metrics"][metric]["value"]
            shown = "undefined" if value is None else f"{value:.3f}"
            return self.done("evaluate", entry, f"{what}: {task} {metric} {shown}")

        try:
            return {task: evaluate(task) for task in self.tasks}
        finally:
            if served.cache_info().currsize:
                served().close()

    @property
    def serves(self) -> bool:
        """Whether vLLM answers."""
        return bool(self.cfg.evaluator.name == "vllm")

    def answers(self, task: str) -> bool:
        """Whether a task asks for answers; else it measures perplexity."""
        return benchmarks.settings(task, self.cfg.benchmark.include_path).get("output_type") != "perplexity"

    def evaluation(self, task: str) -> dict[str, Any]:
        """Arguments of svl.evaluate.evaluate."""
        benchmark, where = self.cfg.benchmark, {"describe": f"  {task}"}
        settings = benchmark.tasks[task]
        cap, limit = benchmark.max_new_tokens or settings.max_new_tokens, benchmark.limit
        limit = int(limit) if limit is not None and limit >= 1 else limit
        return {
            "metric": settings.metric, "limit": limit, "max_new_tokens": cap, "style": settings.style,
            "batch_size": benchmark.batch_size, "include_path": benchmark.include_path, "data": benchmark.data, **where,
        }  # fmt: skip

    def score_inputs(self, plan: Plan, patch: Entry | None, task: str, combined: bool = False) -> dict[str, Any]:
        """What a score depends on."""
        file, options = patch.manifest["files"].get("patch.safetensors") if patch else None, self.evaluation(task)
        inputs = {"model": self.model, "removed": plan.removed, "weights": file[1] if file else None, "task": task}
        inputs |= {"benchmark": self.tasks[task]}
        inputs |= {name: options[name] for name in ("metric", "limit", "max_new_tokens")}
        inputs |= {} if options["style"] == "default" else {"style": options["style"]}
        inputs |= {"combined": self.identities()} if combined else {}
        return inputs | ({"evaluator": describe(self.cfg.evaluator)} if self.serves else {})

    def efficiency(self, plan: Plan, patch: Entry | None) -> Entry | None:
        """Stage `efficiency`: what the pruned model costs beside the dense one; None if that is not asked for.

        Clocks tell of a machine, so unlike other stages' its key has the device and the versions.
        """
        settings = describe(self.cfg.efficiency)
        if not settings["repeats"] or not (plan.removed or self.combined) or parallel.rank() > 0:
            return None

        def build(folder: Path) -> dict[str, Any]:
            from svl.measure import measure

            example = next((e for e in self.examples.items if e.image_bytes is not None), self.examples.items[0])
            image = example.image if example.image_bytes is not None and self.dense.sees else None
            model = self.combine(self.prune(plan, patch))
            return measure(self.dense, model, example.prompt, image, show=self.show, **settings)

        from svl.loading import find_device, place

        inputs = {
            "model": self.model, "removed": plan.removed, "weights": patch and patch.key, "settings": settings,
            "examples": self.examples.fingerprint, "versions": self.store.versions,
            "device": place(find_device(self.cfg.model.device), settings["batch_size"]),
            **({"combined": self.identities()} if self.combined else {}),
        }  # fmt: skip
        entry = self.make("efficiency", inputs, build)
        parts = ", ".join(f"{part} x{ratio['value']:.2f}" for part, ratio in entry.output["speedup"].items())
        return self.done("measure", entry, f"{parts} (ideal x{entry.output['ideal']:.2f})")

    def serve(self, plan: Plan, patch: Entry | None) -> Any:
        """The model in vLLM, which reads checkpoints: the dense one's own, or a temporary export."""
        from svl.evaluate import served
        from svl.prompts import STYLES

        folder, made = Path(self.path), self.store.root / "tmp" / f"served-{os.getpid()}"
        if plan.removed:
            shutil.rmtree(made, ignore_errors=True)
            folder = self.write(plan, patch, made)
        benchmark, options = self.cfg.benchmark, describe(self.cfg.evaluator.options)
        try:
            return served(str(folder), benchmark.batch_size, options, STYLES.get(self.cfg.model.prompt))
        finally:  # the weights are read
            shutil.rmtree(made, ignore_errors=True)

    # ----------------------------------------------------------------------------------------- record

    def prepare(self) -> tuple[Entry | None, Entry, Plan, Entry | None]:
        """All stages before the first evaluation: statistics, the stored plan, the plan, and the patch."""
        stats = self.calibrate()
        planned = self.plan(stats)
        plan = Plan.from_json((planned.path / "plan.json").read_text())
        self.check(plan)
        return stats, planned, plan, self.compensate(stats, plan)

    def execute(self) -> dict[str, Any]:
        """All stages; the run's result, also written to the output folder as result.json with plan.json."""
        began = time.perf_counter()
        stats, planned, plan, patch = self.prepare()
        # Names are of this run: another one, with the same settings under other names, may have stored the plan.
        names = {"strategy": self.choice("strategy"), "selector": self.choice("selector") if self.measures else None}
        made = {**names, "model": self.name, **plan.provenance}
        plan = dataclasses.replace(plan, provenance=made)
        (self.folder / "plan.json").write_text(plan.to_json())
        dense = self.score(Plan(plan.n_layers, ()), None)
        pruned = self.score(plan, patch, combined=bool(self.combined))
        measured = self.efficiency(plan, patch)
        if parallel.rank() > 0:  # the first process does the rest
            return {}
        pairs = {task: (pruned[task], dense[task]) for task in pruned}
        if (plan.removed or self.combined) and pruned:
            (self.folder / "flips.md").write_text(results.flips(pairs, ("pruned", "dense")), encoding="utf-8")
        identification = {
            "name": self.cfg.name, "model": self.name, "model_fingerprint": self.fingerprint,
            **{group: self.choice(group) for group in ("strategy", "compensation")},
            "selector": self.choice("selector") if self.needs else None,
            "ratio": made["ratio"], "n_remove": made["n_remove"], "seed": self.cfg.seed,
            "limit": next((entry.output["limit"] for entry in pruned.values()), None),
        }  # fmt: skip
        stages: dict[str, list[Entry | None]]
        stages = {"calibrate": [stats], "plan": [planned], "compensate": [patch], "evaluate": [*pruned.values()]}
        stages |= {"measure": [measured]} if measured else {}
        settings = self.settings()
        keys = {stage: [e.key for e in entries if e] for stage, entries in stages.items()}
        keys["dense"] = [e.key for e in dense.values()]
        scales = {task: self.cfg.benchmark.tasks[task].scale for task in self.tasks}

        def build(folder: Path) -> dict[str, Any]:
            if stats and (planned.path / "example.json").exists():
                for file in (planned.path / "example.json", stats.path / "example.png"):
                    (folder / file.name).write_bytes(file.read_bytes())
            return {
                **identification,
                "plan": json.loads(plan.to_json()),
                "cost": results.cost(pruned, dense, plan),
                "efficiency": measured and measured.output,
                **results.summarise(pruned, dense, scales),
                "compensated": patch.output["changed"] if patch else [],
                "seconds": {s: round(sum(e.output["work"] for e in es if e), 3) for s, es in stages.items()},
                "settings": settings,
                "keys": keys,
                "versions": next(iter(pruned.values()), planned).manifest["versions"],
            }

        run = self.store.make("run", {**identification, "settings": settings, "keys": keys, "scales": scales}, build)
        result = run.output
        (self.folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        self.export(plan, patch, run)
        self.track(run, stats, pairs)
        if result["retained"]:
            log.info(
                "  retained %.1f %% of dense, %.1f s", 100 * result["retained"]["value"], time.perf_counter() - began
            )
        return result

    def export(self, plan: Plan, patch: Entry | None, run: Entry) -> None:
        """The pruned checkpoint, if one is asked for and this run has not written it before."""
        path = self.cfg.export.path
        if path and export.key(path) != run.key:
            self.write(plan, patch, path, result=run.output, key=run.key)
        if path:
            log.info("  exported to %s", path)

    def write(self, plan: Plan, patch: Entry | None, path: Path | str, **record: Any) -> Path:
        """Save the checkpoint that is left."""
        model, commit = self.cfg.model, self.fingerprint.partition("@")[2] or self.cfg.model.revision
        return export.save(
            self.path, plan, path, self.patch(patch), name=self.name, revision=commit, layers=model.layers,
            protect=self.protect, trust_remote_code=model.trust_remote_code, **record,
        )  # fmt: skip

    def track(self, run: Entry, stats: Entry | None, pairs: dict[str, tuple[Entry, Entry]]) -> None:
        """Stage `track`: mirror a finished run to the tracker, once. Failing to do so changes no result."""

        def build(folder: Path) -> dict[str, Any]:
            return {"run": run.key, "location": self.mirror(self.record(run, stats, pairs))}

        try:
            self.store.make("track", {"run": run.key, "tracker": identity(self.tracker)}, build)
        except NotTrackedError as error:
            log.warning("  the run is stored, but not tracked; running it again tracks it: %s", error)

    def track_failure(self, error: Exception) -> None:
        """Show a failed run where finished ones are, too. It has no result whose key it could have."""
        if parallel.rank() > 0:
            return
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        key, name = f"failed-{digest(describe(self.cfg))}", f"{self.name}-{self.choice('strategy')}-failed"
        try:
            self.mirror(Record(key=key, name=name, error=reason, **self.labels("prune")))
        except NotTrackedError as problem:
            log.warning("  the failure is not tracked: %s", problem)

    def mirror(self, record: Record) -> str | None:
        """Hand a record to the tracker.

        Raises:
            NotTrackedError: if that fails, for whatever reason.
        """
        try:
            where: str | None = self.tracker.mirror(record)
        # Deliberately broad: a mirror that breaks (no disk, no server, no login, an interface that changed) must not
        # take hours of computed results with it.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise NotTrackedError(f"{self.choice('tracker')} failed: {reason}") from error
        return where

    def record(self, run: Entry, stats: Entry | None, pairs: dict[str, tuple[Entry, Entry]]) -> Record:
        """What there is to show of a finished run."""
        result, plan = run.output, run.output["plan"]
        measured = [entry.output for entry, _ in pairs.values()] + [result["efficiency"] or {}]
        facts = {"versions": result["versions"], "keys": result["keys"], "device": measured[0].get("device")}
        report = [self.folder / name for name in ("result.json", "flips.md")]
        return Record(
            key=run.key,
            name=f"{self.name}-{result['strategy']}-r{result['ratio']:g}-{result['selector'] or 'data-free'}",
            result=result,
            curves=self.curves(plan, stats),
            flips=[{"task": task, **flip} for task, pair in pairs.items() for flip in results.flip_rows(*pair)],
            figures=self.draw(result),
            files={"plan": [self.folder / "plan.json"], "report": [file for file in report if file.exists()]},
            **self.labels("prune" if plan["removed"] else "evaluate", **facts),
        )

    def labels(self, kind: str, **facts: Any) -> dict[str, Any]:
        """What a record says of the configuration, whether the run finished or failed."""
        groups = ("strategy", "selector", "compensation")
        names = {"model": self.name, **{g: self.choice(g) for g in groups}, "benchmark": self.cfg.benchmark.name}
        return {
            "group": self.cfg.name, "kind": kind, "folder": self.folder, "tags": [f"{g}:{n}" for g, n in names.items()],
            "config": {**describe(self.cfg), "svl": {"versions": self.store.versions, **facts}},
        }  # fmt: skip

    def curves(self, plan: dict[str, Any], stats: Entry | None) -> dict[str, list[float]]:
        """Numbers per decoder layer."""
        curves: dict[str, list[float]] = {"removed": [int(i in plan["removed"]) for i in range(plan["n_layers"])]}
        curves |= {"importance": plan["importance"]} if plan["importance"] else {}
        if stats and self.measures and "cosine" in stats.manifest["inputs"]["statistics"]:
            curves["cosine"] = self.statistics(stats).cosine().tolist()
        return curves

    def draw(self, result: dict[str, Any]) -> dict[str, Path]:
        """The run's figures, drawn into the output folder."""
        from svl import figures

        plan = Plan.from_json(json.dumps(result["plan"]))
        drawing = figures.importance({result["strategy"]: {result["ratio"]: plan}})
        return {"importance": figures.save(drawing, self.folder / "importance.png")}

    # ---------------------------------------------------------------------------------------- helpers

    def identities(self) -> dict[str, Any]:
        """What the model is combined with, for keys."""
        return {group: identity(part) for group, part in self.combined.items()}

    def choice(self, group: str) -> str:
        """The name under which a group's option was chosen."""
        target = self.cfg[group]["_target_"]
        from hydra.core.hydra_config import HydraConfig

        return str(HydraConfig.get().runtime.choices[group]) if HydraConfig.initialized() else target.split(".")[-2]

    def done(self, stage: str, entry: Entry, message: str = "") -> Entry:
        """Log a finished stage."""
        if entry.reused and message.startswith("dense"):
            return entry  # one line per sweep is enough
        how = "stored" if entry.reused else f"{entry.output['work']:.1f} s"
        log.info("  %-10s %8s  %s", stage, how, message)
        return entry

    def settings(self) -> dict[str, Any]:
        """What tells runs of one experiment apart, besides names: settings by group."""
        settings = {group: describe(self.cfg[group]) for group in ("strategy", "selector", "compensation")}
        calibration, model = self.cfg.calibration, self.cfg.model
        if self.needs or "probe" in self.strategy.needs:
            file = Path(calibration.path).name
            settings["calibration"] = {"file": file, "samples": calibration.samples, "seed": calibration.seed}
        if self.combined:
            settings["combined"] = {group: self.choice(group) for group in self.combined}
        return {**settings, "model": {"dtype": model.dtype}}


def score_example(stats: Stats, calibrated: Path, folder: Path) -> None:
    """Add the selector's scores to the example that calibration kept, for the token importance figure."""
    file = calibrated / "example.json"
    if stats.selector is None or not file.exists():
        return
    example = json.loads(file.read_text())
    trace = next(t for t in stats.traces if t.index == example["row"])
    weights = stats.selector.weights(trace)
    scores = stats.selector.scores(trace) if hasattr(stats.selector, "scores") else weights
    weights, scores = (x.mean(0) if x.ndim == 2 else x for x in (weights, scores))
    text = zip(example.pop("tokens"), scores[~trace.visual].tolist(), weights[~trace.visual].tolist(), strict=True)
    visual = {"visual": scores[trace.visual].tolist(), "visual_selected": weights[trace.visual].tolist()}
    (folder / "example.json").write_text(json.dumps({**example, **visual, "text": [list(row) for row in text]}))


def spectra(patch: Patch) -> dict[str, dict[str, Any]]:
    """Of a patch's spectra by layer: the largest `values`, their number `of`, and the sum of all `squares`."""
    return {
        str(layer): {
            "values": [float(f"{v:.4g}") for v in values[:SPECTRUM]], "of": len(values),
            "squares": sum(v * v for v in values),
        }
        for layer, values in patch.spectra.items()
    }  # fmt: skip


def identity(method: Any) -> dict[str, Any]:
    """What a method's results depend on, for keys: its class, settings (defaults included) and source code."""
    cls = type(method)
    source = file_digest(Path(inspect.getfile(cls)))[:16]
    settings = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}
    return {"class": f"{cls.__module__}.{cls.__qualname__}", "source": source, **settings}


class NotTrackedError(Exception):
    """The tracker failed."""


@cache
def versions() -> dict[str, str]:
    """Versions of what results depend on, and the commit if this is a checkout."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    git = subprocess.run(
        ["git", "-C", str(PACKAGE.parent), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {**found, "git": git.stdout.strip()} if git.returncode == 0 else found


def run(cfg: DictConfig, folder: Path, sweep: Path | None = None) -> dict[str, Any]:
    """Run a configuration; files go to `folder`, finished stages to the store. `sweep`: the folder of all its jobs.

    Raises:
        SvlError: on bad input, before any heavy work.
    """
    job = Run(cfg, folder)
    if sweep:
        parallel.claim(sweep, job.name, job.fingerprint)
    try:
        return job.execute()
    except Exception as error:
        job.track_failure(error)
        raise
