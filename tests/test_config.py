"""Configuration: every file composes, every target binds, mistakes are named, a recipe's parts can be swapped."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import hydra
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from svl import config, export
from svl.compensation.none import NoCompensation
from svl.compensation.subspace import Subspace
from svl.core import SvlError
from svl.selectors.simple import Last, Random, Text
from svl.selectors.tis import Tis

config.register()

ROOT = Path(__file__).parents[1]
CHOICES = sorted(
    (path.parent.relative_to(config.CONF).as_posix(), path.stem)
    for path in config.CONF.rglob("*.yaml")
    if path.parent not in (config.CONF, config.CONF / "local")
)
EXPERIMENTS = [name for group, name in CHOICES if group == "experiment"]


def compose(*overrides: str, with_hydra: bool = False) -> DictConfig:
    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        return hydra.compose("config", overrides=list(overrides), return_hydra_config=with_hydra)


def node(target: str, **values: Any) -> DictConfig:
    return OmegaConf.create({"_target_": target, **values})


# ----------------------------------------------------------------------------------------------- every file


def test_every_file_is_looked_at():
    folders = {Path(folder).relative_to(config.CONF).as_posix() for folder, _, names in os.walk(config.CONF) if names}
    assert {group for group, _ in CHOICES} == folders - {".", "local"}
    assert len(CHOICES) >= 24
    assert not [p for p in config.CONF.rglob("*") if p.is_file() and p.suffix != ".yaml"]  # .yml would not be found
    assert [p.name for p in config.CONF.glob("*.yaml")] == ["config.yaml"]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_binds(group, choice):
    cfg = compose(f"{group}={choice}")
    for method in config.METHODS:
        config.build(cfg[method], method)
    if group in config.METHODS:
        assert cfg[group]["_target_"].startswith("svl.")
    assert OmegaConf.missing_keys(cfg) == ({f"{group}.path"} if choice == "local" else set())  # to be given by the user


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_and_every_value_it_sweeps_over_is_valid(name):
    cfg = compose(f"experiment={name}", with_hydra=True)
    assert cfg.name != "run"  # or its runs would end up in the report of single runs
    config.validate(cfg)
    swept = cfg.hydra.sweeper.get("params") or {}
    assert cfg.hydra.mode is None  # run with -m; Hydra 1.4 refuses a mode in a file
    for key, values in swept.items():
        (override,) = OverridesParser.create().parse_overrides([f"{key}={values}"])
        if override.is_interval_sweep():
            words = [f"{key}={end}" for end in (override.value().start, override.value().end)]
        else:
            words = [word for (word,) in BasicSweeper.split_arguments([override], None)[0]]
        for word in words:
            config.validate(compose(f"experiment={name}", word))


PAGES = {page.parent.name: page.read_text() for page in (ROOT / "experiments").glob("*/README.md")}
TWINS = [name for name in EXPERIMENTS if name.endswith("_demo")]


def test_every_experiment_has_a_page_and_every_page_speaks_of_experiments_there_are():
    assert len(EXPERIMENTS) >= 19
    for name in EXPERIMENTS:  # variants of one may be told of with it: NAME, NAME_demo, NAME_tokens
        pages = [page for folder, page in PAGES.items() if f"{name}_".startswith(f"{folder}_")]
        assert any(re.search(rf"^ *svl -m experiment={name}\b", page, re.MULTILINE) for page in pages), name
    named = {
        name for page in PAGES.values() for name in re.findall(r"^ *svl (?:-m )?experiment=(\w+)", page, re.MULTILINE)
    }
    assert named == set(EXPERIMENTS)
    index = (ROOT / "experiments" / "README.md").read_text()
    assert {folder for folder in PAGES if f"({folder}/README.md)" not in index} == set()


def test_experiments_on_the_hubs_models_have_twins_on_bundled_ones():
    def models(name: str) -> set[str]:
        swept = (compose(f"experiment={name}", with_hydra=True).hydra.sweeper.get("params") or {}).get("model")
        names = swept.split(",") if swept else [None]
        chosen = [compose(f"experiment={name}", *([f"model={n}"] if n else [])) for n in names]
        return {str(cfg.model.path) for cfg in chosen}

    assert len(TWINS) == 7
    for twin in TWINS:
        assert twin.removesuffix("_demo") in EXPERIMENTS
        assert all(path.startswith(("svl:", str(config.PACKAGE))) for path in models(twin)), twin
    for name in set(EXPERIMENTS) - set(TWINS):
        bundled = all(path.startswith(("svl:", str(config.PACKAGE))) for path in models(name))
        assert bundled or f"{name}_demo" in TWINS, name


def test_defaults_are_valid():
    cfg = compose()
    parts = config.validate(cfg)
    assert set(parts) == set(config.METHODS)
    assert cfg.ratio == 0.25


# -------------------------------------------------------------------------------------------------- recipes


def test_strategy_brings_its_papers_selector_and_compensation():
    parts = config.validate(compose("strategy=short_lvlm"))
    assert isinstance(parts["selector"], Tis)
    assert isinstance(parts["compensation"], Subspace)
    for strategy in ("shortgpt", "tail", "random"):
        assert isinstance(config.validate(compose(f"strategy={strategy}"))["compensation"], NoCompensation)


@pytest.mark.parametrize("order", [1, -1])
def test_command_line_wins_over_the_strategys_choice(order):
    overrides = ["strategy=short_lvlm", "selector=text", "compensation=none"]
    parts = config.validate(compose(*overrides[::order]))
    assert isinstance(parts["selector"], Text)
    assert isinstance(parts["compensation"], NoCompensation)


def test_experiment_wins_over_the_strategys_choice_and_the_command_line_over_both(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /strategy: short_lvlm\n  - override /selector: last\nname: mine\n"
    )
    mine = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"]
    parts = config.validate(compose(*mine))
    assert isinstance(parts["selector"], Last)
    assert isinstance(parts["compensation"], Subspace)  # not overridden, so the paper's
    assert isinstance(config.validate(compose(*mine, "strategy=short_lvlm"))["selector"], Last)
    assert isinstance(config.validate(compose(*mine, "selector=text"))["selector"], Text)


def test_settings_of_the_machine_apply_below_experiments_and_the_command_line(tmp_path):
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "default.yaml").write_text("name: mine\npaths: {store: /scratch/store}\n")
    mine = f"hydra.searchpath=[file://{tmp_path}]"
    assert (compose(mine).name, compose(mine).paths.store) == ("mine", "/scratch/store")
    assert compose(mine, "experiment=demo").name == "demo"
    assert compose(mine, "paths.store=here").paths.store == "here"


@pytest.mark.parametrize(("found", "jobs"), [(0, 1), (3, 3)])
def test_as_many_jobs_at_once_as_accelerators(found, jobs, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    monkeypatch.setattr("torch.accelerator.device_count", lambda: found)
    hydra_config = compose("hydra/launcher=gpus", with_hydra=True).hydra
    assert hydra_config.launcher.n_jobs == jobs
    assert hydra_config.job.env_set.SVL_LEASE == "1"


def test_seed_reaches_what_is_random():
    parts = config.validate(compose("strategy=random", "selector=random", "seed=7"))
    assert parts["strategy"].seed == parts["selector"].seed == 7
    assert isinstance(parts["selector"], Random)


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["ratio=1"], ["ratio is 1", "[0, 1)"]),
        (["ratio=-0.1"], ["ratio is -0.1"]),
        (["ratio=nan"], ["ratio is nan"]),
        (["n_remove=-1"], ["n_remove is -1", "at least 0"]),
        (["calibration.samples=0"], ["calibration.samples is 0", "at least 1"]),
        (["calibration.batch_size=0"], ["calibration.batch_size is 0"]),
        (["benchmark.limit=0"], ["benchmark.limit is 0", "whole number"]),
        (["benchmark.limit=1.5"], ["benchmark.limit is 1.5", "a share below 1"]),
        (["benchmark.batch_size=-3"], ["benchmark.batch_size is -3"]),
        (["model=local"], ["model.path is not set"]),
        (["calibration=local"], ["calibration.path is not set"]),
        (["+selector.pp=0.5"], ["selector has no setting 'pp'", "did you mean 'p'?", "rule", "pool"]),
        (["+compensation.rnk=1"], ["compensation has no setting 'rnk'", "did you mean 'rank'?", "gain"]),
        (["strategy=tail", "+strategy.seed=1"], ["strategy has no setting 'seed'", "it has: -"]),
        (["selector.p=many"], ["selector", "'many'", "Float", "setting 'p'"]),
        (["compensation.targets=[1]", "compensation.rank=4.5"], ["compensation", "Integer", "setting 'rank'"]),
        (["selector.visible=perhaps"], ["selector", "setting 'visible'"]),
        (["selector.p=0"], ["selector.p is 0", "(0, 1]"]),
        (["selector.rule=nuclues"], ["selector.rule is 'nuclues'", "fraction, nucleus", "did you mean 'nucleus'?"]),
        (["compensation.targets=[mpl]"], ["compensation.targets is 'mpl'", "did you mean 'mlp'?"]),
        (["tracker.mode=of"], ["tracker.mode is 'of'", "offline, online, disabled"]),
        (["strategy._target_=svl.strategies.cosin.Cosine"], ["strategy._target_", "cannot be imported"]),
        (["strategy._target_=svl.strategies.cosine.Cosin"], ["strategy._target_", "cannot be imported"]),
        (["strategy._target_=svl.core.one_of"], ["strategy._target_ 'svl.core.one_of' is no dataclass"]),
        (["strategy._target_=os.system"], ["'os.system' is outside svl", "SVL_PLUGINS"]),
        (["strategy._target_=svlx.Cosine"], ["'svlx.Cosine' is outside svl"]),
        (["~strategy._target_"], ["strategy has no _target_"]),
    ],
)
def test_mistakes_are_named(overrides, says, monkeypatch):
    monkeypatch.delenv("SVL_PLUGINS", raising=False)
    with pytest.raises(SvlError) as caught:
        config.validate(compose(*overrides))
    message = str(caught.value)
    assert [part for part in says if part not in message] == [], message
    assert "\n" not in message


def test_export_folder_must_be_new(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    for path in (tmp_path, f"~/{tmp_path.name}"):
        with pytest.raises(SvlError, match=r"export\.path .* exists already"):
            export.check(path)
    export.check("~/new")


def test_benchmarks_without_lmms_eval_say_what_to_install(monkeypatch):
    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SvlError, match=r"pip install 'svl\[eval\]'"):
        config.validate(compose())
    config.validate(compose("benchmark=none"))


# -------------------------------------------------------------------------------------------------- plugins


@dataclass(frozen=True)
class Method:
    """All kinds of fields that a method may have."""

    number: int
    layers: tuple[int, ...]
    rate: float = 1.0
    names: tuple[str, ...] = ("a", "b")
    weights: dict[str, float] = field(default_factory=lambda: {"x": 1.0})
    limit: float | None = None
    needs: ClassVar[frozenset[str]] = frozenset()


METHOD = f"{__name__}.Method"


def test_targets_outside_svl_need_permission(monkeypatch):
    for plugins in ("", "other", __name__[:-1]):
        monkeypatch.setenv("SVL_PLUGINS", plugins)
        with pytest.raises(SvlError, match=rf"'{METHOD}' is outside svl.*SVL_PLUGINS"):
            config.build(node(METHOD, number=1, layers=[]), "strategy")
    monkeypatch.setenv("SVL_PLUGINS", f"other,{__name__}")
    assert config.build(node(METHOD, number=1, layers=[2]), "strategy") == Method(1, (2,))


def test_values_are_checked_against_the_dataclass(monkeypatch):
    monkeypatch.setenv("SVL_PLUGINS", __name__)
    given = {"number": 1, "layers": [3, 4], "rate": 2, "names": [], "weights": {"y": 2}, "limit": 1}
    assert config.build(node(METHOD, **given), "strategy") == Method(1, (3, 4), 2.0, (), {"x": 1.0, "y": 2.0}, 1.0)
    for wrong, key in (({}, "number"), ({"number": 1}, "layers"), ({"number": 1, "layers": ["x"]}, "layers[0]")):
        with pytest.raises(SvlError, match=r"^strategy: ") as caught:
            config.build(node(METHOD, **wrong), "strategy")
        assert f"setting '{key}'" in str(caught.value)


def test_a_method_of_ones_own_is_two_new_files(tmp_path):
    (tmp_path / "my_methods.py").write_text(textwrap.dedent('''
        from dataclasses import dataclass
        from typing import ClassVar

        from svl.core import Plan, Stats


        @dataclass(frozen=True)
        class Highest:
            """The opposite of Short-LVLM: remove the layers that do most."""

            sign: float
            needs: ClassVar[frozenset[str]] = frozenset({"cosine"})

            def plan(self, stats: Stats, n_remove: int) -> Plan:
                return stats.plan(self.sign * (1 - stats.cosine()), n_remove)
    '''))  # fmt: skip
    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    (tmp_path / "conf" / "strategy" / "highest.yaml").write_text("_target_: my_methods.Highest\nsign: -1\n")

    def svl(*overrides: str, **env: str) -> subprocess.CompletedProcess[str]:
        common = ["benchmark=none", "tracker=none", "paths.store=store", "paths.outputs=out", "calibration.samples=4"]
        return subprocess.run(
            [sys.executable, "-m", "svl", "--config-dir", "conf", "strategy=highest", *common, *overrides],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path), "SVL_PLUGINS": "", **env},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert "outside svl" in svl().stderr
    typo = svl("strategy.sgn=1", SVL_PLUGINS="my_methods").stderr
    assert (
        typo == "error: there is no setting 'strategy.sgn' (did you mean 'strategy.sign'?); known here: strategy.sign\n"
    )
    done = svl("n_remove=1", SVL_PLUGINS="my_methods")
    assert done.returncode == 0, done.stderr
    (plan,) = map(OmegaConf.load, (tmp_path / "out").rglob("plan.json"))
    assert plan.strategy == "highest"
    assert plan.selector == "all"
    assert plan.removed == [min(range(plan.n_layers), key=plan.importance.__getitem__)]
    assert max(plan.importance) < 0
