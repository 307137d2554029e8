"""Running a command in limited time, with all that it starts."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile


def run_in_time(
    command: Sequence[str],
    seconds: float,
    folder: Path,
    *,
    given: str = "",
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder` and give its exit code and what it wrote, stdout and stderr together.

    Its process group ends with the time, or with an exception here. What it says goes through a file: processes that
    outlive it may hold a pipe open for ever.

    Args:
        command: program and arguments.
        seconds: how long it may take.
        folder: where it runs.
        given: text for its standard input.
        environment: variables besides those of this process.

    Raises:
        TimeoutError: if it takes longer.
    """
    # not through this process's W&B service, which would go on trying and hold up the end of this process
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    with TemporaryFile("w+", encoding="utf-8") as source, TemporaryFile("w+b") as sink:
        source.write(given)
        source.seek(0)
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**inherited, **(environment or {})},
            stdin=source,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimeoutError(f"no end after {seconds:.0f} s") from error
            raise
        sink.seek(0)
        return subprocess.CompletedProcess(command, code, sink.read().decode("utf-8", "replace"))
