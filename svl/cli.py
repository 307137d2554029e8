"""Entry point of the `svl` command: which of its parts is asked for. Imports no more than that part needs."""

from __future__ import annotations

import sys
from collections.abc import Callable

HELP = ("--help", "-h")
COMMANDS = ("doctor", "explain", "list")


def main() -> None:
    """Run what the command line asks for; Ctrl-C ends in one line from the first import on."""
    try:
        from svl.text.command_line import no_bars_in_files

        no_bars_in_files()
        find_command(sys.argv[1:])()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def find_command(words: list[str]) -> Callable[[], object]:
    """What the words of the command line ask for; without any, help."""
    first, *rest = words or HELP
    if first == "doctor":
        from svl.run.application import run_in_one_line

        return lambda: run_in_one_line(_doctor)
    if {first, *rest} & {*HELP, "--version"} or first in ("list", "explain"):
        return lambda: _show(first, rest)
    if not first.startswith(("-", "+", "~")) and "=" not in first:
        return lambda: _unknown(first)
    from svl.run.application import app, run_in_one_line

    return lambda: run_in_one_line(app)


def _doctor() -> None:
    if not set(sys.argv) & {*HELP}:
        print("examining libraries, settings, model and data ...\n", flush=True)  # before torch is imported
    from svl.doctor.command import run_doctor

    run_doctor()


def _show(first: str, rest: list[str]) -> None:
    """Print a page of the catalog; what is wrong with the question is one line."""
    from svl.catalog import command
    from svl.text.command_line import run_command

    if {first, *rest} & {*HELP}:
        work = command.show_help
    elif "--version" in (first, *rest):
        work = command.show_version
    else:
        work = command.show_list if first == "list" else command.show_explanation
    sys.exit(run_command("", lambda: work(rest)))


def _unknown(word: str) -> None:
    from svl.core import did_you_mean

    known = ", ".join(COMMANDS)
    sys.exit(f"error: there is no command '{word}'{did_you_mean(word, COMMANDS)}; commands: {known}; "
             "settings are written NAME=VALUE; see svl --help")  # fmt: skip


if __name__ == "__main__":
    main()
