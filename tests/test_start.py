"""The first moments of a command: Ctrl-C while libraries are still being imported."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from helpers.commands import ENVIRONMENT

# The library's import is where the signal arrives.
SCRIPT = """
import os, signal, sys
from importlib.abc import MetaPathFinder

class Interrupting(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {library!r}:
            os.kill(os.getpid(), signal.{signal})

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
from {module} import main
sys.argv.append("ratio=0.5")
sys.meta_path.insert(0, Interrupting())
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("module", "library", "said"),
    [("svl.cli", "hydra", "interrupted"), ("svl.report", "rich", "svl-report: interrupted")],
)
def test_ctrl_c_during_imports_is_one_line(module, library, said):
    code = SCRIPT.format(module=module, library=library, signal=signal.SIGINT.name)
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{said}\n")
