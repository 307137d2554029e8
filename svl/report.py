"""`svl-report`: tables and figures of an experiment, from the manifests of its finished runs alone.

* A report is a pure function of the store: nothing is measured, loaded or downloaded, and it can be made again.
* A table holds only what can be compared: one model, one set of benchmarks, one sample limit.
* Runs that differ in the seed alone are one row: mean and standard deviation. A single run shows its standard error.
* Every file is written whole or not at all.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import math
import os
import re
import shlex
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from svl.core import Plan, SvlError, did_you_mean
from svl.store import Entry, Store

HELP = """svl-report: tables and figures of finished runs

  svl-report experiment=NAME [store=DIR] [out=DIR] [paper=FILE]

  experiment  name of the experiment or sweep
  store       where finished runs are (default: the environment variable SVL_STORE, or outputs/store)
  out         where the report goes (default: outputs/report/NAME)
  paper       a CSV file for the numbers in the layout of experiments/paper; refused if a sample limit was used

Prints a table and writes report.md, table.md, results.csv and the figures (PNG and PDF)."""

Run = dict[str, Any]  # the result of one run, as in result.json


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Gives the exit code: 0, or 1 after one line on stderr about what to mend."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(HELP)
        return 0
    try:
        settings = _settings(words)
        store = Store(settings.get("store") or os.environ.get("SVL_STORE") or "outputs/store")
        report = Report.read(store, settings.get("experiment"))
        report.show(Console())
        paper = report.paper() if "paper" in settings else None
        files = report.write(Path(settings.get("out") or Path("outputs/report") / report.name))
        if paper is not None:
            with whole(Path(settings["paper"])) as path:
                path.write_text(paper, encoding="utf-8")
            files.append(Path(settings["paper"]))
        print("\nWritten (figures also as PDF):", *files, sep="\n  ")
        if command := report.wandb_sync():
            print(f"\nUpload to Weights & Biases:\n  {command}")
    except SvlError as error:
        print(f"svl-report: {error}", file=sys.stderr)
        return 1
    return 0


def _settings(words: Iterable[str]) -> dict[str, str]:
    """`key=value` words as a dict."""
    settings, known = {}, ("experiment", "store", "out", "paper")
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            hint = did_you_mean(key, known)
            raise SvlError(f"'{word}' is not understood{hint}; use experiment=NAME [store=DIR] [out=DIR] [paper=FILE]")
        settings[key] = value
    return settings


# ------------------------------------------------------------------------------------------------- rows


class Estimate(NamedTuple):
    """A number and its error (standard error, or standard deviation over seeds), None where unknown."""

    value: float | None
    error: float | None = None


def merge(estimates: Sequence[Estimate]) -> Estimate:
    """One run: itself. Several seeds: mean and sample standard deviation; a value missing in one is missing."""
    if len(estimates) == 1:
        return estimates[0]
    values = [e.value for e in estimates if e.value is not None]
    if len(values) < len(estimates):
        return Estimate(None)
    return Estimate(statistics.fmean(values), statistics.stdev(values))


@dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but the seed.

    Attributes:
        label: name of the method.
        runs: their results, ascending by seed.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def ratio(self) -> float:
        """Fraction of layers removed, as asked for."""
        return self.runs[0]["ratio"]

    def score(self, task: str | None) -> Estimate:
        """Main metric of a benchmark, or the average over all (None)."""
        return merge([_estimate(_main(run, task)) for run in self.runs])

    @property
    def retained(self) -> Estimate:
        """The average as a fraction of the dense one."""
        return merge([_estimate(run["retained"] or {}) for run in self.runs])

    @property
    def speed(self) -> Estimate:
        """Samples per second as a multiple of the dense model's in the same run."""
        names = ("samples_per_second", "samples_per_second_dense")
        pairs = [[run["cost"].get(name) for name in names] for run in self.runs]
        return merge([Estimate(value / dense if value is not None and dense else None) for value, dense in pairs])


def _main(run: Run, task: str | None) -> dict[str, Any]:
    """Value, stderr and dense value of a benchmark's main metric, or of the average (None); empty where undefined."""
    if task is None:
        return run["average"] or {}
    return run["scores"][task]["metrics"][run["scores"][task]["metric"]]


def _estimate(body: dict[str, Any]) -> Estimate:
    return Estimate(body.get("value"), body.get("stderr"))


