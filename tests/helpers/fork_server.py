"""Real processes that run `svl`, forked from one that has made its imports: for kills, and for several at once."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

from helpers.commands import ENVIRONMENT

# "start N ARGUMENTS" forks a process that runs `svl` and kills itself at its N-th event (0: never); answers its number.
# "wait NUMBER" answers how that ended. Events are those of the interpreter (audit events) that change what is on disk:
# a file is opened to write, renamed or removed, a folder is made.
SERVER = textwrap.dedent("""
    import os, signal, sys
    import svl.calibration.calibrate, svl.checkpoints.export, svl.cli, svl.evaluation.evaluate, svl.run.pipeline
    import lmms_eval.evaluator

    CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
    WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def run(last, arguments):
        events = 0

        def count(name, about):
            nonlocal events
            if name in CHANGES or (name == "open" and about[2] & WRITES):
                events += 1
                if events == last:
                    os.kill(os.getpid(), signal.SIGKILL)

        log = os.open(f"log-{os.getpid()}", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv[1:] = arguments
        sys.addaudithook(count)
        try:
            svl.cli.main()
        finally:
            with open(f"events-{os.getpid()}", "w") as file:
                file.write(str(events))

    print("ready", flush=True)
    for line in sys.stdin:
        word, number, *rest = line.split()
        if word == "wait":
            print(os.waitstatus_to_exitcode(os.waitpid(int(number), 0)[1]), flush=True)
        elif child := os.fork():
            print(child, flush=True)
        else:
            run(int(number), rest)
            os._exit(0)
""")


class ForkServer:
    """Starts runs of `svl` in `folder`; what they print is in its files log-NUMBER."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=folder,
            env=ENVIRONMENT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def start(self, *arguments: str, last_event: int = 0) -> int:
        """Start a run, which is killed at its event of that number (0: never); its number."""
        return self._ask("start", str(last_event), *arguments)

    def wait(self, number: int) -> int:
        """Wait until a run has ended: its exit status, or the negative number of the signal that killed it."""
        return self._ask("wait", str(number))

    def log(self, number: int) -> str:
        """What a run has printed."""
        return (self.folder / f"log-{number}").read_text()

    def events(self, number: int) -> int:
        """How many events a run that was not killed has had."""
        return int((self.folder / f"events-{number}").read_text())

    def close(self) -> None:
        """End the server."""
        self.process.kill()
        self.process.communicate()

    def _ask(self, *words: str) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(" ".join(words) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())
