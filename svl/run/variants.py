"""The models that a run evaluates: the dense one, and what pruning (and what it is combined with) leaves of it."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svl.config import plain_values
from svl.core import Patch, Plan
from svl.evaluation import benchmarks
from svl.evaluation.settings import TaskOptions
from svl.run import exporting
from svl.run.keys import stage_code
from svl.text.redaction import redact_values

if TYPE_CHECKING:
    from svl.models.lvlm import Lvlm
    from svl.run.setup import RunSetup
    from svl.store.artifacts import Entry


PATCH, TRAINED = "patch.safetensors", "trained.safetensors"  # files of the artifacts with changed weights


def content_of(entry: Entry | None, name: str) -> str | None:
    """The SHA-256 of a file of an artifact; None if there is none."""
    file = entry.manifest["files"].get(name) if entry else None
    return file[1] if file else None


class ModelVariant:
    """The model of a run without the layers of a plan, made when it is first needed.

    Attributes:
        plan: the layers that are missing.
        stored_patch: the artifact with what is folded into kept weights, if there is one.
        recovered: the artifact with what recovery has trained, if there is one.
        combined: whether it has the methods that pruning is combined with.
    """

    def __init__(
        self,
        setup: RunSetup,
        plan: Plan,
        stored_patch: Entry | None = None,
        recovered: Entry | None = None,
        combined: bool = False,
    ):
        self.setup, self.plan, self.combined = setup, plan, combined
        self.stored_patch, self.recovered = stored_patch, recovered

    @property
    def is_dense(self) -> bool:
        """Whether it is the model as it comes."""
        return self.plan.is_empty and not self.combined

    @property
    def title(self) -> str:
        """For the log."""
        if self.is_dense:
            return "dense"
        parts = f" and {len(self.plan.sublayers)} sub-layers" if self.plan.sublayers else ""
        return f"{len(self.plan.removed)} of {self.plan.n_layers} layers{parts} removed"

    def read_patch(self) -> Patch | None:
        """What changes kept weights, if anything does: compensation, and recovery after it."""
        from svl.pruning import patch_file

        file = self.stored_patch.path / PATCH if self.stored_patch else None
        patch = patch_file.load_patch(file) if file and file.exists() else None
        file = self.recovered.path / TRAINED if self.recovered else None
        if file and file.exists():
            patch = replace(patch or Patch(), trained=patch_file.load_trained(file))
        return patch

    @cached_property
    def lvlm(self) -> Lvlm:
        """The model itself; shares the dense one's tensors."""
        from svl.pruning import surgery

        if self.is_dense:
            return self.setup.dense
        lvlm = surgery.apply(self.setup.dense, self.plan, self.read_patch())
        for method in self.setup.combined.values() if self.combined else ():
            lvlm = method.apply(lvlm)
        return lvlm

    @cached_property
    def vllm(self) -> Any:
        """The model in vLLM, as an answerer; no other model stays on its device."""
        from svl.models import loading

        self.__dict__.pop("lvlm", None)
        self.setup.release_model()
        loading.forget_last()
        return exporting.load_in_vllm(self)

    def close(self) -> None:
        """Free what vLLM holds, and forget the model; both are made again if need be."""
        if "vllm" in self.__dict__:
            self.vllm.close()
        self.__dict__.pop("vllm", None)
        self.__dict__.pop("lvlm", None)

    # ---------------------------------------------------------------------------------------------- scores

    def answers(self, task: str) -> bool:
        """Whether a task asks for answers; else it measures perplexity."""
        return benchmarks.output_type(task, self.setup.cfg.benchmark.include_path) != "perplexity"

    def evaluate(self, task: str, folder: Path) -> dict[str, Any]:
        """The scores of a task, with files in `folder`."""
        options = self.setup.tasks[task]
        if self.answers(task):
            from svl.evaluation.evaluate import evaluate

            if self.setup.uses_vllm:
                return {**evaluate(self.vllm, task, options, folder), "params": self.count_parameters()}
            scores = evaluate(self.lvlm, task, options, folder)
        else:
            from svl.evaluation.perplexity import evaluate_perplexity

            scores = evaluate_perplexity(self.lvlm, task, options, folder)
        return {**scores, "params": self.lvlm.parameters()}

    def count_parameters(self) -> int:
        """Number of parameters, tied ones counted once, of the model that the checkpoint's config describes."""

        from svl.checkpoints import hub
        from svl.checkpoints.skeleton import read_skeleton
        from svl.models.transformers_internals import model_on_meta
        from svl.pruning.pruned_config import pruned_config

        options = self.setup.options
        folder = hub.local_checkpoint(self.setup.checkpoint, options.revision)
        dense = read_skeleton(folder, replace(options, revision=None), shapes_only=True).model
        pruned = model_on_meta(dense, pruned_config(dense.config, self.plan))
        return sum(p.numel() for p in pruned.parameters())

    def identity(self) -> dict[str, Any]:
        """What tells it from other variants of its model, for keys."""
        identity: dict[str, Any] = {"removed": self.plan.removed, "weights": content_of(self.stored_patch, PATCH)}
        if trained := content_of(self.recovered, TRAINED):
            identity["trained"] = trained
        if self.plan.sublayers:
            identity["sublayers"] = self.plan.sublayers
        if self.combined:
            identity["combined"] = self.setup.combined_identities()
        return identity

    def score_inputs(self, task: str) -> dict[str, Any]:
        """What its score on a task depends on."""
        setup, options = self.setup, self.setup.tasks[task]
        inputs = {
            "model": setup.model,
            **self.identity(),
            "task": task,
            "benchmark": setup.task_fingerprints[task],
            "metric": options.metric,
            "limit": options.limit,
            "max_new_tokens": options.max_new_tokens,
        }
        if options.style != "default":
            inputs["style"] = options.style
        if options.frames != TaskOptions.frames:
            inputs["frames"] = options.frames
        if not self.answers(task):
            return {**inputs, "code": stage_code("perplexity")}
        if options.likelihood:
            inputs["likelihood"] = True
        if setup.uses_vllm:
            evaluator = redact_values(plain_values(setup.cfg.evaluator))  # the key's inputs are written down
            return {**inputs, "code": stage_code("answers of vllm"), "evaluator": evaluator}
        return {**inputs, "code": stage_code("answers")}


def check_benchmark_data(setup: RunSetup) -> None:
    """Find out before any heavy work whether the data of all benchmarks can be had; stored scores need none.

    Raises:
        SvlError: if they cannot.
    """
    dense = ModelVariant(setup, Plan(1, ()))  # what a dense score depends on does not include the depth
    for task, options in setup.tasks.items():
        if setup.store.get("score", dense.score_inputs(task)) is None:
            benchmarks.check_data(task, options)
