"""The command line of `svl-report`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from svl.core import SvlError, did_you_mean, one_of
from svl.report import compare, contents
from svl.report.build import Report
from svl.report.files import whole
from svl.store import Store

HELP = """svl-report: what finished runs say, from the store alone

  svl-report [build] experiment=NAME [out=DIR] [paper=FILE]   tables and figures of an experiment or sweep
  svl-report compare A B [out=FILE]                           two runs: by key, or output folder
  svl-report ls [stage=STAGE] [filter=WORD]                   what the store holds
  svl-report show KEY                                         one artifact; the beginning of its key is enough
  svl-report gc [unreferenced=true] [older=DAYS] [yes=true]   removes leftovers; without yes=true, only says which

  store         where finished runs are (default: the environment variable SVL_STORE, or outputs/store)
  out           where the report goes (default: outputs/report/NAME), or the comparison
  paper         a CSV file for the numbers in the layout of experiments/paper; refused if a sample limit was used
  unreferenced  also what no run refers to, if older than a day, or older=DAYS

build prints a table and writes report.html (one file, everything in it), report.md, table.md, table.tex, table.csv,
results.csv and the figures (PNG and PDF)."""

Settings = dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Gives the exit code: 0, or 1 after one line on stderr about what to mend."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help", "help"} & set(words):
        print(HELP)
        return 0
    try:
        name, names, settings = _parse(words)
        store = Store(settings.get("store") or os.environ.get("SVL_STORE") or "outputs/store")
        COMMANDS[name][0](store, names, settings)
    except SvlError as error:
        print(f"svl-report: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # of `svl-report ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parse(words: Sequence[str]) -> tuple[str, list[str], Settings]:
    """The command, its names, and its `key=value` words as a dict.

    Raises:
        SvlError: if a word is not understood, or names are missing.
    """
    words = ["compare" if word == "--compare" else word for word in words]
    command, words = (words[0], words[1:]) if words and "=" not in words[0] else ("build", words)
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS) or "; use experiment=NAME to report on an experiment"
        raise SvlError(f"'{command}' is not understood{hint}; commands: {', '.join(COMMANDS)}")
    _, example, count, known = COMMANDS[command]
    names: list[str] = []
    settings: Settings = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals and len(names) < count:
            names.append(word)
        elif not equals or key not in (*known, "store"):
            hint = did_you_mean(key, (*known, "store"))
            raise SvlError(f"'{word}' is not understood{hint}; use svl-report {example}")
        else:
            settings[key] = value
    if len(names) < count:
        raise SvlError(f"{command} needs {count} name{'s' * (count > 1)}: svl-report {example}")
    return command, names, settings


def _build(store: Store, _: list[str], settings: Settings) -> None:
    report = Report.read(store, settings.get("experiment"))
    report.show(Console())
    paper = report.paper() if "paper" in settings else None
    files = report.write(Path(settings.get("out") or Path("outputs/report") / report.name))
    if paper is not None:
        _write(Path(settings["paper"]), paper)
        files.append(Path(settings["paper"]))
    print("\nWritten (figures also as PDF):", *files, sep="\n  ")
    if command := report.wandb_sync():
        print(f"\nUpload to Weights & Biases:\n  {command}")


def _compare(store: Store, names: list[str], settings: Settings) -> None:
    page = compare.compare(store, *(compare.run_of(store, name) for name in names))
    print(page)
    if "out" in settings:
        _write(Path(settings["out"]), page)


def _write(path: Path, text: str) -> None:
    try:
        with whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SvlError(f"cannot write {path}: {error.strerror or error}") from error


def _ls(store: Store, _: list[str], settings: Settings) -> None:
    for line in contents.listing(store, settings.get("stage"), settings.get("filter")):
        print(line)


def _show(store: Store, names: list[str], _: Settings) -> None:
    print(contents.shown(store, *names))


def _gc(store: Store, _: list[str], settings: Settings) -> None:
    asked = {}
    for name in ("unreferenced", "yes"):
        one_of(name, settings.get(name, "false"), ("true", "false"))
        asked[name] = settings.get(name) == "true"
    try:
        days = float(settings.get("older", 1))
    except ValueError:
        raise SvlError(f"older is '{settings['older']}', but must be a number of days") from None
    try:
        for line in contents.clean(store, asked["unreferenced"], days, asked["yes"]):
            print(line)
    except OSError as error:
        raise SvlError(f"cannot clean {store.root}: {error}") from error


# what does it, an example, how many names it takes, and its settings besides store
COMMANDS: dict[str, tuple[Callable[[Store, list[str], Settings], None], str, int, tuple[str, ...]]] = {
    "build": (_build, "build experiment=NAME [store=DIR] [out=DIR] [paper=FILE]", 0, ("experiment", "out", "paper")),
    "compare": (_compare, "compare A B [store=DIR] [out=FILE]", 2, ("out",)),
    "ls": (_ls, "ls [stage=STAGE] [filter=WORD] [store=DIR]", 0, ("stage", "filter")),
    "show": (_show, "show KEY [store=DIR]", 1, ()),
    "gc": (_gc, "gc [unreferenced=true] [older=DAYS] [yes=true] [store=DIR]", 0, ("unreferenced", "older", "yes")),
}
