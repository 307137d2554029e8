"""The bundled data are what their scripts make, large, balanced, and disjoint."""

from __future__ import annotations

from collections import Counter
from typing import Any

import datasets
import pytest
from helpers.tasks import DEMO, data_rows, script

FILES = ("existence", "choice", "open", "validation", "calibration")


@pytest.fixture(scope="module")
def data() -> dict[str, list[dict[str, Any]]]:
    return {name: data_rows(DEMO / "data" / f"{name}.parquet") for name in FILES}


def test_benchmarks_are_balanced_and_large(data):
    assert sum(len(data[name]) for name in FILES[:3]) >= 1000
    assert Counter(r["answer"] for r in data["existence"]) == {"yes": 200, "no": 200}
    assert Counter(r["answer"] for r in data["choice"]) == dict.fromkeys("ABCD", 100)
    kinds = ("attribute", "count", "compare", "relation1", "relation2", "relation3")
    assert Counter(r["kind"] for r in data["open"]) == dict.fromkeys(kinds, 80)
    assert Counter(r["kind"] for r in data["validation"]) == dict.fromkeys((*kinds, "existence", "choice"), 40)
    assert len(data["calibration"]) == 64
    for row in data["choice"]:
        assert len(row["options"]) == 4
        assert all(f"\n{letter}. {o}" in row["prompt"] for letter, o in zip("ABCD", row["options"], strict=True))
    assert sum((DEMO / "data" / f"{name}.parquet").stat().st_size for name in FILES) < 10 * 2**20


def test_no_scene_is_shared(data):
    images = [row["image"]["bytes"] for name in FILES for row in data[name]]
    assert len(set(images)) == len(images)


def test_data_are_what_the_script_makes(data):
    make = script("make_demo_data")
    for name, pairs in make.draw(0).items():
        assert {scene.split for scene, _ in pairs} == {name if name in ("calibration", "validation") else "test"}
        table = make.table(name, pairs).cast_column("image", datasets.Image(decode=False))
        assert table.to_list() == data[name]
