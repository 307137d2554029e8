"""Real processes that run `svl`, forked from one that has run it before: for signals, and for several at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from helpers.commands import ENVIRONMENT
from helpers.paths import ROOT

# A line is a question, and has a line as answer. A number waits until that process has ended; the answer is how.
# {folder, arguments, environment, last_event} forks a process that runs `svl` and kills itself at its event of that
# number (0: never); the answer is its number. Events are those of the interpreter (audit events) that change what is on
# disk: a file is opened to write, renamed or removed, a folder is made.
SERVER = textwrap.dedent("""
    import atexit, gc, json, os, signal, sys, threading
    import svl.cli
    from helpers.commands import SMALL, hydra_not_asked_for_its_mode, run_svl

    CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
    WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def run(folder, arguments, environment, last_event):
        events = 0

        def count(name, about):
            nonlocal events
            if name in CHANGES or (name == "open" and about[2] & WRITES):
                events += 1
                if events == last_event:
                    os.kill(os.getpid(), signal.SIGKILL)

        os.chdir(folder)
        os.environ.update(environment)
        for name, stream in (("/dev/null", 0), (f"out-{os.getpid()}", 1), (f"err-{os.getpid()}", 2)):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), stream)
        sys.argv[1:] = arguments
        sys.addaudithook(count)
        status = 0
        try:
            with hydra_not_asked_for_its_mode():
                svl.cli.main()
        except SystemExit as end:
            status = end.code
        with open(f"events-{os.getpid()}", "w") as file:
            file.write(str(events))
        if isinstance(status, str):  # as the interpreter does with sys.exit(message)
            print(status, file=sys.stderr)
            status = 1
        # What the interpreter does at its end, without the seconds that it takes to free what the parent shares.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(status or 0)

    # Imports all that runs need, and fills caches.
    where = ("benchmark=demo", "tracker=none", "paths.store=store", "paths.outputs=out")
    run_svl("strategy=short_lvlm", "benchmark.limit=1", *where, *SMALL, cwd=sys.argv[1])
    gc.freeze()
    gc.set_threshold(20_000)
    print("ready", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        if isinstance(question, int):
            print(os.waitstatus_to_exitcode(os.waitpid(question, 0)[1]), flush=True)
        elif child := os.fork():
            print(child, flush=True)
        else:
            run(**question)
""")


class ForkServer:
    """Starts runs of `svl`; what they print is in files of their folders."""

    def __init__(self, scratch: Path) -> None:
        self.folders: dict[int, Path] = {}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(scratch)],
            cwd=ROOT / "tests",
            env=ENVIRONMENT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def start(self, *arguments: str, cwd: Path, last_event: int = 0, **environment: str) -> int:
        """Start a run, which is killed at its event of that number (0: never); its number."""
        options = {"environment": environment, "last_event": last_event}
        number = self._ask({"folder": str(cwd), "arguments": arguments, **options})
        self.folders[number] = cwd
        return number

    def wait(self, number: int) -> int:
        """Wait until a run has ended: its exit status, or the negative number of the signal that killed it."""
        return self._ask(number)

    def interrupt(self, number: int, with_signal: signal.Signals, at: str) -> int:
        """Send a run a signal as soon as its folder has a path of the pattern `at`; as `wait`."""
        folder = self.folders[number]
        while not list(folder.glob(at)):
            assert not (folder / f"events-{number}").exists(), self.log(number)  # has ended
            time.sleep(0.02)
        os.kill(number, with_signal)
        return self.wait(number)

    def output(self, number: int) -> str:
        """What a run has printed on stdout."""
        return (self.folders[number] / f"out-{number}").read_text()

    def errors(self, number: int) -> str:
        """What a run has printed on stderr."""
        return (self.folders[number] / f"err-{number}").read_text()

    def log(self, number: int) -> str:
        """All that a run has printed."""
        return self.output(number) + self.errors(number)

    def events(self, number: int) -> int:
        """How many events a run that was not killed has had."""
        return int((self.folders[number] / f"events-{number}").read_text())

    def close(self) -> None:
        """End the server."""
        self.process.kill()
        self.process.communicate()

    def _ask(self, question: object) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())
