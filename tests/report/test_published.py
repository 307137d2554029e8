"""Published scores of dense models beside one's own."""

from __future__ import annotations

import importlib.util

import pytest
from helpers.paths import ROOT

from svl.report.published import dense_scores, published_notes, published_scores


class GivenSection:
    """A section with a dense score of one task."""

    limit = None

    def __init__(self, model: str, task: str, metric: str, dense: float | None, limit: float | None = None):
        self.model, self.tasks, self.limit = model, [task], limit
        self.value = dense
        self.last = type("Run", (), {"result": {"scores": {task: {"metric": metric}}}})

    def dense(self, task):
        return self.value

    def scale(self, task):
        return 100 if self.value is not None and self.value <= 1 else 1


def test_they_are_found_by_the_names_of_checkpoints():
    values = {score.value for score in dense_scores("llava-1.5-7b-hf", "svl_gqa", "exact_match")}
    assert values == {62.0, 61.86}
    assert dense_scores("llava-1.5-13b-hf", "svl_gqa", "exact_match")[0].value == 63.3
    assert not dense_scores("llava-onevision-qwen2-7b-ov-hf", "svl_gqa", "exact_match")
    assert not dense_scores("demo_lvlm", "svl_demo_open", "accuracy")


def test_only_the_part_of_mme_that_is_shown_counts():
    found = dense_scores("llava-1.5-7b-hf", "svl_mme", "perception")
    assert {score.value for score in found} == {1510.7, 1510.8, 1509.4, 1246.4, 1510.0}


def test_pruned_rows_are_no_dense_ones():
    shortgpt = [score for score in published_scores() if score.method == "shortgpt"]
    assert {score.layers_kept for score in shortgpt} == {"24 of 32"}
    assert {score.value for score in dense_scores("Qwen-VL-Chat", "svl_pope", "f1")} == {86.4, 86.5}


@pytest.mark.parametrize(
    ("model", "task", "metric", "dense", "cautious"),
    [
        ("llava-1.5-7b-hf", "svl_gqa", "exact_match", 0.61, False),
        ("llava-1.5-7b-hf", "svl_gqa", "exact_match", 0.588, True),
        ("llava-1.5-7b-hf", "svl_gqa", "exact_match", 0.59, False),
        ("llava-1.5-7b-hf", "svl_mme", "perception", 1449.0, True),
        ("llava-1.5-7b-hf", "svl_mme", "perception", 1451.0, False),
    ],
)
def test_far_from_all_of_them_is_a_caution(model, task, metric, dense, cautious):
    published, *caution = published_notes(GivenSection(model, task, metric, dense))
    assert published.startswith(f"Published, not measured here: dense LLaVA-1.5-7B on {task}: ")
    assert bool(caution) == cautious
    assert not published_notes(GivenSection(model, task, metric, dense, limit=8))[1:]  # a part tells nothing
    if cautious:
        assert "padding" in caution[0]
        assert "system prompt" in caution[0]


def test_the_page_has_what_the_file_has(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("make", ROOT / "scripts" / "make_reference_scores.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PAGE", tmp_path / "page.md")
    module.main()
    assert (tmp_path / "page.md").read_text() == (ROOT / "docs" / "reference_scores.md").read_text()
