"""The methods that ship with svl, as their configuration files describe them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from svl.config import CONF
from svl.config_methods import build_method

GROUPS = ("strategy", "selector", "compensation")
CHOICES = {group: [file.stem for file in sorted(Path(CONF, group).glob("*.yaml"))] for group in GROUPS}
# Settings where the defaults do nothing on four layers.
OPTIONS = (
    {"manual": {"layers": [1, 3]}}
    | {name: {"of": {"_target_": "svl.strategies.cosine.Cosine"}} for name in ("iterative", "prune_and_comp")}
    | {f"shortened_{score}": {"protected": [0]} for score in ("ppl", "taylor", "magnitude")}
)


def distinct(group: str) -> list[str]:
    """The choices of a group, without those that are another one's class with the same settings."""
    found = {choice: method(group, choice) for choice in CHOICES[group]}
    return [a for i, a in enumerate(found) if found[a] not in list(found.values())[:i]]


def method(group: str, choice: str) -> Any:
    """What a configuration file describes, with seed 0."""
    node = OmegaConf.load(Path(CONF, group, f"{choice}.yaml"))
    node.pop("defaults", None)
    node.update(OPTIONS.get(choice, {}))
    return build_method(OmegaConf.create({"seed": 0, "strategy": {}, group: node})[group], group)
