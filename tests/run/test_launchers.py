"""Sweeps on several processes: joblib, submitit, Ray, SLURM; accelerators leased one each; a search."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from types import SimpleNamespace

import pytest
import torch
from helpers.commands import QUIET, SMALL, numbers, read, run_svl
from helpers.races import another_process

from svl.run import parallel

LAUNCHERS = {
    "gpus": ("hydra/launcher=gpus", "hydra.launcher.n_jobs=2"),  # joblib, each job with an accelerator
    "submitit": ("hydra/launcher=submitit_local", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=20"),
    "ray": ("hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=1",
            "+hydra.launcher.ray.init.include_dashboard=false"),
    "slurm": ("hydra/launcher=slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1",
              "hydra.launcher.mem_gb=null", "hydra.launcher.timeout_min=20"),
}  # fmt: skip
PLUGINS = {"gpus": "joblib", "slurm": "submitit"}
JOBS = ("-m", "strategy=shortgpt", *QUIET, *SMALL)
COUNTS = (2, 17, 3)  # the second job fails


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the jobs give one after the other."""
    folder = tmp_path_factory.mktemp("basic")
    run_svl(*JOBS, counts(COUNTS), cwd=folder, code=1)
    return results(folder)


def counts(layers: Sequence[int]) -> str:
    """The override that makes a job of every number of layers to remove."""
    return "n_remove=" + ",".join(map(str, layers))


def results(folder) -> dict[str, dict]:
    return {file.parent.name: numbers(read(file.parent)[1]) for file in folder.glob("out/run/*/*/result.json")}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_jobs_in_parallel_give_what_they_give_alone(launcher, undisturbed, fork_server, tmp_path):
    plugin = f"hydra_plugins.hydra_{PLUGINS.get(launcher, launcher)}_launcher"
    if importlib.util.find_spec("hydra_plugins") is None or importlib.util.find_spec(plugin) is None:
        pytest.skip(f"needs hydra-{PLUGINS.get(launcher, launcher)}-launcher")
    if launcher == "slurm" and (
        shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True).returncode
    ):
        pytest.skip("needs a SLURM controller that answers")
    # Of Ray, on a busy machine.
    waits = {f"RAY_{name}": "300" for name in ("raylet_start_wait_time_s", "worker_register_timeout_seconds")}
    jobs = COUNTS if launcher == "gpus" else COUNTS[:2]  # others start an interpreter for every job
    run = fork_server.start(*JOBS, counts(jobs), *LAUNCHERS[launcher], cwd=tmp_path, **waits)
    assert fork_server.wait(run) == 1
    assert sorted(undisturbed) == ["0", "2"]
    expected = {number: undisturbed[number] for number in undisturbed if int(number) < len(jobs)}
    assert results(tmp_path) == expected, fork_server.log(run)
    errors = fork_server.errors(run)
    assert re.search(rf"^error: 1 of {len(jobs)} jobs failed .*:\n  \S+/1: ", errors, re.MULTILINE), errors
    assert len(list((tmp_path / "store" / "stats").glob("*/manifest.json"))) == 1  # computed once for all processes


def lease(names):
    """What a process that leases one of `names` tells."""

    def hold(told: Connection) -> None:
        told.send(names[number := parallel.lease_accelerator(names)])
        assert parallel.lease_accelerator(names) == number
        told.recv()

    return hold


@pytest.fixture
def no_lease(tmp_path, monkeypatch):
    """A machine on which nothing is leased."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(parallel, "_leased", {})


def test_each_process_has_an_accelerator_of_its_own(no_lease, monkeypatch):
    names = ["GPU-a", "GPU-b"]

    def wait(told: Connection) -> None:
        def pause(_: float) -> None:
            told.send("waits")
            told.recv()

        monkeypatch.setattr(time, "sleep", pause)
        lease(names)(told)

    with another_process(lease(names)) as first, another_process(lease(names)) as second:
        holders = {told.recv(): (process, told) for process, told in (first, second)}
        assert holders.keys() == {*names}
        with another_process(wait) as (waiting, told):
            assert told.recv() == "waits"  # one that does not wait would take the first it tries
            holders["GPU-b"][0].kill()  # its owner's death frees it
            holders["GPU-b"][0].join()
            told.send("look again")
            assert told.recv() == "GPU-b"
            for process, pipe in (holders["GPU-a"], (waiting, told)):
                pipe.send("enough")
                process.join()
                assert process.exitcode == 0


def test_processes_that_see_different_accelerators_do_not_wait_for_each_other(no_lease):
    """Each sees one, which is number 0 to both."""
    with another_process(lease(["GPU-a"])) as (one, told_one), another_process(lease(["GPU-b"])) as (other, told_other):
        assert {told_one.recv(), told_other.recv()} == {"GPU-a", "GPU-b"}
        for process, told in ((one, told_one), (other, told_other)):
            told.send("enough")
            process.join()


@pytest.mark.parametrize(
    ("visible", "uuids", "names"),
    [
        (None, ["1-2", "3-4"], ["GPU-1-2", "GPU-3-4"]),
        ("1,0", ["3-4", "1-2"], ["GPU-3-4", "GPU-1-2"]),
        ("MIG-5-6", ["9-9"], ["MIG-5-6"]),  # of which torch tells the UUID of the whole device
        ("GPU-3", ["3-4"], ["GPU-3-4"]),  # a beginning is enough for CUDA
    ],
)
def test_accelerators_have_names_that_all_processes_share(visible, uuids, names, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: len(uuids))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=uuids[i]))
    assert parallel.accelerator_names() == names


def test_what_plans_share_is_computed_within_a_lease(no_lease, monkeypatch, tmp_path):
    """And the lease ends with it: jobs come after it."""
    monkeypatch.setattr(parallel, "accelerator_names", lambda: ["GPU-a"])
    file = tmp_path / "leased"
    parallel.in_leased_process(lambda: file.write_text(str(parallel.lease_accelerator())))
    assert file.read_text() == "0"
    with another_process(lease(["GPU-a"])) as (process, told):
        assert told.recv() == "GPU-a"
        told.send("enough")
        process.join()


def test_search_finds_the_best_of_its_trials(tmp_path):
    pytest.importorskip("lmms_eval")
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    run_svl("-m", "experiment=hparams_search", "hydra.sweeper.n_trials=2", "benchmark.limit=4", "calibration.samples=4",
        "tracker=none", "paths.store=store", "paths.outputs=out", cwd=tmp_path)  # fmt: skip
    (root,) = (tmp_path / "out" / "hparams_search").iterdir()
    tried = {file.parent.name: json.loads(file.read_text()) for file in root.glob("*/result.json")}
    assert sorted(tried) == ["0", "1"]
    assert len({json.dumps(result["settings"]) for result in tried.values()}) == 2
    best = (root / "optimization_results.yaml").read_text()
    assert f"best_value: {max(result['average']['value'] for result in tried.values())}" in best
