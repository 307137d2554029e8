"""A method has the same defaults in Python and in YAML."""

from __future__ import annotations

import dataclasses
import importlib
from collections import Counter

import pytest
import yaml
from helpers.paths import ROOT

GROUPS = ("strategy", "selector", "compensation", "quantization", "visual_tokens", "tracker")
FILES = {file: yaml.safe_load(file.read_text()) for group in GROUPS for file in (ROOT / "conf" / group).glob("*.yaml")}
TARGETS = Counter(content["_target_"] for content in FILES.values())


def is_variant(file) -> bool:
    """Whether a file sets a class that another file is named after to other values."""
    module = FILES[file]["_target_"].split(".")[-2]
    return TARGETS[FILES[file]["_target_"]] > 1 and file.stem != module


def settings(file) -> dict:
    """The settings that a file lists, but for those taken from elsewhere in the configuration."""
    return {
        key: value
        for key, value in FILES[file].items()
        if key not in ("_target_", "defaults") and "${" not in str(value)
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_yaml_and_python_agree(file):
    module, _, name = FILES[file]["_target_"].rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    assert set(settings(file)) <= set(fields)
    if is_variant(file):
        return
    built = cls()
    for key, value in settings(file).items():
        default = getattr(built, key)
        assert (list(default) if isinstance(default, tuple) else default) == value, key


def test_every_class_has_a_file_that_is_no_variant():
    of_their_own = {content["_target_"] for file, content in FILES.items() if not is_variant(file)}
    shared = {"svl.strategies.cosine.Cosine"}  # of three papers, none of which named it so
    assert set(TARGETS) - of_their_own == shared
