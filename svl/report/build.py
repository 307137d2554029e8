"""The report of one experiment: what goes into it, and the files it consists of."""

from __future__ import annotations

import csv
import glob
import io
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.console import Console
from rich.text import Text

from svl.core import SvlError, did_you_mean
from svl.report import page, paper, pictures, tables
from svl.report.files import whole
from svl.report.rows import Section, sections, versions_of
from svl.store import Entry, Store


@dataclass(frozen=True)
class Report:
    """All finished runs of one experiment.

    Attributes:
        name: of the experiment.
        entries: its runs in the store, oldest first.
        store: where they are.
        mirrors: folders or addresses where a tracker put them.
    """

    name: str
    entries: tuple[Entry, ...]
    store: Store
    mirrors: tuple[str, ...] = ()

    @classmethod
    def read(cls, store: Store, name: str | None) -> Report:
        """The report of experiment `name`.

        Raises:
            SvlError: if there are no such runs, a manifest lacks what a report needs, or runs of one model name are
                of different checkpoints.
        """
        found = list(store.entries("run"))
        if not found:
            raise SvlError(no_runs(store))
        names = sorted({str(entry.output.get("name")) for entry in found})
        if name is None or name not in names:
            problem = f"no finished run of experiment '{name}'" if name else "which experiment? Say experiment=NAME"
            raise SvlError(f"{problem}{did_you_mean(name or '', names)}; {store.root} has: {', '.join(names)}")
        entries = tuple(entry for entry in found if entry.output.get("name") == name)
        keys = {entry.key for entry in entries}
        tracked = [entry.output for entry in store.entries("track") if entry.output.get("run") in keys]
        report = cls(name, entries, store, tuple(output["location"] for output in tracked if output.get("location")))
        try:
            report._check_checkpoints()
            report._markdown([[] for _ in report.sections])  # reads all that a report needs, before anything is shown
            report._csv()
        except (KeyError, TypeError) as error:
            raise SvlError(
                f"runs of '{name}' in {store.root} are of another version of svl (problem: {error})"
            ) from error
        return report

    def _check_checkpoints(self) -> None:
        prints: dict[str, set[str]] = {}
        for entry in self.entries:
            prints.setdefault(entry.output["model"], set()).add(entry.output["model_fingerprint"])
        for model, found in prints.items():
            if len(found) > 1:
                raise SvlError(
                    f"experiment '{self.name}' has runs of {len(found)} different checkpoints called '{model}' "
                    f"(fingerprints {', '.join(sorted(found))}), which cannot be compared; use another model or "
                    f"experiment name, or delete the old runs from {self.entries[0].path.parent}"
                )

    @cached_property
    def sections(self) -> list[Section]:
        """What can be compared, a table each."""
        return sections(self.name, [entry.output for entry in self.entries])

    @cached_property
    def tables(self) -> list[tables.Table]:
        """A table of every section."""
        return [tables.tabulate(section) for section in self.sections]

    def show(self, console: Console) -> None:
        """Print the tables; where they are too wide, lines run over rather than lose numbers."""
        for table in self.tables:
            shown = tables.terminal(table)
            console.width = max(console.width, Console(width=10_000).measure(shown).maximum)
            console.print(shown)
            for note in table.notes:
                console.print(Text(note, "dim"), soft_wrap=True)

    def write(self, out: Path) -> list[Path]:
        """Write all files of the report into `out`; gives their paths, report.html first.

        Raises:
            SvlError: if `out` cannot be written.
        """
        try:
            out.mkdir(parents=True, exist_ok=True)
            number = [f"-{i}" if len(self.sections) > 1 else "" for i in range(1, len(self.sections) + 1)]
            drawn = [
                pictures.draw(section, self.entries, self.store, out, suffix)
                for section, suffix in zip(self.sections, number, strict=True)
            ]
            texts = {
                "report.html": page.render(self.name, self.sections, self.tables, drawn, self.entries, self.store),
                "report.md": self._markdown(drawn),
                "table.md": "\n\n".join(f"## {t.title}\n\n{tables.markdown(t)}" for t in self.tables) + "\n",
                "table.tex": tables.latex(self.tables),
                "results.csv": self._csv(),
            }
            for table, suffix in zip(self.tables, number, strict=True):
                texts[f"table{suffix}.csv"] = tables.comma_separated(table)
            for name, text in texts.items():
                with whole(out / name) as path:
                    path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise SvlError(f"cannot write the report to {out}: {error.strerror or error}") from error
        return [*(out / name for name in texts), *(picture.path for found in drawn for picture in found)]

    def paper(self) -> str:
        """See svl.report.paper.layout."""
        return paper.layout(self.sections)

    def _markdown(self, drawn: list[list[pictures.Picture]]) -> str:
        """report.md."""
        parts = [f"# {self.name}"]
        for section, table, found in zip(self.sections, self.tables, drawn, strict=True):
            parts += [f"## {section.title}", tables.markdown(table)]
            parts += [f"![{picture.caption}]({picture.path.name})\n\n*{picture.caption}*" for picture in found]
            lines = [
                "| strategy | selector | compensation | ratio | seed | layers removed |",
                "|---|---|---|---:|---:|---|",
            ]
            for run, label in ((run, row.label) for row in section.rows for run in row.runs):
                cells = [label, run["selector"] or "–", run["compensation"] or "–", f"{100 * run['ratio']:g} %"]
                cells += [str(run["seed"]), ", ".join(map(str, run["plan"]["removed"])) or "–"]
                lines.append("| " + " | ".join(cells) + " |")
            parts.append("\n".join([*lines, "", "Layers count from 0."]))
        versions = {versions_of(entry.output) for entry in self.entries}
        parts += ["## Versions", "\n".join(f"- {line}" for line in sorted(versions))]
        if command := self.wandb_sync():
            parts += ["## Weights & Biases", f"```bash\n{command}\n```"]
        return "\n\n".join(parts) + "\n"

    def _csv(self) -> str:
        """Tidy results: one row per run and metric, in the units of the result."""
        shared = ["model", "strategy", "selector", "compensation", "ratio", "n_remove", "seed", "limit"]
        out = io.StringIO()
        table = csv.writer(out, lineterminator="\n")
        numbers = ["group", "task", "metric", "main", "n", "value", "stderr", "dense"]
        calibration = ["file", "samples", "seed"]
        table.writerow(
            ["experiment", "run", *shared, *(f"calibration_{name}" for name in calibration), "removed", *numbers]
        )
        for entry in self.entries:
            run = entry.output
            data, removed = run["settings"].get("calibration", {}), " ".join(map(str, run["plan"]["removed"]))
            about = [*(run[name] for name in shared), *(data.get(name) for name in calibration), removed]
            for row in tables.numbers(run):
                table.writerow([self.name, entry.key, *about, *row])
        return out.getvalue()

    def wandb_sync(self) -> str | None:
        """The command that uploads the runs' offline W&B folders, or None if there are none."""
        folders = sorted({os.path.relpath(place) for place in self.mirrors if Path(place).is_dir()})
        if not folders:
            return None
        return "wandb sync " + (_pattern(folders) or " ".join(map(shlex.quote, folders)))


def no_runs(store: Store) -> str:
    """What to say of a store without runs: that there is no such folder, or where the runs may be instead."""
    if not store.root.is_dir():
        return f"there is no store {store.root}; run an experiment first, or name another store with store=DIR"
    inner = store.root / "store"
    hint = f" (did you mean store={inner}?)" if (inner / "run").is_dir() else ""
    return f"no finished run in the store {store.root}{hint}; run one first, or name another with store=DIR"


def _pattern(paths: Sequence[str]) -> str | None:
    """A shell pattern for exactly these paths, if they are more than three and have one."""
    split = [Path(path).parts for path in paths]
    if len(paths) <= 3 or len({len(parts) for parts in split}) > 1:
        return None
    parts = [set(column) for column in zip(*split, strict=True)]
    pattern = os.path.join(*(part.pop() if len(part) == 1 else "*" for part in parts[:-1]), "offline-run-*")
    safe = re.fullmatch(r"[\w@%+=:,./*-]+", pattern)  # nothing else that a shell would expand or split
    return pattern if safe and sorted(glob.glob(pattern)) == sorted(paths) else None
