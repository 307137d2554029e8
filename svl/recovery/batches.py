"""Samples with their answers as padded inputs, in an order that a seed fixes for good."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from svl.core import SvlError
from svl.data.samples import Sample, Samples
from svl.models.lvlm import Lvlm
from svl.models.sample_inputs import answered_text, encode_answer, encode_texts, explained_samples, sample_text
from svl.processes import process_count, process_rank
from svl.recovery.base import MOST_STEPS, Recovery

ANSWER = "answer"  # beside a model's inputs: which tokens [B, T] are an answer


class TrainingOrder(Sequence[int]):
    """Numbers of samples, pass after pass over all of them, each in an order of its own.

    Position k has the same number whoever asks for it, and whenever. Of `n_batches` batches, number `rank` of so many
    `processes` has every so manyth, so that together they see what one would.
    """

    def __init__(self, n_samples: int, batch_size: int, n_batches: int, seed: int, rank: int = 0, processes: int = 1):
        self.n_samples, self.batch_size, self.n_batches, self.seed = n_samples, batch_size, n_batches, seed
        self.rank, self.processes = rank, processes
        self._epoch, self._order = -1, [0]

    def __len__(self) -> int:
        return self.n_batches // self.processes * self.batch_size

    def __getitem__(self, k: int) -> int:  # type: ignore[override]
        batch, place = divmod(k, self.batch_size)
        epoch, place = divmod((batch * self.processes + self.rank) * self.batch_size + place, self.n_samples)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(self.n_samples))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
        return self._order[place]


def planned_steps(recovery: Recovery, n_samples: int) -> int | None:
    """How many steps of the optimiser are asked for; None if only seconds are limited."""
    if recovery.steps is not None:
        return recovery.steps
    if recovery.budget_s is not None:
        return None
    return math.ceil(n_samples / (recovery.batch_size * recovery.accumulate))


def training_order(recovery: Recovery, n_samples: int, steps: int) -> TrainingOrder:
    """The order in which so many steps use the samples, and this process's part of it."""
    batches = steps * recovery.accumulate
    return TrainingOrder(n_samples, recovery.batch_size, batches, recovery.seed, process_rank(), process_count())


def samples_to_check(recovery: Recovery, n_samples: int) -> list[int]:
    """The samples of which `recover` finds out before the first step that they cannot be trained on."""
    steps = planned_steps(recovery, n_samples)
    return numbers_ahead(recovery, training_order(recovery, n_samples, MOST_STEPS if steps is None else steps))


def numbers_ahead(recovery: Recovery, order: TrainingOrder, done: int = 0) -> list[int]:
    """The samples that come after `done` steps, each once; of a limit in seconds, those of the next step.

    How many are used in some time is not known, and to look at all of them could take longer.
    """
    step = recovery.passes_of_each(order.processes) * recovery.batch_size
    begin, end = done * step, len(order)
    if recovery.budget_s is not None:
        end = min(begin + step, end)
    found: dict[int, None] = {}
    for k in range(begin, end):
        found[order[k]] = None
        if len(found) == order.n_samples:
            break
    return list(found)


class Batches:
    """Makes model inputs of samples by their numbers, with the positions of their answers as ANSWER.

    A batch is one group of rows, or several where a processor cannot take its samples at once: videos of other
    lengths, and for some models other numbers of pictures.
    """

    def __init__(self, lvlm: Lvlm, samples: Samples):
        self.lvlm, self.samples = lvlm, samples.samples
        self._lengths: dict[int, int] = {}  # tokens of a sample with its answer
        self._answers: dict[int, int] = {}  # how many tokens of a sample, counted from its end, are the answer

    def __call__(self, numbers: Sequence[int]) -> dict[str, list[dict[str, Tensor]]]:
        """The inputs of one batch, group by group, padded on the left.

        Raises:
            SvlError: if template or processor refuse a sample; the message names it.
        """
        groups = defaultdict(list)
        for number in numbers:
            sample = self.samples[number]
            groups[len(sample.frames), len(sample.images) if self.lvlm.needs_equal_images else 0].append(number)
        return {"groups": [self._group(group) for group in groups.values()]}

    def check(self, numbers: Iterable[int]) -> None:
        """Raise SvlError for the first of these samples that cannot be trained on, before any is.

        Pictures are decoded, texts are put into the chat template and become tokens, no more than the model reads.
        """
        for number in numbers:
            self._count_answer(number)
            check_length(self.lvlm, self.samples[number], self._lengths[number])

    def _group(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        batch = [self.samples[n] for n in numbers]
        counts = torch.tensor([self._count_answer(n) for n in numbers])
        with explained_samples(batch, "recovery.batch_size"):
            inputs = encode_texts(self.lvlm, [answered_text(self.lvlm, sample) for sample in batch], batch)
        asked = [sample_text(self.lvlm, sample) for sample in batch]
        inputs = self.lvlm.with_answers(inputs, counts.tolist(), asked)
        present = inputs["attention_mask"].bool()
        predicted = present & (present.cumsum(1) > 1)  # a row's first token follows nothing, or padding
        from_end = torch.arange(present.shape[1], 0, -1, device=present.device)
        return {**inputs, ANSWER: predicted & (from_end <= counts.to(present.device)[:, None])}

    def _count_answer(self, number: int) -> int:
        if number not in self._answers:
            _, answer = encode_answer(self.lvlm, self.samples[number])
            self._answers[number], self._lengths[number] = int(answer.sum()), len(answer)
        return self._answers[number]


def check_length(lvlm: Lvlm, sample: Sample, length: int) -> None:
    """Raise SvlError if a sample, of so many tokens with its answer, is too short or too long to be trained on."""
    if sample.plain and length < 2:
        raise SvlError(f"{sample.label}: a text of fewer than two tokens has nothing to learn from")
    most = getattr(lvlm.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most and length > most:
        raise SvlError(
            f"{sample.label} has {length} tokens with its answer, but '{lvlm.name}' reads at most {most} "
            "(max_position_embeddings): shorten the sample, or leave it out"
        )
