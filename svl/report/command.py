"""The command line of `svl-report`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from svl.core import SvlError, did_you_mean
from svl.report import dashboard, run_comparison
from svl.report.experiment_report import Report
from svl.report.results import runs_by_experiment
from svl.store import cleanup, contents
from svl.store.artifacts import Store
from svl.store.files import write_text_whole
from svl.text.command_line import CommandLineParser, run_command
from svl.text.escaping import for_terminal

DESCRIPTION = """What finished runs showed, from the store alone.

  svl-report experiment=demo                    tables and figures of an experiment or sweep (as: build experiment=demo)
  svl-report dashboard experiment=demo          the same, live: written again while a sweep runs, until Ctrl-C
  svl-report compare 18e4 c0a4                  two runs, by key or output folder
  svl-report ls stage=run filter=llava          what the store holds
  svl-report show 18e4                          one artifact; the beginning of its key is enough
  svl-report gc unreferenced=true yes=true      removes leftovers; without yes=true, only lists them"""


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Gives the exit code: 0, or 1 after one line on stderr about what to mend."""
    words = list(sys.argv[1:] if argv is None else argv)

    def work() -> None:
        args = _parser().parse_args(_with_command(words))
        args.work(Store(args.store), args)

    return run_command("svl-report", work)


def _with_command(words: list[str]) -> list[str]:
    """The words with the command first: `build` where none is given.

    Raises:
        SvlError: if the first word is neither a command nor an option.
    """
    if not words:
        return ["build"]
    first = words[0]
    if first == "--compare":
        return ["compare", *words[1:]]
    if first in ("-h", "--help") or first in COMMANDS:
        return words
    if first == "help":
        return ["--help"]
    if first.startswith("-") or "=" in first:
        return ["build", *words]
    hint = did_you_mean(first, COMMANDS) or "; use experiment=NAME to report on an experiment"
    raise SvlError(f"'{first}' is not understood{hint}; commands: {', '.join(COMMANDS)}")


def _parser() -> argparse.ArgumentParser:
    """The parser of all commands; `work` in what it gives does the command's work."""
    parser = CommandLineParser("svl-report", description=DESCRIPTION)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (work, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"svl-report {name}: {summary}.")
        command.set_defaults(work=work)
        command.add_argument(
            "--store",
            metavar="DIR",
            default=os.environ.get("SVL_STORE", "outputs/store"),
            help="where finished runs are (default: the environment variable SVL_STORE, or outputs/store)",
        )
        _add_arguments(name, command)
    return parser


def _add_arguments(name: str, command: argparse.ArgumentParser) -> None:
    """What a command takes besides the store."""
    add = command.add_argument
    if name == "build":
        add("--experiment", metavar="NAME", help="whose runs are reported")
        add("--out", type=Path, metavar="DIR", help="where the report goes (default: outputs/report/NAME)")
        add(
            "--paper",
            type=Path,
            metavar="FILE",
            help="also a CSV file in the layout of experiments/paper; refused if a sample limit was used",
        )
    elif name == "dashboard":
        add("--experiment", metavar="NAME", help="whose runs are shown (default: the only one in the store)")
        add("--out", type=Path, metavar="DIR", help="where the page goes (default: outputs/report/NAME)")
        add("--every", type=int, default=30, metavar="SECONDS", help="how often the store is looked at (default: 30)")
    elif name == "compare":
        add("runs", nargs=2, metavar="RUN", help="a run's key, the beginning of it, or its output folder")
        add("--out", type=Path, metavar="FILE", help="also write the comparison (Markdown) there")
    elif name == "ls":
        add("--stage", help="only artifacts of this stage")
        add("--filter", metavar="WORD", help="only artifacts whose line has this word")
    elif name == "show":
        add("key", metavar="KEY", help="an artifact's key, or the beginning of it")
    elif name == "gc":
        add("--unreferenced", action="store_true", help="also what no run refers to, if older than older=DAYS")
        add("--older", type=float, default=1.0, metavar="DAYS", help="(default: 1)")
        add("--yes", action="store_true", help="remove; without it, say what would be removed")


def _build(store: Store, args: argparse.Namespace) -> None:
    report = Report.read(store, args.experiment)
    report.show(Console())
    paper = report.paper() if args.paper else None
    files = report.write(args.out or _folder(report.name))
    if paper is not None:
        _write(args.paper, paper)
        files.append(args.paper)
    print("\nWritten (figures also as PDF):", *(for_terminal(file) for file in files), sep="\n  ")
    if command := report.wandb_sync():
        print(f"\nUpload to Weights & Biases:\n  {for_terminal(command)}")


def _folder(name: str) -> Path:
    """Where an experiment's report goes."""
    return Path("outputs/report") / re.sub(r"[/\\]|^\.+", "_", name)


def _dashboard(store: Store, args: argparse.Namespace) -> None:
    if args.every < 1:
        raise SvlError(f"every is {args.every}, but must be at least 1 second")
    known = sorted(runs_by_experiment(store))
    if args.experiment is None and len(known) != 1:
        raise SvlError(f"which experiment? Give experiment=NAME; {store.root} has: {', '.join(known) or 'none yet'}")
    name = args.experiment or known[0]
    out = args.out or _folder(name)
    print(f"Open {for_terminal(out / 'report.html')} in a browser; Ctrl-C ends this.", flush=True)
    try:
        for n in dashboard.follow(store, name, out, args.every, dashboard.every(args.every)):
            print(f"  {n} finished", flush=True)
    except KeyboardInterrupt:
        print("ended; the page stays as it is")


def _compare(store: Store, args: argparse.Namespace) -> None:
    comparison = run_comparison.compare_runs(*(run_comparison.find_run(store, word) for word in args.runs))
    print(comparison)
    if args.out:
        _write(args.out, comparison)


def _write(path: Path, text: str) -> None:
    try:
        write_text_whole(path, text)
    except OSError as error:
        raise SvlError(f"cannot write {path}: {error.strerror or error}") from error


def _ls(store: Store, args: argparse.Namespace) -> None:
    for line in contents.format_listing(store, args.stage, args.filter):
        print(for_terminal(line))


def _show(store: Store, args: argparse.Namespace) -> None:
    print(for_terminal(contents.format_artifact(store, args.key)))


def _gc(store: Store, args: argparse.Namespace) -> None:
    for line in cleanup.clean_store(store, args.unreferenced, args.older, args.yes):
        print(for_terminal(line))


COMMANDS: dict[str, tuple[Callable[[Store, argparse.Namespace], None], str]] = {
    "build": (_build, "print a table, and write report.html, report.md, tables, results.csv and figures"),
    "dashboard": (_dashboard, "the report of a running sweep, written again whenever a run has finished"),
    "compare": (_compare, "two runs side by side"),
    "ls": (_ls, "what the store holds"),
    "show": (_show, "one artifact: what it was made of, what it holds, what uses it"),
    "gc": (_gc, "leftovers of killed processes and damaged artifacts"),
}
