"""Sweeps on several processes: joblib, submitit, Ray, SLURM; accelerators leased one each; a search."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import textwrap
import time

import pytest
from helpers.commands import ENVIRONMENT, QUIET, SMALL, numbers, read, run_svl, svl_process

LAUNCHERS = {
    "joblib": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    "gpus": ("hydra/launcher=gpus", "hydra.launcher.n_jobs=2"),
    "submitit": ("hydra/launcher=submitit_local", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=20"),
    "ray": ("hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2",
            "+hydra.launcher.ray.init.include_dashboard=false"),
    "slurm": ("hydra/launcher=slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1",
              "hydra.launcher.mem_gb=null", "hydra.launcher.timeout_min=20"),
}  # fmt: skip
PLUGINS = {"gpus": "joblib", "slurm": "submitit"}
JOBS = ("-m", "strategy=shortgpt", "n_remove=2,3,17", *QUIET, *SMALL)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the jobs give one after the other."""
    folder = tmp_path_factory.mktemp("basic")
    run_svl(*JOBS, cwd=folder, code=1)
    return results(folder)


def results(folder) -> dict[str, dict]:
    return {file.parent.name: numbers(read(file.parent)[1]) for file in folder.glob("out/run/*/*/result.json")}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_jobs_in_parallel_give_what_they_give_alone(launcher, undisturbed, tmp_path, monkeypatch):
    plugin = f"hydra_plugins.hydra_{PLUGINS.get(launcher, launcher)}_launcher"
    if importlib.util.find_spec("hydra_plugins") is None or importlib.util.find_spec(plugin) is None:
        pytest.skip(f"needs hydra-{PLUGINS.get(launcher, launcher)}-launcher")
    if launcher == "slurm" and (
        shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True).returncode
    ):
        pytest.skip("needs a SLURM controller that answers")
    for wait in ("raylet_start_wait_time_s", "worker_register_timeout_seconds"):  # of Ray, on a busy machine
        monkeypatch.setitem(ENVIRONMENT, f"RAY_{wait}", "300")
    done = svl_process(*JOBS, *LAUNCHERS[launcher], cwd=tmp_path, code=1)
    assert results(tmp_path) == undisturbed, done.stdout + done.stderr
    assert sorted(undisturbed) == ["0", "1"]
    assert re.search(r"^error: 1 of 3 jobs failed .*:\n  \S+/2: ", done.stderr, re.MULTILINE), done.stderr
    assert len(list((tmp_path / "store" / "stats").glob("*/manifest.json"))) == 1  # computed once for all processes


LEASE = textwrap.dedent("""
    import sys
    from svl.run.parallel import lease_accelerator
    print(lease_accelerator(2), flush=True)
    assert lease_accelerator(2) == lease_accelerator(2)
    sys.stdin.read()
""")


def test_each_process_has_an_accelerator_of_its_own(tmp_path):
    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", LEASE], env={**ENVIRONMENT, "TMPDIR": str(tmp_path)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    holders = [start(), start()]
    holding = {holder.stdout.readline(): holder for holder in holders}
    assert sorted(holding) == ["0\n", "1\n"]
    waiting = start()  # one that does not wait would take the first it tries, 0
    time.sleep(0.5)
    holding["1\n"].kill()  # its owner's death frees it
    holding["1\n"].wait()
    assert waiting.stdout.readline() == "1\n"
    for process in (holding["0\n"], waiting):
        process.communicate("")
        assert process.returncode == 0


def test_search_finds_the_best_of_its_trials(tmp_path):
    pytest.importorskip("lmms_eval")
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    run_svl("-m", "experiment=hparams_search", "hydra.sweeper.n_trials=3", "benchmark.limit=4", "calibration.samples=4",
        "tracker=none", "paths.store=store", "paths.outputs=out", cwd=tmp_path)  # fmt: skip
    (root,) = (tmp_path / "out" / "hparams_search").iterdir()
    tried = {file.parent.name: json.loads(file.read_text()) for file in root.glob("*/result.json")}
    assert sorted(tried) == ["0", "1", "2"]
    assert len({json.dumps(result["settings"]) for result in tried.values()}) == 3
    best = (root / "optimization_results.yaml").read_text()
    assert f"best_value: {max(result['average']['value'] for result in tried.values())}" in best
