"""The report of one experiment: what goes into it, and the files it consists of."""

from __future__ import annotations

import glob
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from svl.core import SvlError
from svl.report import page, pictures, table_writers
from svl.report.results import ESTIMATE, Run, read_runs
from svl.report.rows import Section, compared_runs
from svl.report.tables import Table, section_table
from svl.store.artifacts import Store
from svl.store.files import write_text_whole
from svl.text.escaping import for_markdown, for_terminal


@dataclass(frozen=True)
class Report:
    """All finished runs of one experiment.

    Attributes:
        name: of the experiment.
        runs: oldest first.
        store: where they are.
        mirrors: folders or addresses where a tracker put them.
    """

    name: str
    runs: tuple[Run, ...]
    store: Store
    mirrors: tuple[str, ...] = ()

    @classmethod
    def read(cls, store: Store, name: str | None) -> Report:
        """The report of experiment `name`.

        Raises:
            SvlError: if there are no such runs that can be read, or runs of one model name are of different
                checkpoints.
        """
        runs = read_runs(store, name)
        keys = {run.key for run in runs}
        tracked = [entry.output for entry in store.entries("track") if isinstance(entry.output, Mapping)]
        places = [output.get("location") for output in tracked if output.get("run") in keys]
        mirrors = [place for place in places if isinstance(place, str)]
        report = cls(runs[0].result["name"], runs, store, tuple(mirrors))
        report._check_checkpoints()
        return report

    def _check_checkpoints(self) -> None:
        fingerprints: dict[str, set[str]] = {}
        for run in self.runs:
            fingerprints.setdefault(run.result["model"], set()).add(run.result["model_fingerprint"])
        for model, found in fingerprints.items():
            if len(found) > 1:
                raise SvlError(
                    f"experiment '{self.name}' has runs of {len(found)} different checkpoints called '{model}' "
                    f"(fingerprints {', '.join(sorted(found))}), which cannot be compared; use another model or "
                    f"experiment name, or delete the old runs from {self.runs[0].folder.parent}"
                )

    @cached_property
    def sections(self) -> list[Section]:
        """What can be compared, a table each."""
        return compared_runs(self.name, self.runs)

    @cached_property
    def tables(self) -> list[Table]:
        """A table of every section."""
        return [section_table(section, self.store) for section in self.sections]

    def show(self, console: Console) -> None:
        """Print the tables; where they are too wide, lines run over rather than lose numbers."""
        for table in self.tables:
            shown = table_writers.as_rich(table)
            console.width = max(console.width, Console(width=10_000).measure(shown).maximum)
            console.print(shown)
            for note in table.notes:
                console.print(Text(for_terminal(note), "dim"), soft_wrap=True)

    def write(self, out: Path, live: page.Live | None = None) -> list[Path]:
        """Write all files of the report into `out`; gives their paths, report.html first.

        Args:
            out: a folder, which is made.
            live: if the page will be written again.

        Raises:
            SvlError: if `out` cannot be written.
        """
        try:
            out.mkdir(parents=True, exist_ok=True)
            suffixes = [f"-{i}" if len(self.sections) > 1 else "" for i in range(1, len(self.sections) + 1)]
            drawn = [
                pictures.draw_figures(section, self.store, out, suffix)
                for section, suffix in zip(self.sections, suffixes, strict=True)
            ]
            texts = {
                "report.html": page.render_page(self.name, self.sections, self.tables, drawn, self.store, live),
                "report.md": self._markdown(drawn),
                "table.md": "\n\n".join(_headed_table(table) for table in self.tables) + "\n",
                "table.tex": table_writers.as_latex(self.tables),
                "results.csv": table_writers.csv_text(self._numbers()),
            }
            for table, suffix in zip(self.tables, suffixes, strict=True):
                texts[f"table{suffix}.csv"] = table_writers.as_csv(table)
            for name, text in texts.items():
                write_text_whole(out / name, text)
        except OSError as error:
            raise SvlError(f"cannot write the report to {out}: {error.strerror or error}") from error
        return [*(out / name for name in texts), *(picture.path for found in drawn for picture in found)]

    def paper(self) -> str:
        """See svl.report.table_writers.as_paper_csv."""
        return table_writers.as_paper_csv(self.sections)

    def _markdown(self, drawn: Sequence[Sequence[pictures.Picture]]) -> str:
        """report.md."""
        parts = [f"# {for_markdown(self.name)}"]
        for section, table, figures in zip(self.sections, self.tables, drawn, strict=True):
            parts.append(_headed_table(table))
            for figure in figures:
                caption = for_markdown(figure.caption)
                parts.append(f"![{caption}]({figure.path.name})\n\n*{caption}*")
            parts += [_plans_table(section), "Layers count from 0."]
        versions = [f"Made with {versions}." for versions in sorted({run.versions for run in self.runs})]
        parts += ["## Versions", table_writers.markdown_list(versions)]
        if command := self.wandb_sync():
            longest = max(map(len, re.findall("`+", command)), default=0)
            fence = "`" * max(3, longest + 1)
            parts += ["## Weights & Biases", f"{fence}bash\n{command}\n{fence}"]
        return "\n\n".join(parts) + "\n"

    def _numbers(self) -> Iterator[list[Any]]:
        """results.csv: a head, and a line for every run and metric, in the units of the result."""
        about = ["model", "strategy", "selector", "compensation", "recovery", "ratio", "n_remove", "seed", "limit"]
        calibration = ["file", "samples", "seed"]
        last, number = ["removed", "trained_on"], ["group", "task", "metric", "main", "n", *ESTIMATE]
        yield ["experiment", "run", *about, *(f"calibration_{name}" for name in calibration), *last, *number]
        for run in self.runs:
            result = run.result
            data = result["settings"].get("calibration", {})
            known = [*(result.get(name, "none") for name in about), *(data.get(name) for name in calibration)]
            known += [" ".join(run.plan.removal_names), run.trained_on]
            for line in run.numbers():
                yield [self.name, run.key, *known, *line]

    def wandb_sync(self) -> str | None:
        """The command that uploads the runs' offline W&B folders, or None if there are none."""
        places = [place for place in self.mirrors if place.isprintable() and Path(place).is_dir()]
        folders = sorted({os.path.relpath(place) for place in places})
        if not folders:
            return None
        return "wandb sync " + (_pattern(folders) or " ".join(map(shlex.quote, folders)))


