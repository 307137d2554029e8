"""Configuration: every file composes, every target binds, mistakes are named, a recipe's parts can be swapped."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import hydra
import pytest
from helpers.paths import ROOT
from omegaconf import DictConfig, OmegaConf

from svl import config, config_methods
from svl.checkpoints import export
from svl.compensation.magnitude import Magnitude
from svl.compensation.none import NoCompensation
from svl.compensation.subspace import Subspace
from svl.core import Plan, Stats, Strategy, SvlError
from svl.run import hydra_internals
from svl.selectors.last import Last
from svl.selectors.random import Random
from svl.selectors.text import Text
from svl.selectors.tis import Tis
from svl.strategies.cosine import Cosine
from svl.strategies.iterative import Iterative
from svl.strategies.layer_pairs import LayerPairs
from svl.strategies.sleb import Sleb

config.register_with_hydra()

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
    assert not [p for p in config.CONF.rglob("*") if p.is_file() and p.suffix != ".yaml"]  # .yml would not be found
    assert [p.name for p in config.CONF.glob("*.yaml")] == ["config.yaml"]


def rows_of_choices() -> Iterator[dict[str, str]]:
    """A choice of many groups at once, each in one of the rows; experiments alone, and apart from strategies what these
    bring themselves."""
    brought = {"selector", "compensation"}
    for groups in (brought, {"experiment"}, {group for group, _ in CHOICES} - brought - {"experiment"}):
        columns = ([choice for choice in CHOICES if choice[0] == group] for group in sorted(groups))
        for row in itertools.zip_longest(*columns):
            yield dict(choice for choice in row if choice)


@pytest.mark.parametrize("row", rows_of_choices(), ids=lambda row: "-".join(row.values()))
def test_every_choice_composes_and_binds(row):
    cfg = compose(*(f"{group}={choice}" for group, choice in row.items()))
    for method in config_methods.METHODS:  # a strategy brings others
        assert cfg[method]["_target_"].startswith("svl.")
        built = config_methods.build_method(cfg[method], method)
        assert built.does_nothing == (row.get(method) == "none") or method not in row
    to_be_given = {f"{group}.path" for group, choice in row.items() if choice == "local"}
    assert OmegaConf.missing_keys(cfg) == to_be_given


@cache
def experiment(name: str) -> DictConfig:
    """An experiment with its `hydra` part, to be read."""
    return compose(f"experiment={name}", with_hydra=True)


def sweep(name: str) -> dict[str, str]:
    """What an experiment sweeps over."""
    return dict(experiment(name).hydra.sweeper.get("params") or {})


def swept_values(key: str, values: str) -> list[str]:
    """The overrides that a sweep of a key makes; of an interval, its ends."""
    (override,) = hydra_internals.parse_overrides([f"{key}={values}"])
    if override.is_interval_sweep():
        return [f"{key}={end}" for end in (override.value().start, override.value().end)]
    return [word for (word,) in hydra_internals.expand_sweep([f"{key}={values}"])]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_and_every_value_it_sweeps_over_is_valid(name):
    cfg = experiment(name)
    assert cfg.name != "run"  # or its runs would end up in the report of single runs
    assert cfg.hydra.mode is None  # run with -m; Hydra 1.4 refuses a mode in a file
    swept = {key: swept_values(key, values) for key, values in sweep(name).items()}
    alike = sweep(name.removesuffix("_demo")) if name in TWINS else {}  # whose values are valid there
    jobs = max((len(words) for key, words in swept.items() if sweep(name)[key] != alike.get(key)), default=1)
    for job in range(jobs):  # every value in one of them
        config.validate_config(compose(f"experiment={name}", *(words[job % len(words)] for words in swept.values())))


PAGES = {page.parent.name: page.read_text() for page in (ROOT / "experiments").glob("*/README.md")}
TWINS = [name for name in EXPERIMENTS if name.endswith("_demo")]


def test_every_experiment_has_a_page_and_every_page_speaks_of_experiments_there_are():
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
        swept = (experiment(name).hydra.sweeper.get("params") or {}).get("model")
        variants = [compose(f"experiment={name}", f"model={n}") for n in swept.split(",")] if swept else []
        return {str(cfg.model.path) for cfg in variants or [experiment(name)]}

    for twin in TWINS:
        assert twin.removesuffix("_demo") in EXPERIMENTS
        assert all(path.startswith(("svl:", str(config.PACKAGE))) for path in models(twin)), twin
    for name in set(EXPERIMENTS) - set(TWINS):
        bundled = all(path.startswith(("svl:", str(config.PACKAGE))) for path in models(name))
        assert bundled or f"{name}_demo" in TWINS, name


def test_defaults_are_valid():
    cfg = compose()
    parts = config.validate_config(cfg)
    assert set(parts) == set(config_methods.METHODS)
    assert cfg.ratio == 0.25


# -------------------------------------------------------------------------------------------------- recipes


def test_strategy_brings_its_papers_selector_and_compensation():
    parts = config.validate_config(compose("strategy=short_lvlm"))
    assert isinstance(parts["selector"], Tis)
    assert isinstance(parts["compensation"], Subspace)
    for strategy in ("shortgpt", "tail", "random"):
        assert isinstance(config.validate_config(compose(f"strategy={strategy}"))["compensation"], NoCompensation)


def test_a_strategy_around_another_has_its_settings_and_brings_its_choices():
    words = ["strategy=iterative", "strategy@strategy.of=sleb", "strategy.of.samples=3"]
    assert config.validate_config(compose(*words))["strategy"] == Iterative(Sleb(samples=3))
    paper = config.validate_config(compose("strategy=iterative", "strategy@strategy.of=short_lvlm"))
    assert isinstance(paper["selector"], Tis)
    assert isinstance(paper["compensation"], Subspace)
    parts = config.validate_config(compose("strategy=prune_and_comp"))
    assert (parts["strategy"], parts["compensation"]) == (Iterative(Cosine()), Magnitude())
    assert config.validate_config(compose("strategy=come"))["strategy"] == Iterative(LayerPairs())
    for words in (
        ["strategy@strategy.of=sleb", "compensation=refit"],
        ["compensation=refit"],
        ["compensation=ghosted"],
    ):
        config.validate_config(compose("strategy=iterative", *words))


# Those that judge every layer by itself; of all others a set, a block, merges or parts of layers would be lost.
STEPWISE = "depth_shapley, layer_pairs, llm_drop, random, short_lvlm, short_lvlm_paper, shortened_magnitude, "
STEPWISE += "shortened_ppl, shortened_taylor, shortgpt, sleb, tail"


@pytest.mark.parametrize("choice", [name for group, name in CHOICES if group == "strategy"])
def test_what_is_asked_for_one_layer_after_another_can_be_asked_so(choice):
    words = ["strategy=iterative", f"strategy@strategy.of={choice}"]
    if choice in STEPWISE.split(", "):
        assert "rescoring" in config.validate_config(compose(*words))["strategy"].needs
        return
    with pytest.raises(
        SvlError, match=r"^strategy\.of is \w+, which cannot be asked for one layer after another"
    ) as caught:
        config.validate_config(compose(*words))
    assert str(caught.value).endswith(f"; choose one of: {STEPWISE}")


@pytest.mark.parametrize("order", [1, -1])
def test_command_line_wins_over_the_strategys_choice(order):
    overrides = ["strategy=short_lvlm", "selector=text", "compensation=none"]
    parts = config.validate_config(compose(*overrides[::order]))
    assert isinstance(parts["selector"], Text)
    assert isinstance(parts["compensation"], NoCompensation)


def test_experiment_wins_over_the_strategys_choice_and_the_command_line_over_both(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /strategy: short_lvlm\n  - override /selector: last\nname: mine\n"
    )
    mine = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"]
    parts = config.validate_config(compose(*mine))
    assert isinstance(parts["selector"], Last)
    assert isinstance(parts["compensation"], Subspace)  # not overridden, so the paper's
    assert isinstance(config.validate_config(compose(*mine, "strategy=short_lvlm"))["selector"], Last)
    assert isinstance(config.validate_config(compose(*mine, "selector=text"))["selector"], Text)


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
    parts = config.validate_config(compose("strategy=random", "selector=random", "seed=7"))
    assert parts["strategy"].seed == parts["selector"].seed == 7
    assert isinstance(parts["selector"], Random)
    for seed in ("seed", "calibration.seed"):
        with pytest.raises(SvlError, match=rf"^{seed} is 4294967296, but must be at most 4294967295"):
            config.validate_config(compose(f"{seed}=4294967296"))


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
        (["benchmark.limit=inf"], ["benchmark.limit is inf", "finite number"]),
        (["benchmark.limit=nan"], ["benchmark.limit is nan", "finite number"]),
        (["benchmark.tasks.svl_demo_open.scale=inf"], ["svl_demo_open.scale is inf", "finite number"]),
        (["evaluator.options={gpu_memory_utilization: nan}"], ["gpu_memory_utilization is nan", "finite number"]),
        (["model.image_processor={size: [inf]}"], ["model.image_processor.size[0] is inf", "finite number"]),
        (["benchmark.batch_size=-3"], ["benchmark.batch_size is -3"]),
        (
            ["compensation=ghosted", "export.path=new"],
            ["export.path asks for", "ghosted", "stock checkpoint", "linear,"],
        ),
        (["strategy=iterative", "strategy.of=sleb"], ["strategy.of is 'sleb'", "strategy@strategy.of=NAME"]),
        (["strategy=iterative", "strategy.of.p=1"], ["strategy.of has no setting 'p'"]),
        (["strategy=iterative", "strategy@strategy.of=iterative"], ["strategy.of is Iterative, which cannot be asked"]),
        (
            ["strategy=iterative", "strategy@strategy.of=sleb", "compensation=ghosted"],
            ["removals cannot be tried out on a model with maps", "linear_replaceme"],
        ),
        (
            ["strategy=iterative", "strategy@strategy.of=depth_shapley", "compensation=linearpatch"],
            ["removals cannot be tried out on a model with maps", "reads statistics"],
        ),
        (["model=local"], ["model.path is not set"]),
        (["calibration=local"], ["calibration.path is not set"]),
        (["selector.pp=0.5"], ["selector has no setting 'pp'", "did you mean 'p'?", "rule", "pool"]),
        (["compensation.rnk=1"], ["compensation has no setting 'rnk'", "did you mean 'rank'?", "gain"]),
        (["strategy=tail", "strategy.seed=1"], ["strategy has no setting 'seed'", "it has: none"]),
        (["selector.p=many"], ["selector", "'many'", "Float", "setting 'p'"]),
        (["compensation.targets=[1]", "compensation.rank=4.5"], ["compensation", "Integer", "setting 'rank'"]),
        (["selector.visible=perhaps"], ["selector", "setting 'visible'"]),
        (["selector.p=0"], ["selector.p is 0", "above 0 and at most 1"]),
        (["selector.rule=nuclues"], ["selector.rule is 'nuclues'", "fraction, nucleus", "did you mean 'nucleus'?"]),
        (["compensation.targets=[mpl]"], ["compensation.targets is 'mpl'", "did you mean 'mlp'?"]),
        (["tracker=wandb", "tracker.mode=of"], ["tracker.mode is 'of'", "offline, online, disabled"]),
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
        config.validate_config(compose(*overrides))
    message = str(caught.value)
    assert [part for part in says if part not in message] == [], message
    assert "\n" not in message


def test_export_folder_must_be_new(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    for path in (tmp_path, f"~/{tmp_path.name}"):
        with pytest.raises(SvlError, match=r"export\.path .* exists already"):
            export.check_export_path(path)
    export.check_export_path("~/new")


def test_benchmarks_without_lmms_eval_say_what_to_install(monkeypatch):
    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SvlError, match=r"pip install 'svl\[eval\]'"):
        config.validate_config(compose())
    config.validate_config(compose("benchmark=none"))


# -------------------------------------------------------------------------------------------------- plugins


@dataclass(frozen=True)
class Method(Strategy):
    """All kinds of fields that a method may have."""

    number: int
    layers: tuple[int, ...]
    rate: float = 1.0
    names: tuple[str, ...] = ("a", "b")
    weights: dict[str, float] = field(default_factory=lambda: {"x": 1.0})
    limit: float | None = None

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        return Plan(stats.n_layers, ())


METHOD = f"{__name__}.Method"


def test_targets_outside_svl_need_permission(monkeypatch):
    for plugins in ("", "other", __name__[:-1]):
        monkeypatch.setenv("SVL_PLUGINS", plugins)
        with pytest.raises(SvlError, match=rf"'{METHOD}' is outside svl.*SVL_PLUGINS"):
            config_methods.build_method(node(METHOD, number=1, layers=[]), "strategy")
    monkeypatch.setenv("SVL_PLUGINS", f"other,{__name__}")
    assert config_methods.build_method(node(METHOD, number=1, layers=[2]), "strategy") == Method(1, (2,))


def test_values_are_checked_against_the_dataclass(monkeypatch):
    monkeypatch.setenv("SVL_PLUGINS", __name__)
    given = {"number": 1, "layers": [3, 4], "rate": 2, "names": [], "weights": {"y": 2}, "limit": 1}
    assert config_methods.build_method(node(METHOD, **given), "strategy") == Method(
        1, (3, 4), 2.0, (), {"x": 1.0, "y": 2.0}, 1.0
    )
    for wrong, key in (({}, "number"), ({"number": 1}, "layers"), ({"number": 1, "layers": ["x"]}, "layers[0]")):
        with pytest.raises(SvlError, match=r"^strategy: ") as caught:
            config_methods.build_method(node(METHOD, **wrong), "strategy")
        assert f"setting '{key}'" in str(caught.value)


@dataclass(frozen=True)
class Stranger:
    """No strategy."""


@dataclass(frozen=True)
class Unfinished(Strategy):
    """Without `plan`."""


@dataclass(frozen=True)
class Greedy(Method):
    """Asks for what there is not."""

    needs: ClassVar[frozenset[str]] = frozenset({"cosine", "everything"})


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        ("Stranger", "does not derive from svl.core.methods.Strategy"),
        ("Unfinished", "does not implement plan"),
        (
            "Greedy",
            "needs everything, but a strategy may only need: "
            "attention, cosine, gradients, probe, rescoring, sublayers, weights, windows",
        ),
    ],
)
def test_what_is_no_method_is_refused_when_it_is_built(cls, reason, monkeypatch):
    monkeypatch.setenv("SVL_PLUGINS", __name__)
    with pytest.raises(SvlError) as caught:
        config_methods.build_method(node(f"{__name__}.{cls}"), "strategy")
    assert str(caught.value) == f"strategy._target_ '{__name__}.{cls}' {reason}"


def test_fields_that_the_yaml_does_not_list_need_no_plus():
    assert "timeout" not in compose("tracker=none").tracker
    assert config_methods.build_method(compose("tracker=none", "tracker.timeout=5").tracker, "tracker").timeout == 5.0


def test_ratios_are_rounded_where_they_are_read():
    assert config.round_ratio(compose("ratio=0.30000000000000004")).ratio == 0.3
    assert config.round_ratio(compose("ratio=0.33333333")).ratio == 0.333333


# ------------------------------------------------------------------------------------------- settings of any name


def test_mappings_are_given_whole_or_one_by_one():
    whole = compose("model.image_processor={size: {shortest_edge: 4}, do_pad: true}")
    single = compose("model.image_processor.size.shortest_edge=4", "model.image_processor.do_pad=true")
    assert whole.model.image_processor == single.model.image_processor == {"size": {"shortest_edge": 4}, "do_pad": True}
    added = compose("model=qwen2_vl_7b", "model.image_processor={size: {longest_edge: 8}}").model.image_processor
    assert added == {"size": {"shortest_edge": 3136, "longest_edge": 8}}
    assert compose("model.image_processor={do_pad: true}").model.image_processor == {"do_pad": True}
    assert compose("calibration.image_table={name: a, column: b}").calibration.image_table == {
        "name": "a",
        "column": "b",
    }
    assert compose("evaluator.options={a: {b: 1}}").evaluator.options == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.image_processor=7", r"model\.image_processor is '7', but must be a mapping"),
        ("model.image_processor=null", r"model\.image_processor is 'None', but must be a mapping"),
        ("evaluator.options=x", r"evaluator\.options is 'x', but must be a mapping"),
        ("calibration.image_table={nam: x}", r"a name in calibration\.image_table is 'nam'.*did you mean 'name'"),
    ],
)
def test_mappings_that_are_none_are_named(override, said):
    with pytest.raises(SvlError, match=said):
        config.validate_config(compose(override))


def test_a_method_may_hold_others_by_name():
    words = ("tracker=several", "tracker.of.wandb.mode=online", "+tracker@tracker.of.mlflow=mlflow")
    built = config_methods.build_method(compose(*words).tracker, "tracker")
    assert {name: type(tracker).__name__ for name, tracker in built.of.items()} == {
        "wandb": "Wandb",
        "tensorboard": "TensorBoard",
        "mlflow": "Mlflow",
    }
    assert built.of["wandb"].mode == "online"
    with pytest.raises(SvlError, match=r"tracker.of is 3, but must be a mapping of names to settings of a tracker"):
        config_methods.build_method(compose("tracker=several", "tracker.of=3").tracker, "tracker")
    with pytest.raises(SvlError, match=r"quantization\.options is 8, but must be a mapping: set "):
        config_methods.build_method(compose("quantization=int8", "quantization.options=8").quantization, "quantization")
    with pytest.raises(SvlError, match=r"tracker.of.wandb has no setting 'mood'"):
        config_methods.build_method(compose("tracker=several", "+tracker.of.wandb.mood=bad").tracker, "tracker")
