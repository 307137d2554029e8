"""How a model is scored and measured, as plain values; imports neither torch nor lmms-eval."""

from __future__ import annotations

import math
from dataclasses import dataclass

from svl.core import SvlError


def taken_by_limit(n: int, limit: float | None) -> int:
    """How many of `n` documents a limit takes: the first so many; below 1, the first share; None: all."""
    if limit is None:
        return n
    return min(n, math.ceil(limit * n) if limit < 1 else int(limit))


@dataclass(frozen=True)
class TaskOptions:
    """How a model is scored on one task.

    Attributes:
        metric: the main metric, by the name it has in the task.
        limit: only the first so many documents, below 1 the first share of them; None for all. Of documents that are
            scored together, all or none are taken.
        max_new_tokens: cap of an answer's length; None for the task's own.
        style: the task's variant of its prompts, a key of its `lmms_eval_specific_kwargs`.
        batch_size: questions answered at once; the answers do not depend on it, up to rounding.
        include_path: folder with the task's YAML; None for the tasks of svl and those that come with lmms-eval.
        data: folder with copies of data sets; None for the hub (or its cache).
        frames: of a video, how many are shown.
        likelihood: besides, the options of closed questions are compared by their likelihood.
    """

    metric: str
    limit: float | None = None
    max_new_tokens: int | None = None
    style: str = "default"
    batch_size: int = 16
    include_path: str | None = None
    data: str | None = None
    frames: int = 8
    likelihood: bool = False

    def __post_init__(self) -> None:
        limit = self.limit
        if limit is not None and not (0 < limit < 1 or (limit >= 1 and float(limit).is_integer())):
            raise SvlError(
                f"limit is {limit:g}, but must be a whole number, a share below 1, or null for all documents"
            )


@dataclass
class EfficiencySettings:
    """How speed and memory of the pruned model are measured beside the dense one (svl.evaluation.efficiency).

    Not frozen, as it is also the schema of a group of the configuration.
    """

    batch_size: int = 1  # prompts at once
    new_tokens: int = 32  # of every answer
    warmup: int = 1  # rounds that do not count
    repeats: int = 0  # rounds; 0: nothing is measured
