"""A page of the questions that two models answered differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from svl.evaluation.score_statistics import Pair, compare_answers, flipped, scored_samples
from svl.report.table_writers import markdown_table
from svl.store.artifacts import Entry
from svl.text.escaping import for_markdown

LONGEST = 400  # characters of a question or an answer that are shown


def flips_page(tasks: Mapping[str, tuple[Entry, Entry]], names: tuple[str, str], most: int = 50, level: int = 1) -> str:
    """A page (Markdown) of the questions that one of two models answered right and the other wrong, task by task.

    Args:
        tasks: scores of both models by task.
        names: what to call the models.
        most: how many questions are listed each way.
        level: of the page's heading.
    """
    first, second = map(for_markdown, names)
    page = [f"{'#' * level} Answers that differ: {first} and {second}"]
    for task, (one, other) in tasks.items():
        change = compare_answers(one, other)
        if change is None:
            continue
        page += [
            f"{'#' * (level + 1)} {for_markdown(task)}",
            f"{len(scored_samples(one))} questions, "
            f"{100 * change['agreement']:.1f} % equal answers; right only in "
            f"{first}: {change['gained']}, only in {second}: {change['lost']} ({_tested(change['p'])}by unit: "
            f"{change['units_gained']} better, {change['units_lost']} worse)",
        ]
        if change["note"]:
            page.append(f"Caution: {for_markdown(change['note'])}; rounding alone may change answers.")
        limit = one.output.get("limit")
        if limit is not None:
            page.append(f"Caution: limit={limit:g}, so only a part of the benchmark was used.")
        gained, lost = flipped(one, other)
        for who, pairs in ((second, lost), (first, gained)):
            if pairs:
                page.append(f"{'#' * (level + 2)} Right only in {who}")
                page.append(_flips_table(pairs[:most], (first, second)))
            if len(pairs) > most:
                page.append(f"... and {len(pairs) - most} more")
    return "\n\n".join(page) + "\n"


def _tested(p: float | None) -> str:
    """The p-value, where there is one, before what goes on."""
    return "" if p is None else f"McNemar p = {p:.2g}, "


def _flips_table(pairs: Sequence[Pair], names: tuple[str, str]) -> str:
    """Question, expected answer and both answers, those of the second model first."""
    first, second = names
    lines = []
    for ours, theirs in pairs:
        cells = [ours["doc_id"], ours["question"], ours["target"], theirs["prediction"], ours["prediction"]]
        lines.append([for_markdown(cell, LONGEST) for cell in cells])
    return markdown_table(["no.", "question", "expected", second, first], lines, "rllll")
