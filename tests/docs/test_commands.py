"""Every command of the README and of the pages is run on the bundled model, or its block says what it needs.

A block of bash without a title is run, in the order of the pages, each command once. One with a title ("needs the hub",
"takes minutes") is not, but its commands must be such as the programs take: groups, choices and settings exist.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.commands import run_command, run_svl
from helpers.paths import ROOT
from transformers import AutoConfig

import svl.report
from svl.checkpoints import export_command
from svl.report import command as report_command
from svl.run.hydra_internals import expand_sweep

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.remove(ROOT / "docs" / "extending.md")  # has files, too: test_extending
OTHERS = {".venv/bin/pre-commit", "echo", "eval", "hf", "make", "pip", "python", "source", "vllm"}
QUICK = {"benchmark.limit": "1", "calibration.samples": "4", "calibration.batch_size": "4"}
LOOKING = ("list", "explain", "doctor", "--help", "--cfg")


@dataclass(frozen=True)
class Command:
    """A command of a page."""

    page: str
    words: tuple[str, ...]
    needs: str | None  # what its block says that it needs

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def commands() -> Iterator[Command]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for title, block in re.findall(r'^ *```bash(?: title="(.*)")?\n(.*?)^ *```$', text, re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                for part in shlex.join(shlex.split(line, comments=True)).split(" '&&' "):
                    if part:
                        yield Command(page.name, tuple(shlex.split(part)), title or None)


ALL = list(commands())
RUN = list({command.words: command for command in ALL if command.needs is None}.values())
MARKED = list({command.words: command for command in ALL if command.needs is not None}.values())


def test_pages_have_commands_of_both_kinds():
    assert {"getting_started.md", "command_line.md", "sweeps.md", "reports.md"} <= {command.page for command in RUN}
    assert "README.md" in {command.page for command in ALL}
    assert len(RUN) > 12


def with_few_samples(words: list[str]) -> list[str]:
    given = {word.partition("=")[0] for word in words}
    return [*words, *(f"{name}={value}" for name, value in QUICK.items() if name not in given)]


def test_commands_run(fork_server, tmp_path):
    store = {"SVL_STORE": str(tmp_path / "store")}
    for command in RUN:
        program, *words = command.words
        assert program in ("svl", "svl-report"), f"{command}: give its block a title that says what it needs"
        if program == "svl-report":
            run_command(svl.report.main, *words, cwd=tmp_path, **store)
        elif set(words) & set(LOOKING):
            assert run_svl(*words, cwd=tmp_path, **store).stdout
        else:
            run = fork_server.start(*with_few_samples(words), cwd=tmp_path, **store)
            assert fork_server.wait(run) == 0, f"{command}\n{fork_server.log(run)}"


def test_a_local_llava_is_pruned_scored_and_exported_as_the_readme_says(mimic, fork_server, tmp_path, monkeypatch):
    """Its commands, in an empty folder, on a checkpoint with the files of LLaVA-1.5."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"## Your own model and data\n\n```bash.*?\n(.*?)```", page, re.DOTALL)
    shutil.copy(ROOT / "svl" / "demo" / "data" / "calibration.parquet", tmp_path / "samples.parquet")
    outputs = []
    for line in block.replace("=DIR", f"={mimic('llava_15_7b')}").splitlines():
        program, *words = shlex.split(line, comments=True)
        if program == "svl":
            started = fork_server.start(*words, cwd=tmp_path)
            assert fork_server.wait(started) == 0, f"{line}\n{fork_server.log(started)}"
            outputs.append(fork_server.output(started))
        elif program == "svl-report":
            outputs.append(run_command(svl.report.main, *words, cwd=tmp_path).stdout)
        else:
            assert (program, words[0]) == ("python", "-c")
            monkeypatch.chdir(tmp_path)
            exec(words[1], {})
    doctor, run, report = outputs
    assert "nothing found that would end a run" in doctor
    assert "svl_demo_existence" in run
    assert "dense" in report
    assert (tmp_path / "outputs" / "report" / "run" / "report.html").is_file()
    folders = (mimic("llava_15_7b"), tmp_path / "pruned")
    layers = [AutoConfig.from_pretrained(folder).text_config.num_hidden_layers for folder in folders]
    assert layers == [32, 26]  # a fifth of them


@pytest.mark.parametrize("command", MARKED, ids=str)
def test_commands_that_are_not_run_are_such_as_the_programs_take(command: Command, tmp_path: Path):
    program, *words = command.words
    if program == "torchrun":
        program, words = "svl", words[words.index("svl") + 1 :]
    if program.partition("=")[0].isupper():
        program, words = words[0], words[1:]  # a variable before the program
    if program == "svl":
        check_settings([word for word in words if word not in ("-m", "doctor") and "=" in word], tmp_path)
    elif program == "svl-export":
        parser = export_command.convert_parser if words[0] == "convert" else export_command.command_parser
        parser().parse_args(words[words[0] == "convert" :])
    elif program == "svl-report":
        assert words[0] in report_command.COMMANDS or "=" in words[0]
    else:
        assert program in OTHERS


def check_settings(words: list[str], folder: Path) -> None:
    """The first job of a sweep can be composed."""
    if any("my_methods" in word or word == "strategy=first" for word in words):
        return  # the page's own method, which test_extending runs
    words = [word.replace(", ...}", "}") for word in words]
    run_svl(*expand_sweep(words)[0], "--cfg", "job", cwd=folder)
