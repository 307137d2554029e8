"""The history of a checkpoint that is pruned more than once, in its config and its card."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers.exports import set_config
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from svl.checkpoints import export
from svl.checkpoints.export import ExportRecord
from svl.checkpoints.pruning_record import original_layers, pruning_record
from svl.core import Patch, Plan, Update
from svl.models.weight_files import WEIGHTS


def test_a_first_pruning_has_no_history():
    plan = Plan(6, (1, 4), provenance={"strategy": "tail"})
    patch = Patch({(2, "mlp"): Update(), (0, "attn"): Update()}, {3: {3: 1.0}})
    assert pruning_record(plan, patch, "abc", "owner/name") == {
        "n_layers": 6, "removed": [1, 4], "kept": [0, 2, 3, 5], "importance": [], "strategy": "tail",
        "compensated": ["0.attn", "2.mlp", "3.*"], "key": "abc", "base_model": "owner/name",
    }  # fmt: skip
    assert "base_model" not in pruning_record(plan, None, None, None)


@pytest.mark.parametrize(
    ("origin", "name"),
    [
        ({"source": "owner/name", "fingerprint": "12ab", "base_model": "owner/name"}, "owner/name"),
        ({"source": "folder/name", "fingerprint": "12ab"}, None),  # a folder, however it is called
        ({"base_model": "a/b\n<img>"}, None),
        ({"base_model": 3}, None),
        ("owner/name", None),
        (None, None),
    ],
)
def test_what_was_converted_is_named_where_it_has_a_name(origin, name, checkpoint, tmp_path):
    source = shutil.copytree(checkpoint("llama"), tmp_path / "source")
    set_config(source, converted_from=origin)
    out = export.save(source, Plan(4, (1,)), tmp_path / "out")
    assert ModelCard.load(out / "README.md").data.base_model == name
    assert json.loads((out / "config.json").read_text())["layer_pruning"].get("base_model") == name


def test_steps_are_composed_to_numbers_of_the_first_model():
    first = pruning_record(Plan(8, (1, 4, 5)), None, None, "owner/name")
    second = pruning_record(Plan(5, (0, 3)), None, "abc", None, first)
    assert second["history"] == [first]
    assert second["original"] == {"n_layers": 8, "removed": [0, 1, 4, 5, 6]}  # 0 2 3 6 7 -> 2 3 7
    assert second["base_model"] == "owner/name"
    third = pruning_record(Plan(3, (1,)), None, None, None, second)
    assert [step["removed"] for step in third["history"]] == [[1, 4, 5], [0, 3]]
    assert all("history" not in step and "original" not in step for step in third["history"])
    assert third["original"] == {"n_layers": 8, "removed": [0, 1, 3, 4, 5, 6]}


@given(st.data())
def test_any_steps_leave_the_layers_that_pruning_a_list_leaves(data):
    layers = list(range(data.draw(st.integers(2, 12))))
    total, record = len(layers), None
    for _ in range(data.draw(st.integers(1, 4))):
        removed = data.draw(st.sets(st.integers(0, len(layers) - 1), max_size=len(layers) - 1))
        record = pruning_record(Plan(len(layers), tuple(removed)), None, None, None, record)
        layers = [layer for i, layer in enumerate(layers) if i not in removed]
        assert original_layers(record) == (total, sorted(set(range(total)) - set(layers)))


@pytest.mark.parametrize(
    "before",
    [
        3, "text", [], {}, {"n_layers": 8}, {"n_layers": 8, "removed": 3}, {"n_layers": 8, "removed": [9]},
        {"n_layers": 8, "removed": [1]}, {"n_layers": "8", "removed": [1, 2, 3]}, {"n_layers": 8, "removed": ["1"]},
        {"n_layers": 8, "removed": [1, 2, 3], "history": [{"n_layers": 9, "removed": []}]},
        {"n_layers": 8, "removed": [1, 2, 3], "history": 3}, {"n_layers": 8, "removed": [1, 2, 3], "history": [[]]},
    ],
)  # fmt: skip
def test_records_that_do_not_fit_are_left_out_with_a_warning(before, caplog):
    record = pruning_record(Plan(5, (1,)), None, None, None, before)
    assert record == pruning_record(Plan(5, (1,)), None, None, None)
    assert "record of an earlier pruning is left out" in caplog.text


def test_pruning_twice_is_pruning_once_and_tells_of_both(checkpoint, tmp_path):
    source, patch = checkpoint("llama"), Patch({(2, "mlp"): Update(torch.ones(32, 1), torch.ones(1, 32))})
    first = Plan(4, (1,), provenance={"strategy": "first_method"})
    run = ExportRecord(key="abc")
    once = export.save(source, first, tmp_path / "once", patch, record=run)
    again = export.save(once, replace(first, n_layers=3, removed=(0,)), tmp_path / "again")
    directly = export.save(source, Plan(4, (0, 1)), tmp_path / "directly", patch)
    ours, expected = load_file(again / WEIGHTS), load_file(directly / WEIGHTS)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    configs = [json.loads((folder / "config.json").read_text())["layer_pruning"] for folder in (once, again)]
    assert configs[1]["history"] == [configs[0]]
    assert configs[1]["original"] == {"n_layers": 4, "removed": [0, 1]}
    assert configs[1]["key"] is None  # that of the first run is in the history
    card = (again / "README.md").read_text()
    assert "| 1 | 4 | [1] | 2.mlp | first_method |".replace("_", "\\_").replace("[1]", "\\[1\\]") in card
    assert "Together these are layers [0, 1] of the 4." in card
    assert "## History" not in (once / "README.md").read_text()


def test_a_strange_record_does_not_keep_from_exporting(family, tmp_path):
    source = family("llama")
    set_config(source, layer_pruning={"removed": "all"})
    out = export.save(source, Plan(6, (1,)), tmp_path / "out")
    assert "history" not in json.loads((out / "config.json").read_text())["layer_pruning"]
