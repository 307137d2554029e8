"""`svl list` and `svl explain`: against what the methods are when they are imported."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
from helpers.commands import run_command
from omegaconf import OmegaConf

import svl.cli
from svl import config, config_methods
from svl.catalog import choices, pages, sources
from svl.catalog.choices import Choice

ALL = [choice for group in pages.ordered_groups() for choice in choices.choices(group.name)]
METHODS = [choice for choice in ALL if choice.group in config_methods.METHODS]


def shown(*words: str, cwd: Path, code: int = 0, **environment: str) -> str:
    done = run_command(svl.cli.main, *words, cwd=cwd, code=code, COLUMNS="120", **environment)
    return done.stdout + done.stderr


def test_every_group_of_the_configuration_is_listed():
    known = {f.name for f in dataclasses.fields(config.Svl)} - {"export"}
    names = {group.name for group in choices.groups()}
    assert names <= known | {"experiment"}
    assert known - names == {field.name for field in choices.root_settings()}
    assert all(group.says for group in choices.groups())


@pytest.mark.parametrize("choice", ALL, ids=lambda choice: f"{choice.group}={choice.name}")
def test_every_choice_says_what_it_is(choice: Choice):
    assert choice.summary
    assert "\n" not in choice.summary
    assert len(choice.summary) < 160
    assert not re.match("see |svl ", choice.summary)  # but for those who know already
    assert pages.choice_page(choice)


@pytest.mark.parametrize("choice", METHODS, ids=lambda choice: f"{choice.group}={choice.name}")
def test_settings_are_those_of_the_class(choice: Choice):
    module, _, name = choice.target.rpartition(".")
    fields = [f for f in dataclasses.fields(getattr(importlib.import_module(module), name)) if f.init]
    told = {setting.name: setting for setting in choice.settings()}
    assert list(told) == [f.name for f in fields]
    given = OmegaConf.to_container(OmegaConf.load(choice.file), resolve=False)
    for f in fields:
        setting = told[f.name]
        assert re.match(r"\w|\(|\[", setting.comment), f.name  # no bracket over several lines
        expected = given.get(f.name, f.default)
        if f.name in choice.inner or expected is dataclasses.MISSING:
            continue
        value = OmegaConf.create(f"x: {setting.default}").get("x") if "${" not in setting.default else setting.default
        expected = list(expected) if isinstance(expected, tuple) else expected
        assert (OmegaConf.to_container(value) if OmegaConf.is_config(value) else value) == expected


@pytest.mark.parametrize("choice", METHODS, ids=lambda choice: f"{choice.group}={choice.name}")
def test_strategies_and_compensations_say_what_they_cost(choice: Choice):
    if choice.group in ("strategy", "compensation"):
        assert choice.cost


def test_papers_are_those_of_the_header():
    strategy = {choice.name: choice.papers for choice in choices.choices("strategy")}
    assert strategy["shortgpt"] == ["https://arxiv.org/abs/2403.03853"]
    assert strategy["prune_and_comp"] == ["https://arxiv.org/abs/2507.18212"]
    assert strategy["runs"] == []


def test_a_list_names_sources(tmp_path):
    pytest.importorskip("lmms_eval")
    assert "[lmms-lab-encoder/POPE]" in shown("list", "benchmarks", cwd=tmp_path)
    models = shown("list", "models", "calibrations", cwd=tmp_path)
    assert "[llava-hf/llava-1.5-7b-hf]" in models
    assert "[Salesforce/wikitext]" in models
    assert len(shown("list", cwd=tmp_path).splitlines()) < 20


def test_an_explanation(tmp_path):
    text = shown("explain", "strategy=laco", cwd=tmp_path)
    assert "The walk starts `size` layers below the `highest`." in text
    assert re.search(r"^  size: int = 3 +layers that become one$", text, re.MULTILINE)
    assert "Brings    compensation=merge" in text
    assert "one forward pass over `samples` per merge tried" in text
    assert text.count("Cost ") == 1
    assert "model.dtype (str; default auto)" in shown("explain", "model.dtype", cwd=tmp_path)
    assert "ratio (float; default 0.25)" in shown("explain", "ratio", cwd=tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["explain", "strategy=lacoo"], "no strategy 'lacoo' (did you mean 'laco'?)"),
        (["explain", "strategi"], "no group 'strategi' (did you mean 'strategy'?)"),
        (["explain", "model.dtyp"], "model has no setting 'dtyp' (did you mean 'dtype'?)"),
        (["explain", "strategy.size"], "svl explain strategy=NAME"),
        (["explain"], "svl explain what?"),
        (["list", "modells"], "no group 'modells' (did you mean 'model'?)"),
    ],
)
def test_mistakes_are_one_line(words, says, tmp_path):
    (line,) = shown(*words, cwd=tmp_path, code=1).splitlines()
    assert line.startswith("error: ")
    assert says in line


PLUGIN = '''"""Every other layer (of nobody, arXiv 2401.00001).

Cost: nothing at all.
"""
import absent_library
from dataclasses import dataclass
from svl.strategies.angular import Angular


@dataclass(frozen=True)
class Other(Angular):
    """Remove them.

    Attributes:
        start: the first one.
    """

    start: int = 1
'''


def test_plugins_are_read_without_being_imported(tmp_path):
    """Neither does its library have to be there."""
    (tmp_path / "mine" / "conf" / "strategy").mkdir(parents=True)
    (tmp_path / "mine" / "other.py").write_text(PLUGIN)
    (tmp_path / "mine" / "conf" / "strategy" / "other.yaml").write_text("_target_: mine.other.Other\n")
    (tmp_path / "more" / "strategy").mkdir(parents=True)
    (tmp_path / "more" / "strategy" / "third.yaml").write_text("# A third.\n_target_: mine.other.Other\nstart: 7\n")
    given = {"cwd": tmp_path, "SVL_PLUGINS": "./mine"}
    assert re.search(r"^  other +Every other layer \(of nobody, arXiv", shown("list", "strategy", **given), re.M)
    text = shown("explain", "strategy=other", **given)
    assert "Paper     https://arxiv.org/abs/2401.00001" in text
    assert "Cost      nothing at all." in text
    assert re.search(r"^  start: int = 1 +the first one$", text, re.MULTILINE)
    assert "  first: int = 1 " in text  # of the class that it derives from
    third = shown("explain", "strategy=third", "--config-dir", "more", **given)
    assert re.search(r"^  start: int = 7 +the first one$", third, re.MULTILINE)


def test_comments_are_read_but_not_what_is_in_quotes():
    text = "a: 1  # one\nb: 'x # y'\nc: {d: 2}  # two # three\ne:\n  f: 1  # inner\n# above\ng: 3\n"
    assert choices.yaml_comments(text) == {"a": "one", "c": "two # three", "e": "inner"}


def test_comments_above_a_setting_are_read_from_their_first_line():
    (generated,) = (field for field in choices.group_settings("calibration") if field.name == "generated")
    assert generated.comment == (
        "texts that the dense model writes itself, which compensations are fitted to beside the samples; "
        "null: as many as the compensation asks for"
    )


def test_costs_are_found_wherever_they_stand():
    assert sources.cost_of("Title.\n\nCost: one\npass.\n") == "one pass."
    assert sources.cost_of("Title.\n\nRefused here. Cost: two passes.") == "two passes."
    assert sources.cost_of("What it costs.\n\nCosts vary.") == ""
