"""Training, by transformers' Trainer, to which this is the one seam: order, budget, schedule, checkpoints, curve.

The Trainer's own checkpoints appear piece by piece. Here each is renamed when it is whole, with the budget that was
spent and the curve so far in it, and the one before goes; a run that is killed goes on from the last, and ends in the
same weights as one that is not. (With a limit in seconds, in those of the steps that it got to.)

Of processes that torchrun started, each takes its share of the `accumulate` passes of a step, and all take the step
with the mean of their gradients: the step that one process would take, but for rounding and dropout. The Trainer knows
nothing of the others.
"""

from __future__ import annotations

import gc
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from svl.core import Patch, Plan, SvlError, TensorChange
from svl.data.samples import Samples
from svl.models.lvlm import Lvlm
from svl.models.transformers_internals import without_report
from svl.processes import (
    all_or_none,
    average_gradients,
    gather_values,
    join_processes,
    process_count,
    process_rank,
    seeming_alone,
)
from svl.pruning.trained import check_trained
from svl.recovery.base import MOST_STEPS, Parts, Recovery, check_answers
from svl.recovery.batches import Batches, TrainingOrder, numbers_ahead, planned_steps, training_order
from svl.recovery.checkpoints import PROGRESS, RANDOM, SAVED, check_same_training, remove_damaged, training_record
from svl.recovery.modules import projector_tensors
from svl.recovery.student import Student
from svl.text.progress import show_progress

CURVE = 400  # points of a curve that are kept, at most


@dataclass
class Spent:
    """What training has cost so far, and how its losses went.

    Attributes:
        steps: of the optimiser.
        samples, tokens: that went through the model, repeated ones counted again; tokens without padding.
        seconds: of training alone.
        curve: {"step", "seconds", "loss", its terms, "learning_rate"} of evenly spaced steps, and of the last one.
    """

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Recovered:
    """What came out: changes by names in the dense model, what they cost, and how many numbers were trained."""

    trained: dict[str, TensorChange]
    spent: Spent
    parameters: int


Report = Callable[[Spent, float], None]  # what is spent, the share of the budget that is gone


def recover(
    dense: Lvlm,
    plan: Plan,
    patch: Patch | None,
    samples: Samples,
    recovery: Recovery,
    folder: Path | str,
    report: Report = lambda spent, share: None,
) -> Recovered:
    """Train what is left of `dense` after `plan` and `patch`; `dense` stays as it is.

    Args:
        dense: the model as it comes, and the teacher.
        plan: which layers are gone.
        patch: what compensation has changed.
        samples: to train on, with their answers.
        recovery: what is trained, on what, for how long.
        folder: for checkpoints; training goes on from the last one in it, which must be its own.
        report: is told after each step, in the first process.

    Raises:
        SvlError: if this model cannot be trained, a sample has no answer, the folder has checkpoints of another
            training, the loss is not finite, or the processes that torchrun started cannot share a step.
    """
    recovery.passes_of_each(process_count())
    check_answers(samples)
    join_processes()
    with _random_state_kept(recovery.seed, dense.devices):
        student = Student(dense, plan, patch, recovery)
        steps = planned_steps(recovery, len(samples))
        if steps == 0:
            return Recovered({}, Spent(), student.trained_parameters)
        check_pictures(student.lvlm, student.parts, samples)
        record = training_record(dense, student, samples)
        spent = _train(student, samples, steps or MOST_STEPS, Path(folder), record, report)
    trained = student.changes()
    check_trained(trained, plan, dense.anatomy, dense.model)  # before it is stored for good
    return Recovered(trained, spent, student.trained_parameters)


def check_pictures(lvlm: Lvlm, parts: Parts, samples: Samples) -> None:
    """Raise SvlError if only what brings pictures to the decoder is trained, on samples of which none has any."""
    if parts.adapted or any(sample.images or sample.frames for sample in samples):
        return
    if set(parts.tensors) <= set(projector_tensors(lvlm)):
        raise SvlError("recovery trains the projector alone, but no sample of recovery.data has a picture")


@contextmanager
def _random_state_kept(seed: int, devices: Sequence[torch.device]) -> Iterator[None]:
    """Within the block, random numbers follow the seed; what comes after goes on as if the block had not been."""
    kept = random.getstate(), np.random.get_state()
    others = [device for device in devices if device.type != "cpu"]
    with torch.random.fork_rng(others, device_type=others[0].type if others else "cuda"):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])


