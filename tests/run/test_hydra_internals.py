"""What is used of Hydra's insides is there, and only one module uses it."""

from __future__ import annotations

import ast
import sys
from io import StringIO

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from svl.config import PACKAGE
from svl.run.hydra_internals import ComposeOnce, WithoutJobErrors, expand_sweep


def test_each_private_name_can_be_imported():
    from hydra._internal import config_loader_impl, defaults_list
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra._internal.utils import get_args
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert callable(config_loader_impl.ConfigLoaderImpl)
    assert callable(defaults_list.create_defaults_list)
    assert callable(BasicSweeper.split_arguments)
    assert get_args(["--config-dir", "x"]).config_dir == "x"
    assert callable(GlobalHydra.instance)
    assert callable(OverridesParser.create)


def test_only_one_module_uses_them():
    users = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom | ast.Import)
        and "hydra._internal" in f"{getattr(node, 'module', '')} {[alias.name for alias in node.names]}"
    }
    assert users == {"run/hydra_internals.py"}


def test_sweeps_expand_as_hydra_does():
    assert expand_sweep(["strategy=tail,random", "ratio=range(0.1,0.3,0.1)", "seed=1"]) == [
        ["strategy=tail", "ratio=0.1", "seed=1"],
        ["strategy=tail", "ratio=0.2", "seed=1"],
        ["strategy=random", "ratio=0.1", "seed=1"],
        ["strategy=random", "ratio=0.2", "seed=1"],
    ]


def test_jobs_are_composed_once():
    class Loader:
        """As Hydra's."""

        def load_sweep_config(self, master_config, sweep_overrides):
            composed.append(sweep_overrides)
            return OmegaConf.create({"job": {"overrides": sweep_overrides}})

    composed, loader = [], Loader()
    once = ComposeOnce(loader)
    first, second = once(None, ["ratio=1"]), once(None, ["ratio=1"])
    first.job.overrides[0] = "ratio=3"  # Hydra writes into what it gets
    assert second == once(None, ["ratio=1"]) == {"job": {"overrides": ["ratio=1"]}}
    assert once(None, ["ratio=2"]).job.overrides == ["ratio=2"]
    assert composed == [["ratio=1"], ["ratio=2"]]
    compose, arguments = once.__reduce__()  # what other processes get
    assert compose(*arguments)(None, ["ratio=1"]) == second
    assert composed == [["ratio=1"], ["ratio=2"], ["ratio=1"]]


def test_the_line_that_hydra_writes_of_a_failed_job_is_left_out(monkeypatch):
    written = StringIO()
    monkeypatch.setattr(sys, "stderr", WithoutJobErrors(written))
    job = JobReturn(overrides=["ratio=2"], _return_value=ValueError("no"), status=JobStatus.FAILED)
    with pytest.raises(ValueError, match="no"):
        job.return_value  # noqa: B018 (reading it raises and writes)
    print("something else", file=sys.stderr)
    assert written.getvalue() == "something else\n"
    assert not sys.stderr.isatty()
