"""Packages of methods besides svl's own."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import hydra
import pytest
from helpers.commands import QUIET, run_svl
from helpers.methods import CHOICES, method

from svl import config, config_methods, plugins
from svl.core import SvlError

FIRST = """
    from dataclasses import dataclass

    import torch

    from svl.core import Plan, Stats, Strategy


    @dataclass(frozen=True)
    class First(Strategy):
        spared: int = 1
        alpha: float = 0.5

        def plan(self, stats: Stats, n_remove: int) -> Plan:
            importance = torch.arange(stats.n_layers).float()
            importance[: self.spared] = stats.n_layers
            return stats.plan(importance, n_remove)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a strategy and its configuration, as the README shows it; forgotten afterwards."""
    package = tmp_path / "my_methods"
    (package / "conf" / "strategy").mkdir(parents=True)
    (package / "first.py").write_text(textwrap.dedent(FIRST))
    (package / "conf" / "strategy" / "first.yaml").write_text("_target_: my_methods.first.First\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_methods"]:
        del sys.modules[name]


def plan_of(folder: Path) -> dict:
    (file,) = (folder / "out").rglob("plan.json")
    return json.loads(file.read_text())


def test_a_folder_is_registered_by_one_setting(folder):
    run_svl("strategy=first", "n_remove=2", *QUIET, cwd=folder, SVL_PLUGINS="./my_methods")
    assert plan_of(folder)["removed"] == [1, 2]
    assert plan_of(folder)["strategy"] == "first"


def test_fields_that_the_yaml_does_not_list_can_be_set(folder):
    run_svl("strategy=first", "strategy.spared=3", "n_remove=2", *QUIET, cwd=folder, SVL_PLUGINS="./my_methods")
    assert plan_of(folder)["removed"] == [3, 4]


BENT = """
    from dataclasses import dataclass

    from svl.core import Compensation, Patch


    @dataclass(frozen=True)
    class Bent(Compensation):
        def fit(self, hidden, plan):
            return Patch()
"""


def test_choices_in_messages_are_svls_and_those_of_plugins(folder, monkeypatch):
    package = folder / "my_methods"
    (package / "conf" / "compensation").mkdir()
    (package / "bent.py").write_text(textwrap.dedent(BENT))
    (package / "conf" / "compensation" / "bent.yaml").write_text("_target_: my_methods.bent.Bent\n")
    (package / "conf" / "compensation" / "broken.yaml").write_text("_target_: my_methods.bent.Missing\n")
    monkeypatch.setenv("SVL_PLUGINS", str(package))
    folding = {name for name in CHOICES["compensation"] if method("compensation", name).foldable} - {"none"}
    assert config_methods.choices_with("compensation", "foldable") == ", ".join(sorted({*folding, "bent"}))
    tried_out = ["strategy=iterative", "strategy@strategy.of=sleb", "compensation=ghosted"]
    for words in (tried_out, ["compensation=linearpatch", "export.path=new"]):
        config.register_with_hydra()
        with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
            cfg = hydra.compose("config", overrides=words)
        with pytest.raises(SvlError, match=rf"folds into weights: bent, {', '.join(sorted(folding))}$"):
            config.validate_config(cfg)


def test_a_misspelt_field_of_the_last_job_is_found_before_the_first_one_starts(folder):
    words = ("-m", "strategy=first", "n_remove=1,2", "strategy.alhpa=1", *QUIET)
    done = run_svl(*words, cwd=folder, code=1, SVL_PLUGINS="./my_methods")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: strategy has no setting 'alhpa' (did you mean 'alpha'?); it has: spared, alpha")
    assert not list((folder / "out").rglob("run.log"))


def test_its_choices_are_listed_and_suggested(folder):
    assert "  first" in run_svl("list", "strategies", cwd=folder, SVL_PLUGINS="./my_methods").stdout.splitlines()
    done = run_svl("strategy=frist", *QUIET, cwd=folder, code=1, SVL_PLUGINS="./my_methods")
    assert "there is no strategy 'frist' (did you mean 'first'?)" in done.stderr
    shown = run_svl("strategy=first", "--cfg", "job", cwd=folder, SVL_PLUGINS=str(folder / "my_methods")).stdout
    assert "_target_: my_methods.first.First" in shown


def test_yaml_of_a_plugin_names_its_own_folder(folder):
    tasks = folder / "my_methods" / "conf" / "benchmark"
    tasks.mkdir()
    (tasks / "mine.yaml").write_text("name: mine\ninclude_path: ${plugin:my_methods}/tasks\n")
    shown = run_svl("benchmark=mine", "--cfg", "job", "--resolve", cwd=folder, SVL_PLUGINS="./my_methods").stdout
    assert f"include_path: {folder / 'my_methods' / 'tasks'}" in shown


def test_folders_that_cannot_be_imported_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my-methods").mkdir()
    (tmp_path / "json").mkdir()
    for entry, reason in (
        (tmp_path / "nowhere", "there is no folder"),
        (tmp_path / "my-methods", "cannot be imported"),
        (tmp_path / "json", "a module called 'json' is installed already"),
    ):
        monkeypatch.setenv("SVL_PLUGINS", str(entry))
        with pytest.raises(SvlError, match=f"SVL_PLUGINS: .*{reason}"):
            plugins.find_plugins()


def test_wrong_folder_is_one_line_on_the_command_line(tmp_path):
    done = run_svl(*QUIET, cwd=tmp_path, code=1, SVL_PLUGINS="./nowhere")
    assert done.stderr.splitlines() == ["error: SVL_PLUGINS: there is no folder './nowhere'"]


def test_installed_packages_are_found_by_their_entry_points(folder, monkeypatch):
    installed = folder / "mine-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[svl.plugins]\nmine = my_methods\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("SVL_PLUGINS", raising=False)
    (found,) = plugins.find_plugins()
    assert (found.name, found.folder) == ("my_methods", folder / "my_methods")
    assert found.conf == folder / "my_methods" / "conf"
    run_svl("strategy=first", "n_remove=1", *QUIET, cwd=folder)
    assert plan_of(folder)["removed"] == [1]