def _train(
    student: Student, samples: Samples, steps: int, folder: Path, record: dict[str, str], report: Report
) -> Spent:
    first = process_rank() == 0
    folder.mkdir(parents=True, exist_ok=True)
    for remains in folder.glob("checkpoint-*") if first else ():  # of a run that was killed while it wrote
        shutil.rmtree(remains)
    all_or_none(lambda: remove_damaged(folder) if first else None)
    last = max(folder.glob(f"{SAVED}*"), key=lambda path: int(path.name.removeprefix(SAVED)), default=None)
    if len(seen := set(gather_values(last and last.name))) > 1:
        raise SvlError(f"processes see different checkpoints in {folder} ({seen}): all of them need the same store")
    if last is not None:
        check_same_training(last, record)
    ledger = _Ledger(student, steps, folder, record, report, last)
    batches, order = Batches(student.lvlm, samples), training_order(student.recovery, len(samples), steps)
    ahead = numbers_ahead(student.recovery, order, ledger.spent.steps)
    all_or_none(lambda: batches.check(show_progress(ahead, "recover: samples are checked", len(ahead))))
    with seeming_alone(), without_report():
        trainer = _make_trainer(batches, order, ledger)
    with _checkpointed_activations(student):
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    student.eval()
    trainer.accelerator.state._reset_state(reset_partial_state=True)  # or others would be told: one process, on the CPU
    del trainer
    if student.lvlm.device.type != "cpu":
        gc.collect()  # the Trainer refers to itself, and holds the optimiser's memory
    return ledger.spent


def _make_trainer(batches: Batches, order: TrainingOrder, ledger: _Ledger) -> _Trainer:
    student, recovery, count = ledger.student, ledger.student.recovery, ledger.count
    arguments = _Arguments(
        output_dir=str(ledger.folder),
        max_steps=ledger.steps,
        per_device_train_batch_size=recovery.batch_size,
        gradient_accumulation_steps=recovery.passes_of_each(count),
        learning_rate=recovery.learning_rate,
        weight_decay=recovery.weight_decay,
        max_grad_norm=recovery.max_grad_norm,
        optim="adamw_torch",
        seed=recovery.seed,
        train_sampling_strategy="sequential",  # TrainingOrder has shuffled them
        logging_steps=1,
        save_strategy="no",  # the ledger asks for checkpoints
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=True,  # which is said of the Trainer's own numbers, not of the model
    )
    trainer = _Trainer(model=student, args=arguments, data_collator=batches, train_dataset=order, callbacks=[ledger])
    trainer.ledger = ledger
    trainer.accelerator.device_placement = False
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextmanager
def _checkpointed_activations(student: Student) -> Iterator[None]:
    """Within the block, activations are computed again in the backward pass, if that is asked for."""
    model: Any = student.model
    if not student.recovery.gradient_checkpointing:
        yield
        return
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    try:
        yield
    finally:
        disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
        disable()


class _Arguments(TrainingArguments):
    """For a model that stays where it is, on whatever device: the Trainer would move it to the first one."""

    @property
    def place_model_on_device(self) -> bool:
        """Never."""
        return False


