"""The story of a run: calibrate, plan, check, compensate, recover, score, measure, record. One method per stage.

A stage's inputs are written out in its call to `make`; what the store has already is read instead of computed, so a run
that was interrupted, and one that shares stages with another, needs no special case. The model is loaded only when a
stage has to compute. What else belongs to a run has modules of its own: what it starts from (setup), what results
depend on (keys), the models it evaluates (variants), its result (run_result), exporting and tracking.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from svl.checkpoints.pruning_record import changed_writers
from svl.config import plain_values
from svl.core import Plan, checked_plan, fitted_patch
from svl.core.contract import answering
from svl.processes import process_rank
from svl.run import early_checks, exporting, parallel, tracking
from svl.run.figure_data import spectra_record, write_example_picture, write_token_scores
from svl.run.generated import make_texts, read_texts
from svl.run.keys import method_identity, stage_code
from svl.run.parallel import in_scratch
from svl.run.recovering import compare_pictures, describe_training, train
from svl.run.run_result import RunStages, build_result, result_inputs
from svl.run.setup import RunSetup
from svl.run.stages import StageLog, make_stage
from svl.run.strategy_inputs import (
    check_choices,
    count_removals,
    describe_origin,
    read_statistics,
    rescoring_inputs,
    resumable_probe,
    resumable_rescoring,
)
from svl.run.variants import PATCH, ModelVariant, check_benchmark_data
from svl.store.artifacts import Entry
from svl.store.files import write_text_whole
from svl.text.progress import show_progress

log = logging.getLogger(__name__)
log_file = logging.getLogger("details")  # goes to run.log only
FEW_NOTES = 4  # of a compensation; more of them are told in run.log

Output = dict[str, Any]


def run_configuration(cfg: DictConfig, folder: Path, sweep: Path | None = None, told: StageLog | None = None) -> Output:
    """Run a configuration; files go to `folder`, finished stages to the store.

    Args:
        cfg: the configuration.
        folder: of the run's own files.
        sweep: the folder of all jobs, where it is one of them.
        told: takes what is told of its stages.

    Raises:
        SvlError: on bad input, before any heavy work.
    """
    run = Run(cfg, folder, told)
    if sweep:
        parallel.claim_model_name(sweep, run.setup.name, run.setup.fingerprint)
    try:
        if sweep is None:  # of jobs that sweep over methods, some have no use for a setting
            early_checks.tell_idle_settings(run.setup.recovery)
        with exporting.export_reserved(run.setup):
            return run.execute()
    except Exception as error:
        tracking.track_failure(run.setup, folder, error)
        raise


class Run:
    """One configuration on its way through the stages. Raises SvlError on bad input before any heavy work."""

    def __init__(self, cfg: DictConfig, folder: Path, told: StageLog | None = None):
        self.setup, self.folder = RunSetup(cfg, told), folder
        self.log = self.setup.log

    def execute(self) -> Output:
        """All stages; the run's result, also written to the output folder as result.json with plan.json."""
        try:
            return self._execute(time.perf_counter())
        finally:
            self.log.flush()
            self.log.shared += self.setup.seconds_loading

    def _execute(self, began: float) -> Output:
        check_benchmark_data(self.setup)
        stages = self.prepare()
        write_text_whole(self.folder / "plan.json", stages.plan.to_json())
        stages.dense = self.score(stages.dense_model)
        stages.pruned = self.score(stages.pruned_model)
        if process_rank() > 0:  # the first process does the rest
            return {}
        stages.efficiency = self.measure(stages.pruned_model)
        stages.pruned_model.close()
        run = self.record(stages)
        exporting.export_run(self.setup, stages.pruned_model, run)
        tracking.track_run(self.setup, self.folder, stages, run)
        self.log.outcome(run.output, time.perf_counter() - began)
        return run.output

    def prepare(self) -> RunStages:
        """All stages before the first evaluation: statistics, plan, check, patch, and training."""
        stats = self.calibrate()
        texts = self.generate()
        planned = self.plan(stats, texts)
        plan = Plan.from_json((planned.path / "plan.json").read_text())
        early_checks.check_plan(self.setup, plan)
        self.check(plan)
        patch = self.compensate(stats, texts, plan)
        overlap = compare_pictures(self.setup, plan)  # before hours of training
        recovered = self.recover(plan, patch)
        # Names are of this run: another one, with the same settings under other names, may have stored the plan.
        names = {"strategy": self.setup.choice("strategy"), "selector": None, "model": self.setup.name}
        if self.setup.selects:
            names["selector"] = self.setup.choice("selector")
        plan = dataclasses.replace(plan, provenance={**names, **plan.provenance})
        return RunStages(
            stats=stats,
            texts=texts,
            planned=planned,
            plan=plan,
            patch=patch,
            recovered=recovered,
            overlap=overlap,
            dense_model=ModelVariant(self.setup, Plan(plan.n_layers, ())),
            pruned_model=ModelVariant(self.setup, plan, patch, recovered, combined=bool(self.setup.combined)),
        )

    # ------------------------------------------------------------------------------------------ stages

    def calibrate(self) -> Entry | None:
        """Stage `stats`: per-token measurements; None if nothing asks for data. Independent of method and ratio."""
        setup = self.setup
        if not setup.calibrates:
            return None

        def measure(folder: Path) -> None:
            from svl.calibration import calibrate

            calibrate.calibrate(
                setup.dense,
                setup.samples,
                statistics=setup.statistics,
                batch_size=setup.cfg.calibration.batch_size,
                folder=folder,
                show=show_progress,
            )

        def build(folder: Path) -> Output:
            from svl.calibration import calibrate

            check_choices(setup)  # what can be found wrong now costs no calibration
            calibrate.check_selector(setup.dense, setup.samples, setup.selector)
            early_checks.check_compensation(setup)
            early_checks.check_recovery(setup)
            measure(folder)
            write_example_picture(setup.dense, setup.samples, folder)
            anatomy = setup.dense.anatomy
            found = {"removable": anatomy.removable, "protected": anatomy.protected, "n_layers": anatomy.n_layers}
            return {"samples": len(setup.samples), **found}

        inputs = {
            "model": setup.model,
            "code": stage_code("stats"),
            "examples": setup.samples.fingerprint,
            "statistics": setup.statistics,
            "protect": setup.options.protect,
        }
        entry = make_stage(setup, "stats", inputs, build, help=measure)
        return self.log.stage("calibrate", entry, f"{entry.output['samples']} samples", shared=True)

    def generate(self) -> Entry | None:
        """Stage `texts`: what the dense model writes by itself; None if nothing is fitted to it."""
        entry = make_texts(self.setup)
        return entry and self.log.stage("generate", entry, f"{entry.output['texts']} texts of the model's own")

    def plan(self, stats: Entry | None, texts: Entry | None = None) -> Entry:
        """Stage `plan`: which layers go."""
        setup, cfg = self.setup, self.setup.cfg
        source = stats if setup.selects else None

        def build(folder: Path) -> Output:
            # The calibration may be that of another run, which checked its own choices.
            if searches := setup.probes or setup.rescores:
                check_choices(setup)
                early_checks.check_compensation(setup)
            measured = read_statistics(setup, source)
            n_remove = count_removals(setup, measured)
            with answering(setup.strategy):
                setup.strategy.check(measured, n_remove)
            if searches:
                early_checks.check_recovery(setup)
            if setup.probes:
                measured = dataclasses.replace(measured, probe=resumable_probe(setup))
            if setup.rescores:
                rescoring = resumable_rescoring(setup, stats, texts, measured.probe)
                measured = dataclasses.replace(measured, rescoring=rescoring)
            plan = checked_plan(setup.strategy, measured, n_remove)
            if source:
                write_token_scores(measured, source.path, folder)
            provenance = describe_origin(setup, plan, n_remove, source)
            (folder / "plan.json").write_text(dataclasses.replace(plan, provenance=provenance).to_json())
            cost = {"passes": plan.provenance.get("passes")} if setup.rescores else {}
            parts = {"sublayers": [f"{layer}.{role}" for layer, role in plan.sublayers]} if plan.sublayers else {}
            return {"removed": plan.removed, **parts, **cost}

        inputs = {
            "model": setup.model,
            "stats": source and source.key,
            "selector": source and method_identity(setup.selector),
            "strategy": method_identity(setup.strategy),
            "ratio": cfg.ratio if cfg.n_remove is None else None,
            "n_remove": cfg.n_remove,
            "protect": setup.options.protect,
        }
        if setup.probes:
            inputs |= {"losses": setup.losses_on, "code": stage_code("probe")}
        if setup.rescores:
            inputs["rescoring"] = rescoring_inputs(setup, stats, texts)
        all_plan = setup.probes or setup.rescores  # what they try out and measure again is in step in all processes
        entry = make_stage(setup, "plan", inputs, build, help=in_scratch(build) if all_plan else None)
        removed, passes = entry.output["removed"], entry.output.get("passes")
        nothing = not removed and "sublayers" not in entry.output
        brief = "removes nothing" if nothing else f"removes layers {removed}, {len(removed)} in all"
        cost = "" if passes is None else f", chosen one by one in {passes} passes over the calibration set"
        parts = f"; of others {', '.join(entry.output['sublayers'])}" if "sublayers" in entry.output else ""
        return self.log.stage("plan", entry, f"{brief}{parts}{cost}", brief=brief + parts)

    def check(self, plan: Plan) -> None:
        """Stage `check`: without these layers, the model computes what it computes when it skips them.

        Raises:
            SvlError: if it does not.
        """
        setup = self.setup
        if plan.is_empty:
            return
        if setup.cfg.model.offload:
            log.warning("  model.offload: the check that pruning equals skipping layers is left out")
            return

        def build(folder: Path) -> Output:
            from svl.pruning import selfcheck, sublayers, surgery

            early_checks.check_recovery(setup, plan)
            inputs, pruned = selfcheck.example_inputs(setup.dense), surgery.apply(setup.dense, plan)
            difference = selfcheck.check_surgery(setup.dense, pruned, plan, inputs)
            return {"difference": difference, "zeros": sublayers.names_of_zeros(setup.dense, plan)}

        inputs = {"model": setup.model, "code": stage_code("check"), "removed": plan.removed}
        if plan.sublayers:
            inputs["sublayers"] = plan.sublayers
        entry = make_stage(setup, "check", {**inputs, "protect": setup.options.protect}, build)
        self.log.stage("check", entry, f"differs by {entry.output['difference']:.1g} from skipping these layers")
        early_checks.tell_zeros(entry.output["zeros"])

    def compensate(self, stats: Entry | None, texts: Entry | None, plan: Plan) -> Entry | None:
        """Stage `patch`: updates of kept weights; None if no whole layer is removed."""
        setup = self.setup
        if not plan.removed:
            if plan.sublayers and setup.compensates:
                log.warning("  compensation: no whole layer is removed, so there is no gap to fill: nothing is changed")
            return None
        streams = bool(setup.compensation.needs)  # hidden states

        def build(folder: Path) -> Output:
            from svl.calibration.activations import Activations
            from svl.pruning import patch_file

            hidden: Any = None
            early_checks.check_single_writers(setup, plan)
            early_checks.check_recovery(setup, plan)  # what was stored may have been for another recovery
            if streams:
                early_checks.check_compensation(setup)  # of a calibration that was for another compensation
                seen, batch_size = read_statistics(setup, stats), setup.cfg.calibration.batch_size
                hidden = Activations(setup.dense, setup.samples, seen, batch_size, show_progress, read_texts(texts))
            patch = fitted_patch(setup.compensation, hidden, plan)
            if patch:
                early_checks.check_patch_fits(setup, plan, patch)
                patch_file.save_patch(patch, folder / PATCH)
            return {"notes": patch.notes, "spectra": spectra_record(patch), "changed": changed_writers(patch)}

        inputs: dict[str, Any] = {
            "model": setup.model,
            "stats": stats.key if stats and streams else None,
            "selector": method_identity(setup.selector) if streams else None,
            "removed": plan.removed,
            "compensation": method_identity(setup.compensation),
        }
        if streams:
            inputs["code"] = stage_code("patch")
        if texts:
            inputs["texts"] = texts.key
        if plan.merges:
            inputs["merges"] = plan.merges
        if plan.sublayers:
            inputs["sublayers"] = plan.sublayers
        if plan.order:
            inputs["order"] = plan.order
        entry = make_stage(setup, "patch", inputs, build)
        if not setup.compensates:
            return entry
        tell_notes(entry.output["notes"])
        return self.log.stage("compensate", entry, f"changes {', '.join(entry.output['changed']) or 'nothing'}")

    def recover(self, plan: Plan, patch: Entry | None) -> Entry | None:
        """Stage `recover`: a little training of what is left; None if none is asked for, or nothing is removed."""
        entry = train(self.setup, plan, patch)
        return entry and self.log.stage("recover", entry, describe_training(entry.output))

    def score(self, variant: ModelVariant) -> dict[str, Entry]:
        """Stage `score`, one artifact per task: equal layers and weights are evaluated once, whatever led to them."""
        setup, found = self.setup, {}
        try:
            for task, options in setup.tasks.items():

                def build(folder: Path, task: str = task) -> Output:
                    return variant.evaluate(task, folder)

                found[task] = make_stage(setup, "score", variant.score_inputs(task), build, help=in_scratch(build))
                value = found[task].output["metrics"][options.metric]["value"]
                shown = "undefined" if value is None else f"{value:.3f}"
                if not (variant.is_dense and found[task].reused):  # one line per sweep is enough
                    scored = f"{task} {options.metric} {shown}"
                    message = f"{variant.title}: {scored}"
                    self.log.stage("evaluate", found[task], message, brief=scored, shared=variant.is_dense)
        finally:
            variant.close()
        return found

    def measure(self, variant: ModelVariant) -> Entry | None:
        """Stage `efficiency`: what the pruned model costs beside the dense one; None if that is not asked for.

        Clocks tell of a machine, so unlike other stages' its key has the device and the versions.
        """
        setup, settings = self.setup, self.setup.efficiency_settings
        if not settings.repeats or variant.is_dense:
            return None
        from svl.models.devices import device_facts, find_device

        def build(folder: Path) -> Output:
            from svl.evaluation.efficiency import measure_efficiency

            samples = setup.samples.samples
            sample = next((s for s in samples if s.images), samples[0])
            return measure_efficiency(setup.dense, variant.lvlm, sample, settings, show=show_progress)

        inputs = {
            "model": setup.model,
            "code": stage_code("efficiency"),
            **variant.identity(),
            "settings": plain_values(setup.cfg.efficiency),
            "examples": setup.samples.fingerprint,
            "versions": setup.store.versions,
            "device": device_facts(find_device(setup.options.device), settings.batch_size),
        }
        if setup.options.device_map is not None:
            inputs["placement"] = [setup.options.device_map, setup.options.max_memory]
        entry = make_stage(setup, "efficiency", inputs, build, alone=True)
        parts = ", ".join(f"{part} x{ratio['value']:.2f}" for part, ratio in entry.output["speedup"].items())
        told = f"{parts} (ideal x{entry.output['ideal']:.2f})"
        return self.log.stage("measure", entry, told, brief=told)

    def record(self, stages: RunStages) -> Entry:
        """Stage `run`: the result, in the store and in the output folder, with the questions that flipped."""
        if stages.pairs and not stages.pruned_model.is_dense:
            from svl.report.flips_page import flips_page

            write_text_whole(self.folder / "flips.md", flips_page(stages.pairs, ("pruned", "dense")))
        inputs = result_inputs(self.setup, stages)

        def build(folder: Path) -> Output:
            if stages.stats and (stages.planned.path / "example.json").exists():
                for file in (stages.planned.path / "example.json", stages.stats.path / "example.png"):
                    (folder / file.name).write_bytes(file.read_bytes())
            return build_result(inputs, stages)

        run = self.setup.store.make("run", {**inputs, "code": stage_code("run")}, build)
        write_text_whole(self.folder / "result.json", json.dumps(run.output, indent=1) + "\n")
        return run


def tell_notes(notes: list[str]) -> None:
    """Log what a compensation notes; the console has the first of many."""
    for note in notes if len(notes) <= FEW_NOTES else [f"{notes[0]} ({len(notes) - 1} more in run.log)"]:
        log.warning("  compensation: %s", note)
    if len(notes) > FEW_NOTES:
        for note in notes:
            log_file.info("  compensation: %s", note)
