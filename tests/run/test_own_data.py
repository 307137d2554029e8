"""A run on data as people have them, from the command line."""

from __future__ import annotations

import json

from helpers.commands import QUIET, run_svl
from helpers.sample_pictures import PICTURES


def test_conversations_of_llava_with_pictures_elsewhere(tmp_path):
    (tmp_path / "images").mkdir()
    for name, content in zip("abc", PICTURES, strict=False):
        (tmp_path / "images" / f"{name}.png").write_bytes(content)
    asked, said = {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}
    more = [{"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "Red."}]
    rows = [
        {"id": "1", "image": "a.png", "conversations": [asked, said, *more]},
        {"id": "2", "image": ["b.png", "c.png"], "conversations": [{**asked, "value": "Same?"}, said]},
        {"id": "3", "conversations": more},
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    words = ("calibration=local", "calibration.path=data.json", "calibration.batch_size=3", "strategy=short_lvlm")
    run_svl(*QUIET, *words, "calibration.images=images", "hydra.run.dir=run", cwd=tmp_path)
    assert len(json.loads((tmp_path / "run" / "plan.json").read_text())["removed"]) == 4
    complaint = run_svl(*QUIET, *words, cwd=tmp_path, code=1).stderr
    assert "cannot read the picture 'a.png' of row 0 of 'data.json'" in complaint


def test_columns_of_other_names(tmp_path):
    row = {"question": "What is it?", "answers": ["red", "blue", "blue"], "picture": None}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    words = ("calibration=local", "calibration.path=data.jsonl", "strategy=sleb", "n_remove=1")
    named = "calibration.columns={prompt: question, answer: answers, image: picture}"
    run_svl(*QUIET, *words, named, "hydra.run.dir=run", cwd=tmp_path)
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["removed"]
    complaint = run_svl(*QUIET, *words, cwd=tmp_path, code=1).stderr
    assert "no column 'prompt'; there are: question, answers, picture; calibration.columns={prompt: ...}" in complaint
