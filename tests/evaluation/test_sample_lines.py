"""What samples.jsonl says that a question adds to the main metric."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lmms_eval")

from svl.evaluation import task_metrics
from svl.evaluation.evaluate import sample_lines
from svl.evaluation.lmms_tasks import ScoredTask
from svl.evaluation.tasks import utils

SAID = ["yes", "no", "yes", "no"]
TRUE = ["yes", "yes", "no", "no"]


def lines(value: float | None, **entry: Any) -> list[dict[str, Any]]:
    """The lines of four answers, by a task that lists the metric "m" with what `entry` says."""
    config = SimpleNamespace(metric_list=[{"metric": "m", **entry}])
    benchmark = ScoredTask(SimpleNamespace(config=config, OUTPUT_TYPE="generate_until"), range(4))
    samples = [
        {
            "doc_id": i,
            "doc": {},
            "arguments": ["?"],
            "target": true,
            "filtered_resps": [said],
            "m": {"score": float(said == true), "answer": said, "target": true},
        }
        for i, (said, true) in enumerate(zip(SAID, TRUE, strict=True))
    ]
    return list(sample_lines(benchmark, "m", value, samples))


def test_of_a_mean_no_part_is_written():
    assert all("part" not in line for line in lines(0.5))


def test_of_what_is_no_mean_it_is_the_part_or_null():
    found = lines(0.25)
    assert [line["part"] for line in found] == [None] * 4
    assert [line["score"] for line in found] == [1, 0, 0, 1]
    known = lines(0.5, parts=task_metrics.recall_parts)
    assert sum(line["part"] for line in known) == pytest.approx(0.5)
    assert known[2]["part"] == known[3]["part"]  # of questions whose answer is no


def test_of_an_undefined_metric_it_is_null():
    assert [line["part"] for line in lines(None, parts=task_metrics.recall_parts)] == [None] * 4


@pytest.mark.parametrize("text", ["There is not any dog", "Not visible", "The answer is: cannot see, no", "maybe"])
@pytest.mark.parametrize("answer", ["yes", "no"])
def test_what_a_script_reads_is_scored_as_it_reads(text, answer):
    items = utils.pope({"answer": answer, "question_id": "1", "category": "random"}, [text])
    for metric in ("f1_official", "f1_llava"):
        item = items[metric]
        assert item["answer"] == utils.pope_script_answer(text)
        assert item["score"] == float(item["answer"] == answer)
    assert items["f1_llava"]["split"] == "random"
