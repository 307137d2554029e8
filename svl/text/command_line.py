"""What the commands beside `svl` share: options written `--name value` or, as in Hydra, `name=value`; errors of a line.

parser = CommandLineParser("svl-export", description="...")
parser.add_argument("--shard-size", metavar="SIZE")     # --shard-size 5GB, --shard_size=5GB, shard_size=5GB
parser.add_argument("--yes", action="store_true")       # --yes, yes=true, yes=false
sys.exit(run_command("svl-export", lambda: export(parser.parse_args())))
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from svl.core.errors import SvlError, did_you_mean, one_of
from svl.text.escaping import for_terminal

INTERRUPTED = 130  # exit code, as shells have it: 128 + SIGINT
BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")  # which transformers goes by, too


class CommandLineParser(argparse.ArgumentParser):
    """An argument parser (also of subcommands) that takes options as name=value, too, and raises SvlError."""

    def __init__(self, prog: str | None = None, **settings: Any):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        settings.setdefault("epilog", "Options can be written as for svl, too: name=value.")
        super().__init__(prog, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise SvlError instead of printing the usage."""
        raise SvlError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse has it, after `name=value` has become `--name=value`."""
        words = sys.argv[1:] if args is None else args
        has_commands = any(isinstance(action, argparse._SubParsersAction) for action in self._actions)
        if not has_commands:  # otherwise each subcommand has a parser that knows its own options
            words = list(self._as_options(words))
        return super().parse_known_args(words, namespace)

    def _as_options(self, words: Sequence[str]) -> Iterator[str]:
        """The words with options in argparse's form.

        Raises:
            SvlError: if there is no such option.
        """
        actions = self._option_string_actions.items()
        options = {name.removeprefix("--"): action for name, action in actions if name.startswith("--")}
        for word in words:
            written = re.fullmatch(r"(--)?([A-Za-z][\w-]*)(=(.*))?", word, re.DOTALL)
            if not written or not (written[1] or written[3]):
                yield word
                continue
            name, value = written[2].replace("_", "-"), written[4]
            if name not in options:
                known = [option.replace("-", "_") for option in options if option != "help"]
                hint = did_you_mean(written[2], known)
                raise SvlError(f"there is no setting '{written[2]}'{hint}; known: {', '.join(known)}")
            is_switch = options[name].nargs == 0
            if is_switch and value is not None:
                one_of(written[2], value, ("true", "false"))
            if value == "false" and is_switch:
                continue
            yield f"--{name}" if value is None or is_switch else f"--{name}={value}"


def no_bars_in_files() -> None:
    """Where the output is no terminal, let libraries that are imported from now on draw no progress bars.

    A file would hold every state of them.
    """
    if not sys.stderr.isatty():
        for name in BARS:
            os.environ.setdefault(name, "1")


def run_command(name: str, work: Callable[[], None]) -> int:
    """Do the work of the command `name`; its exit code. Messages of a command without a name begin with "error:".

    0 if all went well; 1 after an error that a person can mend, told in one line on stderr; 130 after Ctrl-C. Bugs keep
    their traceback.
    """
    prefix = f"{name}: " if name else ""
    no_bars_in_files()
    try:
        work()
    except SvlError as error:
        print(f"{prefix}error: {for_terminal(' '.join(str(error).split()))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{prefix}interrupted; nothing half-written is left", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # of `svl-report ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