class Method(NamedTuple):
    """What a row is about; equal for runs that differ in a seed only."""

    strategy: str
    selector: str
    compensation: str
    settings: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, run: Run) -> Method:
        """The method of a run."""
        settings = tuple((name, value) for name, value in _settings_of(run) if not name.endswith(".seed"))
        return cls(run["strategy"], run["selector"] or "none", run["compensation"] or "none", settings)

    def label(self, methods: Iterable[Method]) -> str:
        """The strategy's name; where `methods` use it in several ways, what tells them apart in brackets."""
        same = [other for other in methods if other.strategy == self.strategy]
        differs = [self[i] for i in (1, 2) if len({other[i] for other in same}) > 1]
        alike = [dict(other.settings) for other in same if other[:3] == self[:3]]
        differs += [f"{k}={v}" for k, v in self.settings if any(other.get(k) != v for other in alike)]
        return self.strategy + (f" ({', '.join(map(str, differs))})" if differs else "")


def _seeds(run: Run) -> list[Any]:
    """The run's seed, and those of its parts."""
    return [run["seed"], *(value for name, value in _settings_of(run) if name.endswith(".seed"))]


def _settings_of(run: Run) -> Iterator[tuple[str, str]]:
    """Settings of a run's strategy, selector (if it used one) and compensation as ("selector.p", "0.5")."""
    for group, settings in sorted(run.get("settings", {}).items()):
        if run.get(group, "") is not None:
            for name, value in sorted(settings.items()):
                if name != "_target_":
                    yield f"{group}.{name}", value if isinstance(value, str) else json.dumps(value)


