"""The page on extending svl does what it says: its files are written down and its commands run."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT
from helpers.races import in_another_process

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
FILES = {
    found[1]: text
    for kind, text in BLOCKS
    if kind in ("python", "yaml") and (found := re.match(r"# (\S+\.(?:py|yaml))\n", text))
}
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with all files of the page."""
    root = tmp_path_factory.mktemp("extending")
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_every_kind_has_its_files_and_commands():
    named = {"strategy", "selector", "compensation", "recovery", "benchmark", "tracker"}
    assert {name.split("/")[2] for name in FILES if name.startswith("my_methods/conf/")} == named
    assert len(COMMANDS) == 9


@pytest.mark.parametrize("kind", ["first", "question", "gain", "norms"])
def test_a_method_is_short(kind):
    """Imports, docstrings and code of the first four kinds: at most 25 lines besides blank ones; YAML: 1 or 2."""
    lines = [line for line in FILES[f"my_methods/{kind}.py"].splitlines() if line.strip()]
    assert len(lines) - 1 <= 25  # the first names the file


def run_script(folder: Path, script: str, environment: dict[str, str]) -> None:
    """As `python SCRIPT` in a folder, in a process that is forked from this one."""

    def run() -> None:
        os.chdir(folder)
        sys.path[:0] = [str(Path(script).parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
        runpy.run_path(script, run_name="__main__")

    assert in_another_process(run) is None


def test_its_commands_run(folder, fork_server):
    """In their order, as in a shell: some read what others wrote."""
    for command in COMMANDS:
        words = shlex.split(command)
        given = [word for word in words if re.match(r"[A-Z_]+=", word)]
        assert words[: len(given)] == given  # before the program
        environment = dict(word.split("=", 1) for word in given)
        program, *arguments = words[len(given) :]
        if program == "python":
            (script,) = arguments
            run_script(folder, script, environment)
            continue
        assert program == "svl"
        run = fork_server.start(*arguments, cwd=folder, **environment, SVL_STORE=str(folder / "store"))
        assert fork_server.wait(run) == 0, f"{command}\n{fork_server.log(run)}"
    assert len((folder / "runs.jsonl").read_text().splitlines()) == 1
