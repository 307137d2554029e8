"""Two runs side by side, with paired differences worked out by hand."""

import json
import math
import re
import statistics
from pathlib import Path

import pytest
from helpers.results import answers, result, scored, table_cells

from svl.report import main, paired_tests


def test_compare(store, capsys, tmp_path):
    scored(store)
    first, second, _ = store.entries("run")
    assert main(["--compare", first.key[:9], second.key, "out=page.md"]) == 0
    text = capsys.readouterr().out
    assert Path("page.md").read_text() == text.removesuffix("\n")
    rows = {cells[0]: cells[1:] for cells in map(table_cells, text.splitlines()) if len(cells) > 1}
    assert rows["strategy"] == [r"short\_lvlm", "tail"]
    assert "selector" not in rows  # the same in both
    assert "only A: none; only B: 5; both: 6, 7." in text
    assert "A  ......##\nB  .....###" in text
    # right: A on 4 to 17, B on 0 to 5; only A: 6 to 17, only B: 0 to 3
    difference = statistics.stdev([-1.0] * 4 + [0.0] * 2 + [1.0] * 12 + [0.0] * 2) / 20**0.5
    assert rows["t"][:3] == ["70.0", "30.0", f"+40.0 ± {100 * difference:.1f}"]
    p = 2 * sum(math.comb(16, k) for k in range(5)) / 2**16
    assert rows["t"][-3:] == ["12", "4", f"{p:.2g}"]
    assert len(re.findall(r"^\| +\d+ \| Is ", text, re.MULTILINE)) == 16
    assert "#### Right only in B" in text

    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(first.output))
    assert main(["compare", str(folder), second.key]) == 0
    assert capsys.readouterr().out == text


def test_parts_of_layers_are_told_from_layers(store, capsys):
    """Of runs that remove attentions and MLPs; a layer that lost either is none that is gone."""
    whole, parts = result("tail"), result("block_pruner", n_remove=0)
    parts["plan"] = {**parts["plan"], "removed": [7], "removed_attn": [2, 4], "removed_mlp": [3]}
    store.add(whole, parts)
    assert main(["compare", *(entry.key for entry in store.entries("run"))]) == 0
    text = capsys.readouterr().out
    assert "A  ......##\nB  ..ama..#" in text
    assert "Removed (#; a: without attention, m: without MLP) by only A: 6; " in text
    assert "only B: 2.attn, 3.mlp, 4.attn; both: 7." in text


def test_what_training_took_is_compared(store, capsys):
    device = {"type": "cuda", "name": "H100", "processes": 2}
    budget = {"steps": 7, "samples": 12, "tokens": 340, "seconds": 5.25, "device": device, "shared_pictures": None}
    store.add(result("tail"), result("tail", seed=1))
    assert main(["compare", *(entry.key for entry in store.entries("run"))]) == 0
    assert "Training" not in capsys.readouterr().out
    store.add(result("sleb", recovery="lora", training=budget))
    first, *_, last = store.entries("run")
    assert main(["compare", first.key, last.key]) == 0
    rows = {cells[0]: cells[1:] for cells in map(table_cells, capsys.readouterr().out.splitlines()) if len(cells) > 1}
    expected = {"steps": ["0", "7"], "samples": ["0", "12"], "tokens": ["0", "340"], "seconds": ["0", "5.25"]}
    assert {name: rows[name] for name in expected} == expected
    assert rows["device"] == ["–", "cuda H100, 2 processes"]


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"max_new_tokens": 2}, "caps of an answer's length differ"),
        ({"frames": 4}, "numbers of frames differ"),
        ({"style": "qwen_vl"}, "prompt styles differ"),
        ({"evaluator": {"name": "vllm"}}, "what answers the questions differs"),
    ],
)
def test_answers_to_questions_asked_in_another_way_are_not_paired(store, capsys, setting, reason):
    """Neither on the page of two runs nor in the tests of a table."""
    keys = [answers(store, range(5)), answers(store, range(9), **setting)]
    scores = {"t": {"metric": "accuracy", "n": 20, "metrics": {"accuracy": {"value": 0.2, "stderr": 0, "dense": 1.0}}}}
    store.add(*(result(scores=scores, keys={"evaluate": [key], "dense": []}) for key in keys))
    first, second = (entry.key for entry in store.entries("run"))
    assert main(["compare", first, second]) == 0
    assert f"cannot be compared question by question: {reason}" in capsys.readouterr().out
    entries = [store.read(store.root / "score" / key) for key in keys]
    assert paired_tests.paired_changes(entries[:1], entries[1:]) is None
    assert paired_tests.paired_changes(entries[:1], entries[:1]) is not None


def test_compare_says_what_cannot_be_compared(store, capsys):
    runs = [answers(store, range(5), benchmark=name) for name in ("one", "two")]
    scores = {"t": {"metric": "accuracy", "n": 20, "metrics": {"accuracy": {"value": 0.2, "stderr": 0, "dense": 1.0}}}}
    store.add(*(result(scores=scores, keys={"evaluate": [key], "dense": []}) for key in (*runs, "gone")))
    first, second, third = (entry.key for entry in store.entries("run"))
    assert main(["compare", first, second]) == 0
    assert "cannot be compared question by question: the benchmark's files differ" in capsys.readouterr().out
    assert main(["compare", first, third]) == 0
    assert "so without pairs: scores gone." in capsys.readouterr().out
    wrong = first[:-1] + ("0" if first[-1] != "0" else "1")
    assert main(["compare", wrong, second]) == 1
    assert f"did you mean '{first}'?" in capsys.readouterr().err
