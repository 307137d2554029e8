"""Every file in conf/model is of a family that can be pruned, and none is left untested."""

from __future__ import annotations

import pytest
from helpers.families import FAMILIES
from hydra import compose, initialize_config_dir

from svl import config
from svl.models.anatomy import find_anatomy
from svl.models.prompts import STYLES

FAMILY = {  # of conf/model: a tiny model of it in tests/helpers/families.py
    "llava_15_7b": "llava",
    "llava_15_13b": "llava",
    "llava_next_7b": "llava_next",
    "llava_onevision_7b": "llava_onevision",
    "qwen2_vl_7b": "qwen2_vl",
    "qwen2_5_vl_7b": "qwen2_5_vl",
    "qwen3_vl_8b": "qwen3_vl",
    "internvl3_8b": "internvl",
    "smolvlm2_2b": "smolvlm",
    "gemma3_4b": "gemma3",
    "paligemma2_3b": "paligemma2",
    "mplug_owl2": "mplug_owl2",
}


@pytest.mark.parametrize("name", FAMILY)
def test_every_model_file_is_of_a_family_that_can_be_pruned(name):
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("config", overrides=[f"model={name}", "benchmark=paper6", "benchmark.data=x"])
    config.validate_config(cfg)
    assert cfg.model.path.count("/") == 1
    assert cfg.model.prompt in STYLES
    family = FAMILIES[FAMILY[name]]()
    anatomy = find_anatomy(family.model)
    assert anatomy.removable
    kind = family.model.config.model_type.replace("_", "")
    assert kind.rstrip("3") in cfg.model.path.lower().replace("-", "").replace(".", "").replace("v16", "next")


def test_every_model_file_is_covered():
    own = {
        "demo_lvlm",
        "local",
        "smollm2_135m",
        "smol_lvlm",
        "qwen_vl_chat",
    }  # the last one: tests/models/ports/test_qwen_vl.py
    assert {file.stem for file in (config.CONF / "model").glob("*.yaml")} == {*FAMILY, *own}
