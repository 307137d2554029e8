"""A run by several processes gives what one process gives, bit for bit; what fails in one, fails in all."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path

import pytest
from helpers.commands import QUIET, run_svl

DATA = ("calibration.samples=7", "calibration.batch_size=2", "n_remove=2")
METHODS = {
    "short_lvlm": ("strategy=short_lvlm",),
    "sleb": ("strategy=sleb",),
    "laco": ("strategy=laco",),
    "taylor": ("strategy=shortened_taylor", "compensation=none"),
    "refit": ("strategy=angular", "compensation=refit"),
}


@pytest.fixture
def together(fork_server):
    """Run two processes, as torchrun starts them; gives them when they have ended."""

    def run(*words: str, cwd: Path, code: int = 0):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        both = [fork_server.start(*words, cwd=cwd, **meeting, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
        assert [fork_server.wait(process) for process in both] == [code, code], "".join(map(fork_server.log, both))
        return both

    return run


def stored(folder: Path) -> dict[str, list[tuple[str, ...]]]:
    """Every artifact of the stages before evaluation: what it depends on, and its files' contents."""
    found = {}
    for stage in ("stats", "probe", "plan", "patch"):
        artifacts = []
        for file in (folder / "store" / stage).glob("*/manifest.json"):
            manifest = json.loads(file.read_text())
            output = {name: value for name, value in manifest["output"].items() if name != "work"}
            files = [hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(file.parent.glob("[!m]*"))]
            artifacts.append((json.dumps(manifest["inputs"], sort_keys=True), json.dumps(output), *files))
        found[stage] = sorted(artifacts)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_store_what_one_stores(method, together, tmp_path):
    words = (*METHODS[method], *QUIET, *DATA)
    for folder in ("alone", "both"):
        (tmp_path / folder).mkdir()
    run_svl(*words, cwd=tmp_path / "alone")
    together(*words, cwd=tmp_path / "both")
    expected = stored(tmp_path / "alone")
    assert expected["plan"]
    assert bool(expected["probe"]) == (method in ("sleb", "laco", "taylor"))
    assert stored(tmp_path / "both") == expected


def test_a_sample_that_fails_in_one_process_ends_both_with_its_name(together, fork_server, tmp_path):
    """Row 2 is in the second batch, which is the second process's."""
    rows = [{"prompt": "What is it?", "answer": "a circle"}] * 2 + [{"prompt": "Is <image> it?", "answer": "a circle"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = (
        "calibration=local",
        "calibration.path=rows.jsonl",
        "calibration.columns={image: null}",
        "calibration.batch_size=2",
        "strategy=shortgpt",
        *QUIET,
    )
    both = together(*words, "n_remove=2", cwd=tmp_path, code=1)
    for process in both:
        assert "row 2" in fork_server.errors(process)
    assert not list((tmp_path / "store" / "stats").glob("*/manifest.json"))
