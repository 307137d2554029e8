"""The device script at reduced shapes on the CPU, on a machine that has little more than torch and transformers."""

import json
import subprocess
import sys

import pytest
from helpers.paths import ROOT

PIECES = "abceg"  # `d` is the same measurement as `c`; `f` trains nothing but takes minutes; `h` would run these tests

# Runs a script as if nothing were installed but some packages and what these need themselves.
BARE = """
import re, runpy, sys
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

def plain(name):
    return re.sub("[-_.]+", "-", re.match("[A-Za-z0-9._-]+", name)[0]).lower()

there, open_ends = set(), ["torch", "transformers", "safetensors", "numpy", "pillow", "svl"]
while open_ends:
    name = plain(open_ends.pop())
    if name in there:
        continue
    there.add(name)
    if name != "svl":
        try:
            open_ends += [need for need in requires(name) or () if "extra ==" not in need]
        except PackageNotFoundError:
            pass  # for another platform

homes = {module: {plain(d) for d in found} for module, found in packages_distributions().items()}

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        found = homes.get(name.partition(".")[0])
        return None if found and not found & there else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        return (d for d in super().find_distributions(*args, **kwargs) if plain(d.name) in there)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Where one run of the script has written its pieces."""
    out = tmp_path_factory.mktemp("device")
    run_bare(out, ",".join(PIECES))
    return out


def run_bare(out, pieces):
    script = str(ROOT / "scripts/bench_device.py")
    command = [sys.executable, "-c", BARE, script, str(out), "--small", "--device", "cpu", "--pieces", pieces]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("piece", PIECES)
def test_every_piece_runs_on_a_bare_machine(out, piece):
    assert f"({piece}) failed" not in (out / "table.txt").read_text()
    assert (out / f"{piece}.json").exists()


def test_every_compensation_is_measured(out):
    measured = json.loads((out / "b.json").read_text())["found"]
    files = {file.stem for file in (ROOT / "conf/compensation").glob("*.yaml")}
    assert len(measured) - 1 >= len(files - {"none", "linear_replaceme"})  # the latter is `linear` without a ridge


def test_a_finished_piece_is_read_and_not_run_again(out):
    file = out / "g.json"
    stored = json.loads(file.read_text())
    stored["found"]["bytes"] = 123454321
    file.write_text(json.dumps(stored))
    assert "123454321" in run_bare(out, "g")


def test_the_exported_checkpoint_computes_what_was_scored(out):
    assert json.loads((out / "g.json").read_text())["found"]["logits_equal"] is True