def write_report_file(out: Path, name: str, text: str) -> None:
    """Write one file of a report whole.

    Raises:
        SvlError: if it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text_whole(out / name, text)
    except OSError as error:
        raise SvlError(f"cannot write the report to {out}: {error.strerror or error}") from error


def _headed_table(table: Table) -> str:
    """A table in Markdown, below its title."""
    return f"## {for_markdown(table.title)}\n\n{table_writers.as_markdown(table)}"


def _plans_table(section: Section) -> str:
    """Which layers every run removed, in Markdown."""
    lines = []
    for row in section.rows:
        for run in row.runs:
            result = run.result
            cells = [row.label, result["selector"] or "–", result["compensation"] or "–"]
            cells += [result.get("recovery") or "–"] if section.recovers else []
            cells += [f"{100 * row.ratio:g} %", result["seed"], ", ".join(run.plan.removal_names) or "–"]
            lines.append([for_markdown(cell) for cell in cells])
    methods = ["strategy", "selector", "compensation", *(["recovery"] if section.recovers else [])]
    head = [*methods, "ratio", "seed", "layers removed"]
    return table_writers.markdown_table(head, lines, "l" * len(methods) + "rrl")


def _pattern(paths: Sequence[str]) -> str | None:
    """A shell pattern for exactly these paths, if they are more than three and have one."""
    split = [Path(path).parts for path in paths]
    if len(paths) <= 3 or len({len(parts) for parts in split}) > 1:
        return None
    columns = [set(column) for column in zip(*split, strict=True)]
    pattern = os.path.join(*(min(names) if len(names) == 1 else "*" for names in columns[:-1]), "offline-run-*")
    is_safe = re.fullmatch(r"[\w@%+=:,./*-]+", pattern)  # nothing else that a shell would expand or split
    return pattern if is_safe and sorted(glob.glob(pattern)) == sorted(paths) else None
