"""Model cards, as the Hub and people read them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard

from svl.checkpoints import export
from svl.checkpoints.export import ExportRecord
from svl.checkpoints.model_card import read_card_metadata
from svl.core import Patch, Plan, SvlError, Update
from svl.core.patch import TensorChange
from svl.models.options import LoadOptions

RESULT = {
    "strategy": "short_lvlm", "selector": "tis", "compensation": "subspace", "limit": 100,
    "settings": {"strategy": {"_target_": "x"}, "compensation": {"_target_": "x", "rank": 4},
                 "calibration": {"file": "mine.parquet", "samples": 64, "seed": 7}},
    "versions": {"svl": "1.2.3", "torch": "4.5", "transformers": "6.7"},
    "scores": {"pope": {"metric": "accuracy", "n": 400, "metrics": {
        "accuracy": {"value": 0.715, "stderr": 0.0226, "dense": 0.98}, "f1": {"value": 0.1, "stderr": 0, "dense": 1}}},
               "odd": {"metric": "recall", "n": 3, "metrics": {
                   "recall": {"value": None, "stderr": None, "dense": 0.5}}}},
}  # fmt: skip


def test_the_model_card_is_read_by_the_hub_and_by_people(checkpoint, tmp_path):
    source = tmp_path / "Dense Model"
    shutil.copytree(checkpoint("llava"), source)
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nlanguage: [en]\ndatasets: [x]\n---\nText"
    )
    plan = Plan(4, (0, 2), provenance={"ratio": 0.5, "strategy": "short_lvlm"})
    patch = Patch({(1, "mlp"): Update(torch.ones(32, 1), torch.ones(1, 32))})
    ours = export.save(source, plan, tmp_path / "out", patch, record=ExportRecord(result=RESULT))
    read = ModelCard.load(ours / "README.md")
    assert (read.data.license, read.data.license_name, read.data.language) == ("other", "mine", ["en"])
    assert (read.data.library_name, read.data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert read.data.base_model is None  # a folder has no name that the Hub knows
    (result,) = read.data.eval_results  # the undefined one is no result
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("pope", "accuracy", 0.715)
    for expected in (
        "# Dense Model, 2 of 4 decoder layers", "Layers [0, 2] (0-based) of Dense Model were",
        "1.mlp (layer.projection)",
        "AutoModelForImageTextToText.from_pretrained", "| selector | tis |", "| compensation | subspace (rank=4) |",
        "mine.parquet, 64 samples, seed 7", "svl 1.2.3", "| pope | accuracy | 400 | 0.715 ± 0.0226 | 0.98 |",
        "| odd | recall | 3 | undefined | 0.5 |", "first 100 samples", '"removed": [',
    ):  # fmt: skip
        assert expected in read.text, expected
    bare = ModelCard.load(export.save(checkpoint("llama"), Plan(4, (1,)), tmp_path / "bare") / "README.md")
    assert bare.data.pipeline_tag == "text-generation"
    assert bare.data.eval_results is None
    assert "AutoTokenizer" in bare.text
    assert "Recipe" not in bare.text
    assert "Results" not in bare.text


def test_the_card_of_a_trained_model_does_not_say_that_it_was_not(checkpoint, tmp_path):
    patch = Patch(trained={"model.norm.weight": TensorChange(torch.ones(32))})
    trained, plain = (
        ModelCard.load(export.save(checkpoint("llama"), Plan(4, (1,)), tmp_path / name, each) / "README.md").text
        for name, each in (("trained", patch), ("plain", None))
    )
    assert "were removed without training by" in plain
    assert "without training" not in trained
    assert "1 modules were trained afterwards" in trained


def test_cards_of_strangers_can_do_nothing_in_ours(checkpoint, tmp_path):
    """Names and settings that hold markup, links and tables; metadata that hold anything."""
    evil = "<img src=x onerror=alert(1)> ![x](http://evil) | a | b |\n# Title `code` \x1b]0;x\x07"
    result = json.loads(json.dumps(RESULT).replace("mine.parquet", "EVIL").replace("pope", "EVIL"))
    result = json.loads(json.dumps(result).replace("EVIL", json.dumps(evil)[1:-1]))
    plan = Plan(4, (0,), provenance={"strategy": evil, "ratio": "0.5 <b>"})
    options = LoadOptions(name=evil)
    del result["strategy"]
    ours = export.save(checkpoint("llama"), plan, tmp_path / "out", None, options, record=ExportRecord(result=result))
    body, _, as_json = ModelCard.load(ours / "README.md").text.partition("```json")
    for active in ("<img", "![x]", "\n# Title", "\x1b", "://evil", "`code`"):
        assert active not in body
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert [heading.split()[1] for heading in headings[1:]] == ["Recipe", "Results", "Plan"]
    assert all(line.count(" | ") == 4 for line in body.splitlines() if line.startswith("| &lt;"))
    assert json.loads(as_json.strip().removesuffix("```"))["strategy"] == evil  # shown as text


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: mit", "mit"),
        ("license: [mit, apache-2.0]", ["mit", "apache-2.0"]),
        ("license: {a: b}", None),
        ("license: 3", None),
        ("license: !!python/object/apply:os.system ['touch mark']", None),
        ("license: *nowhere", None),
        ("a: [" * 5000, None),
        ("- a", None),
        ("", None),
    ],
)
def test_licences_are_carried_over_as_text_or_not_at_all(front, licence, checkpoint, tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama"), source)
    (source / "README.md").write_text(f"---\n{front}\n---\nText\n")
    monkeypatch.chdir(tmp_path)
    ours = export.save(source, Plan(4, (1,)), tmp_path / "out")
    assert ModelCard.load(ours / "README.md").data.license == licence
    assert not (tmp_path / "mark").exists()


def test_cards_longer_than_any_are_read_in_part_or_refused(checkpoint, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama"), source)
    readme = source / "README.md"
    readme.write_text("---\nlicense: mit\n---\n" + "x" * 10**7)
    assert read_card_metadata(readme) == {"license": "mit"}
    readme.write_text("---\nlicense: mit\na: '" + "x" * 10**7 + "'\n---\n")
    with pytest.raises(SvlError, match="more than 512 KB of metadata"):
        export.save(source, Plan(4, (1,)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    readme.write_text(f"---\nlicense: mit\na: {'[' * 10**5}\n---\n")
    assert read_card_metadata(readme) == {}
    readme.write_text("Long text without metadata. " * 10**6)
    assert read_card_metadata(readme) == {}
    assert read_card_metadata(tmp_path / "nowhere.md") == {}
