"""Numbers and curves of a record."""

import dataclasses

from helpers.records import NUMBERS, RESULT

from svl.trackers.none import Nowhere
from svl.trackers.record import flatten


def test_summary_has_every_number_of_a_result(record):
    assert record.summary() == NUMBERS
    leaves = [
        value for name, value in flatten(RESULT) if isinstance(value, int | float) and not name.startswith("plan/")
    ]
    assert sorted(leaves) == sorted(NUMBERS.values())
    trained = dataclasses.replace(record, result=RESULT | {"training": {"steps": 7, "device": {"type": "cpu"}}})
    assert trained.summary() == NUMBERS | {"training/steps": 7}
    unscored = {"scores": {}, "average": None, "retained": None, "cost": {"layers": 3}, "efficiency": None}
    names = dataclasses.replace(record, result=RESULT | unscored).summary().keys()
    assert names == {n for n in NUMBERS if n.startswith(("prune", "seconds"))} | {"cost/layers"}
    assert dataclasses.replace(record, result={}).summary() == {}


def test_layers(record):
    points = record.layers()
    assert points[2] == {"layer": 2, "removed": 1, "importance": 0.1, "cosine": 0.9}
    assert [point["layer"] for point in points] == [0, 1, 2, 3]
    assert dataclasses.replace(record, curves={}).layers() == []


def test_none(record):
    before = sorted(record.folder.rglob("*"))
    assert Nowhere().mirror(record) is None
    assert sorted(record.folder.rglob("*")) == before