# ----------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Section:
    """One table: runs of one model on the same benchmarks with the same sample limit.

    Attributes:
        experiment: its name.
        runs: their results, oldest first; the last speaks for what all have in common.
    """

    experiment: str
    runs: tuple[Run, ...]

    @property
    def title(self) -> str:
        """Experiment, model and, where there is one, the limit."""
        limit = self.runs[-1]["limit"]
        return f"{self.experiment}: {self.runs[-1]['model']}" + ("" if limit is None else f" (limit={limit:g})")

    @cached_property
    def rows(self) -> list[Row]:
        """Ascending by ratio, then by label; of runs with equal seeds, the newest."""
        groups: dict[tuple[Any, ...], dict[str, Run]] = {}
        for run in self.runs:
            seeds = groups.setdefault((run["ratio"], run["n_remove"], Method.of(run)), {})
            seeds[json.dumps(_seeds(run))] = run
        methods = {method for _, _, method in groups}
        rows = [
            Row(method.label(methods), tuple(sorted(seeds.values(), key=lambda run: run["seed"])))
            for (_, _, method), seeds in groups.items()
        ]
        return sorted(rows, key=lambda row: (row.ratio, row.runs[0]["n_remove"], row.label))

    def lower(self, task: str | None) -> bool:
        """Whether lower values of a benchmark (None: of any) are better."""
        scores = self.runs[-1]["scores"]
        return any(not scores[t].get("higher_is_better", True) for t in (scores if task is None else (task,)))

    def scale(self, task: str | None) -> int:
        """100 where all values of a benchmark (None: the averages) are fractions, to be shown in %; else 1."""
        if self.lower(task):
            return 1
        values = [value for run in self.runs for key in ("value", "dense") if (value := _main(run, task).get(key))]
        return 100 if all(abs(value) <= 1 for value in values) else 1

    def cells(self) -> tuple[list[str], list[list[str]], set[int]]:
        """The table: header, rows of text (the dense model first), and the rows with the best average of a ratio."""
        run, cost = self.runs[-1], self.runs[-1]["cost"]
        tasks = list(run["scores"])
        shared = re.sub(r"[^_]*$", "", os.path.commonprefix(tasks)) if len(tasks) > 1 else ""  # noqa: RUF071
        scale = {task: self.scale(task) for task in (*tasks, None)}
        heads = [task.removeprefix(shared) if task else "average" for task in scale]
        units = [" %" if size == 100 else "" for size in scale.values()]
        header = ["strategy", "ratio", "removed", *map(str.__add__, heads, units), "retained %", "params", "speed"]

        places = {task: 3 if self.lower(task) else 1 for task in scale}  # losses are small numbers
        dense = [_number(Estimate(_main(run, task).get("dense")), scale[task], places[task]) for task in scale]
        retained = "–" if self.lower(None) else "100.0"
        table = [
            ["dense", "0 %", f"0 / {cost['layers_dense']}", *dense, retained, _count(cost.get("params_dense")), "×1.00"]
        ]
        for row in self.rows:
            first, seeds = row.runs[0], len(row.runs)
            table.append(
                [
                    row.label if seeds == 1 else f"{row.label} ({seeds} seeds)",
                    f"{100 * row.ratio:g} %",
                    f"{first['n_remove']} / {first['cost']['layers_dense']}",
                    *(_number(Estimate(row.score(task).value), scale[task], places[task]) for task in tasks),
                    _number(row.score(None), scale[None], places[None]),
                    _number(Estimate(row.retained.value), 100),
                    _count(first["cost"].get("params")),
                    "–" if row.speed.value is None else f"×{row.speed.value:.2f}",
                ]
            )
        best = set()
        for ratio in {row.ratio for row in self.rows}:
            rivals = {
                i: v
                for i, row in enumerate(self.rows, 1)
                if row.ratio == ratio and (v := row.score(None).value) is not None
            }
            winner = min if self.lower(None) else max
            best |= {i for i, value in rivals.items() if len(rivals) > 1 and value == winner(rivals.values())}
        return header, table, best

    def notes(self) -> list[str]:
        """What a reader must know to read the table."""
        run = self.runs[-1]
        rate = run["cost"].get("samples_per_second_dense")
        tasks = ", ".join(f"{t} ({s['metric']}, n = {s['n']})" for t, s in run["scores"].items())
        notes = [
            f"Benchmarks: {tasks or 'none'}.",
            "±: standard error over the samples; in rows of several seeds, standard deviation over the seeds.",
            "Retained: average relative to the dense average. Bold: the best average at that ratio.",
            "Speed: samples per second relative to the dense model" + (f" ({rate:.3g} per second)." if rate else "."),
        ]
        if run["limit"] is not None:
            notes.insert(0, f"Caution: limit={run['limit']:g}, so only a part of every benchmark was used.")
        if len({_main(run, None).get("dense") for run in self.runs}) > 1:
            notes.append("Caution: the dense average differs between runs (versions? device?); the newest is shown.")
        if older := len(self.runs) - sum(len(row.runs) for row in self.rows):
            notes.append(f"Left out: {older} older run(s) with the same method, ratio and seed as a newer one.")
        return notes

    def markdown(self) -> str:
        """The table and its notes as Markdown."""
        header, table, best = self.cells()
        lines = [header, ["---", *["---:"] * (len(header) - 1)]]
        lines += [
            [f"**{c}**" if i in best and j == len(header) - 4 else c for j, c in enumerate(line)]
            for i, line in enumerate(table)
        ]
        return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", *(f"- {n}" for n in self.notes())])

    def terminal(self) -> Table:
        """The table for a terminal."""
        header, table, best = self.cells()
        shown = Table(title=Text(self.title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for j, name in enumerate(header):
            shown.add_column(Text(name), justify="right" if j else "left", no_wrap=True)
        for i, line in enumerate(table):
            last = i + 1 == len(table) or line[1] != table[i + 1][1]  # of its ratio
            styles = ["bold" if i in best and j == len(header) - 4 else "" for j in range(len(header))]
            shown.add_row(*map(Text, line, styles), end_section=last)
        return shown


def _number(estimate: Estimate, scale: float, places: int = 1) -> str:
    """Value and error with so many decimals, both times `scale`."""
    if estimate.value is None:
        return "–"
    error = "" if estimate.error is None else f" ± {scale * estimate.error:.{places}f}"
    return f"{scale * estimate.value:.{places}f}{error}"


def _count(n: int | None) -> str:
    """1234567 -> "1.23 M"."""
    if n is None:
        return "–"
    size, unit = next(((s, u) for s, u in ((1e9, " B"), (1e6, " M"), (1e3, " k")) if n >= s), (1, ""))
    return f"{n / size:.3g}{unit}" if n < 999.5 * size else f"{n / size:.0f}{unit}"


# ----------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Report:
    """All finished runs of one experiment.

    Attributes:
        name: of the experiment.
        entries: its runs in the store, oldest first.
        mirrors: folders or addresses where a tracker put them.
    """

    name: str
    entries: tuple[Entry, ...]
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
            raise SvlError(f"no finished run in the store {store.root}; run one first, or name another with store=DIR")
        names = sorted({str(entry.output.get("name")) for entry in found})
        if name is None or name not in names:
            problem = f"no finished run of experiment '{name}'" if name else "which experiment? Say experiment=NAME"
            raise SvlError(f"{problem}{did_you_mean(name or '', names)}; {store.root} has: {', '.join(names)}")
        entries = tuple(entry for entry in found if entry.output.get("name") == name)
        keys = {entry.key for entry in entries}
        tracked = [entry.output for entry in store.entries("track") if entry.output.get("run") in keys]
        report = cls(name, entries, tuple(output["location"] for output in tracked if output.get("location")))
        try:
            report._check_checkpoints()
            report._markdown([{} for _ in report.sections])  # reads all that a report needs, before anything is shown
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
        """Tables of comparable runs, sorted by model; whole benchmarks before limited ones."""
        groups: dict[tuple[Any, ...], list[Run]] = {}
        for run in (entry.output for entry in self.entries):
            tasks = tuple(sorted((task, score["metric"]) for task, score in run["scores"].items()))
            limit = math.inf if run["limit"] is None else run["limit"]
            groups.setdefault((run["model"], -limit, tasks), []).append(run)
        return [Section(self.name, tuple(groups[key])) for key in sorted(groups)]

    def show(self, console: Console) -> None:
        """Print the tables; where they are too wide, lines run over rather than lose numbers."""
        for section in self.sections:
            table = section.terminal()
            console.width = max(console.width, Console(width=10_000).measure(table).maximum)
            console.print(table)
            for note in section.notes():
                console.print(Text(note, "dim"), soft_wrap=True)

    def write(self, out: Path) -> list[Path]:
        """Write all files of the report into `out`; gives their paths, report.md first.

        Raises:
            SvlError: if `out` cannot be written.
        """
        try:
            out.mkdir(parents=True, exist_ok=True)
            pictures = [self._draw(section, out, i) for i, section in enumerate(self.sections, 1)]
            tables = "\n\n".join(f"## {section.title}\n\n{section.markdown()}" for section in self.sections)
            texts = {"report.md": self._markdown(pictures), "table.md": tables + "\n", "results.csv": self._csv()}
            for name, text in texts.items():
                with whole(out / name) as path:
                    path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise SvlError(f"cannot write the report to {out}: {error.strerror or error}") from error
        return [*(out / name for name in texts), *(path for drawn in pictures for path in drawn)]

    def _draw(self, section: Section, out: Path, number: int) -> dict[Path, str]:
        """Draw a section's figures: captions by PNG file. With several sections, file names have its number."""
        from svl import figures  # here, because matplotlib takes a second that --help need not wait

        scale = section.scale(None)
        curves: dict[str, list[tuple[float, float, float | None]]] = {}
        plans: dict[str, dict[float, Plan]] = {}
        for row in sorted(section.rows, key=lambda row: row.label):
            value, error = row.score(None)
            points = curves.setdefault(row.label, [])
            if value is not None:
                points.append((row.ratio, scale * value, None if error is None else scale * error))
            plan = row.runs[0]["plan"]  # of the first seed
            made = Plan(plan["n_layers"], tuple(plan["removed"]), tuple(plan["importance"] or ()))
            plans.setdefault(row.label, {})[row.ratio] = made
        drawn = {}
        if any(curves.values()):
            dense = _main(section.runs[-1], None).get("dense")
            unit = " (%)" if scale == 100 else ""
            figure = figures.accuracy_vs_ratio(
                curves,
                None if dense is None else scale * dense,
                title=section.title,
                ylabel=f"average over the benchmarks{unit}",
            )
            drawn["accuracy_vs_ratio"] = (figure, "Average over the benchmarks against the layers removed")
        figure = figures.importance(plans, title=section.title)
        drawn["importance"] = (figure, "Importance of layers, and layers removed")
        for entry in self.entries:
            selector, image, numbers = entry.output["selector"], entry.path / "example.png", entry.path / "example.json"
            name = "token_importance-" + re.sub(r"[^A-Za-z0-9]+", "_", selector or "none")
            here = any(entry.output is run for run in section.runs)
            if here and name not in drawn and image.is_file() and numbers.is_file():
                title = f"{section.title}, selector {selector}"
                figure = figures.token_importance(image, json.loads(numbers.read_text()), title=title)
                drawn[name] = (figure, f"Tokens that selector '{selector}' prefers")
        captions = {}
        for name, (figure, caption) in drawn.items():
            target = out / (name + (f"-{number}" if len(self.sections) > 1 else "") + ".png")
            for path in (target, target.with_suffix(".pdf")):
                with whole(path) as temporary:
                    figures.save(figure, temporary)
            captions[target] = caption
        return captions

    def _markdown(self, pictures: list[dict[Path, str]]) -> str:
        """report.md."""
        parts = [f"# {self.name}"]
        for section, drawn in zip(self.sections, pictures, strict=True):
            parts += [f"## {section.title}", section.markdown()]
            parts += [f"![{caption}]({path.name})" for path, caption in drawn.items()]
            lines = [
                "| strategy | selector | compensation | ratio | seed | layers removed |",
                "|---|---|---|---:|---:|---|",
            ]
            for run, label in ((run, row.label) for row in section.rows for run in row.runs):
                cells = [label, run["selector"] or "–", run["compensation"] or "–", f"{100 * run['ratio']:g} %"]
                cells += [str(run["seed"]), ", ".join(map(str, run["plan"]["removed"])) or "–"]
                lines.append("| " + " | ".join(cells) + " |")
            parts.append("\n".join([*lines, "", "Layers count from 0."]))
        versions = {
            ", ".join(f"{k} {v}" for k, v in sorted(entry.output["versions"].items())) for entry in self.entries
        }
        parts += ["## Versions", "\n".join(f"- {line}" for line in sorted(versions))]
        if command := self.wandb_sync():
            parts += ["## Weights & Biases", f"```bash\n{command}\n```"]
        return "\n\n".join(parts) + "\n"

    def paper(self) -> str:
        """Main metrics and averages in the layout and the units of experiments/paper (CSV), the dense model first.

        Raises:
            SvlError: if a sample limit was used: such numbers are no results.
        """
        out = io.StringIO()
        table = csv.writer(out, lineterminator="\n")
        table.writerow(["model", "method", "pruning_ratio", "benchmark", "score", "samples_per_second"])
        for section in self.sections:
            first = section.runs[-1]
            if first["limit"] is not None:
                raise SvlError(f"'{section.title}' is no table for a paper: run it without benchmark.limit")
            tasks = [*first["scores"], None]
            dense = {task: Estimate(_main(first, task).get("dense")) for task in tasks}
            lines = [("dense", 0.0, dense, first["cost"].get("samples_per_second_dense"))]
            for row in section.rows:
                scores = {task: row.score(task) for task in tasks}
                lines.append((row.label, row.ratio, scores, row.runs[0]["cost"].get("samples_per_second")))
            for label, ratio, scores, speed in lines:
                for task, estimate in scores.items():
                    name = "average" if task is None else task.removeprefix("svl_")
                    value = "" if estimate.value is None else f"{section.scale(task) * estimate.value:.1f}"
                    rate = f"{speed:.2f}" if speed and task is None else ""
                    table.writerow([first["model"], label, ratio, name, value, rate])
        return out.getvalue()

    def _csv(self) -> str:
        """Tidy results: one row per run and metric, in the units of the result."""
        shared = ["model", "strategy", "selector", "compensation", "ratio", "n_remove", "seed", "limit"]
        out = io.StringIO()
        table = csv.writer(out, lineterminator="\n")
        numbers = ["group", "task", "metric", "main", "n", "value", "stderr", "dense"]
        table.writerow(["experiment", "run", *shared, "removed", *numbers])
        for entry in self.entries:
            run = entry.output
            removed = " ".join(map(str, run["plan"]["removed"]))
            for row in _numbers(run):
                table.writerow([self.name, entry.key, *(run[name] for name in shared), removed, *row])
        return out.getvalue()

    def wandb_sync(self) -> str | None:
        """The command that uploads the runs' offline W&B folders, or None if there are none."""
        folders = sorted({os.path.relpath(place) for place in self.mirrors if Path(place).is_dir()})
        if not folders:
            return None
        return "wandb sync " + (_pattern(folders) or " ".join(map(shlex.quote, folders)))


def _numbers(run: Run) -> Iterator[tuple[Any, ...]]:
    """Every number of a result: (group, task, metric, main, n, value, stderr, dense)."""
    for task, score in run["scores"].items():
        for metric, body in score["metrics"].items():
            main = int(metric == score["metric"])
            yield "eval", task, metric, main, score["n"], body["value"], body.get("stderr"), body.get("dense")
    for name in ("average", "retained"):
        body = run[name] or {}
        yield "eval", "", name, 0, "", body.get("value"), body.get("stderr"), body.get("dense")
    for group in ("cost", "seconds"):
        for name, value in run[group].items():
            if not name.endswith("_dense"):
                yield group, "", name, 0, "", value, None, run[group].get(f"{name}_dense")


def _pattern(paths: Sequence[str]) -> str | None:
    """A shell pattern for exactly these paths, if they are more than three and have one."""
    split = [Path(path).parts for path in paths]
    if len(paths) <= 3 or len({len(parts) for parts in split}) > 1:
        return None
    parts = [set(column) for column in zip(*split, strict=True)]
    pattern = os.path.join(*(part.pop() if len(part) == 1 else "*" for part in parts[:-1]), "offline-run-*")
    safe = re.fullmatch(r"[\w@%+=:,./*-]+", pattern)  # nothing else that a shell would expand or split
    return pattern if safe and sorted(glob.glob(pattern)) == sorted(paths) else None


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path to write; it replaces `path` at the end, or vanishes if writing fails."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