class _Trainer(Trainer):
    """In step with the other processes, and with a learning rate that follows the share of the budget, of steps or
    seconds, that is gone."""

    ledger: _Ledger

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; a sample that fails in one process ends all."""
        return all_or_none(lambda: super(_Trainer, self).get_batch_samples(*args, **kwargs))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The Trainer's, whose gradients are the mean of all processes' behind the last pass of a step."""
        loss: torch.Tensor = all_or_none(lambda: super(_Trainer, self).training_step(*args, **kwargs))
        if self.accelerator.sync_gradients:
            average_gradients(list(self.ledger.student.trained.values()))
        return loss.to(self.args.device)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's, by the first process, as one that is there whole or not at all."""

        def save() -> None:
            try:
                super(_Trainer, self)._save_checkpoint(*args, **kwargs)
                self.ledger.keep(self.state.global_step)
            except BaseException:  # a part of it would keep a full disk full
                shutil.rmtree(self.ledger.folder / f"checkpoint-{self.state.global_step}", ignore_errors=True)
                raise

        all_or_none(lambda: save() if self.ledger.rank == 0 else None)

    def _save_rng_state(self, output_dir: str) -> None:
        """As the Trainer's, but of all devices that the model is on; the Trainer knows the current one alone."""
        kind, numbers, *place = np.random.get_state()
        devices = self.ledger.devices
        states = {
            "python": random.getstate(),
            "numpy": (kind, np.asarray(numbers).tolist(), *place),
            "cpu": torch.get_rng_state(),
            "devices": {str(device): torch.get_device_module(device).get_rng_state(device) for device in devices},
        }
        torch.save(states, Path(output_dir) / RANDOM)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        states = torch.load(Path(checkpoint) / RANDOM, weights_only=True)
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(states["cpu"])
        for device in self.ledger.devices:
            torch.get_device_module(device).set_rng_state(states["devices"][str(device)], device)

    def _prepare_inputs(self, inputs: dict[str, torch.Tensor | Any]) -> dict[str, torch.Tensor | Any]:
        """They are where the model begins, as `Batches` makes them."""
        return inputs

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Linear warm-up, then as `recovery.schedule` says."""
        recovery = self.ledger.student.recovery

        def factor(step: int) -> float:
            share = self.ledger.share_after(step)
            if share < recovery.warmup:
                return max(share / recovery.warmup, 0.1)  # a first step at 0 would be lost
            if recovery.schedule == "constant":
                return 1.0
            left = (share - recovery.warmup) / (1 - recovery.warmup)
            return 0.5 * (1 + math.cos(math.pi * min(left, 1.0)))

        optimizer = optimizer or self.optimizer
        if optimizer is None:
            raise RuntimeError("the Trainer makes its schedule before its optimiser")
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return self.lr_scheduler


class _Ledger(TrainerCallback):
    """Keeps the account of a training: what is spent, when it is over, when and how checkpoints are written."""

    def __init__(
        self, student: Student, steps: int, folder: Path, record: dict[str, str], report: Report, last: Path | None
    ):
        self.student, self.steps, self.folder, self.record, self.report = student, steps, folder, record, report
        self.budget_s, self.save_every = student.recovery.budget_s, student.recovery.save_every
        self.devices = [device for device in student.lvlm.devices if device.type != "cpu"]
        self.rank, self.count = process_rank(), process_count()
        self.spent = Spent(**json.loads((last / PROGRESS).read_text())["spent"]) if last else Spent()
        self._before, self._began = replace(self.spent), time.perf_counter()

    def share_after(self, step: int) -> float:
        """The share of the budget that is gone after so many steps, at this time."""
        share = step / self.steps
        return share if self.budget_s is None else max(share, self.spent.seconds / self.budget_s)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count what all processes did; stop when time is up by the first one's clock; ask for a checkpoint every so
        many steps."""
        spent, before = self.spent, self._before
        seconds = time.perf_counter() - self._began
        counts = gather_values((self.student.samples, self.student.tokens, seconds))
        spent.steps = state.global_step
        spent.samples = before.samples + sum(samples for samples, _, _ in counts)
        spent.tokens = before.tokens + sum(tokens for _, tokens, _ in counts)
        spent.seconds = before.seconds + counts[0][2]
        if self.budget_s is not None and spent.seconds >= self.budget_s:
            control.should_training_stop = True
        elif spent.steps % self.save_every == 0 and spent.steps < self.steps:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Add a point to the curve, and tell of it."""
        if not logs or "loss" not in logs:
            return
        spent = self.spent
        told = gather_values({"loss": logs["loss"], **self.student.take_terms()})
        terms = {name: sum(one[name] for one in told) / self.count for name in told[0]}
        point = {"step": spent.steps, "seconds": round(spent.seconds, 3), **terms}
        every = 2 ** max(0, math.ceil(math.log2(spent.steps / CURVE)))  # a power of two, so that earlier points remain
        spent.curve = [p for p in spent.curve if p["step"] % every == 0]
        spent.curve.append({**point, "learning_rate": logs["learning_rate"]})
        share = min(self.share_after(spent.steps), 1.0)
        all_or_none(lambda: self.report(spent, share) if self.rank == 0 else None)

    def keep(self, step: int) -> None:
        """Make the Trainer's checkpoint one that is whole, in the place of the one before."""
        written = self.folder / f"checkpoint-{step}"
        (written / PROGRESS).write_text(json.dumps({"training": self.record, "spent": asdict(self.spent)}))
        older = list(self.folder.glob(f"{SAVED}*"))
        os.replace(written, self.folder / f"{SAVED}{step}")
        for folder in older:
            shutil.rmtree(folder)
