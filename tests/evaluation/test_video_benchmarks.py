"""Benchmarks on videos, through lmms-eval's own task code, on stand-ins with the real columns and folders."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from helpers.tasks import benchmark, sample_rows
from helpers.video_standins import write_mvbench, write_video, write_videomme

import svl
from svl.core import SvlError
from svl.evaluation import benchmarks
from svl.evaluation.conversations import images_of, video_of
from svl.evaluation.documents import video_lookup
from svl.evaluation.settings import TaskOptions

pytest.importorskip("lmms_eval")
pytest.importorskip("av")
evaluation = importlib.import_module("svl.evaluation.evaluate")
MVBENCH = ("action_antonym", "moving_count")


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copies")
    write_videomme(folder)
    write_mvbench(folder, *MVBENCH)
    return folder


@pytest.fixture(scope="module")
def qwen_vl(mimic):
    return svl.load(mimic("qwen2_5_vl_7b"), device="cpu", dtype="float32")


@pytest.fixture
def run(qwen_vl, copies, tmp_path, monkeypatch):
    """Evaluate a task, with given answers or the model's own -> (result, rows, greys of the frames shown)."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(task, answer=None, lvlm=None, **options):
        shown = {}
        real = evaluation.Answerer.answer_batch

        def answers(self, requests, cap):
            for request in requests:
                conversation = self.conversation(request)
                frames = video_of(conversation)
                assert not images_of(conversation)
                shown[request.doc_id] = [round(float(np.asarray(frame).mean()) / 10) for frame in frames]
            if answer is None:
                return real(self, requests, cap)
            return [(answer(self.task_dict[r.args[-2]][r.args[-1]][r.args[-3]]),) for r in requests]

        monkeypatch.setattr(evaluation.Answerer, "answer_batch", answers)
        chosen = TaskOptions(metric="accuracy", data=str(copies), **{"batch_size": 2, **options})
        result = evaluation.evaluate(lvlm or qwen_vl, task, chosen, tmp_path)
        return result, sample_rows(tmp_path), [shown[i] for i in sorted(shown)]

    return call


def test_video_mme_shows_frames_of_the_right_video(run):
    result, rows, shown = run("svl_videomme", lambda doc: f"{doc['answer']}. because", frames=5)
    assert result["metrics"]["accuracy"]["value"] == 1
    assert shown == [[0, 1, 2, 3, 4]] * 3 + [[0, 5, 10, 15, 20]] * 3
    assert len(rows) == 6
    assert result["metrics"]["upstream_videomme_perception_score"]["value"] == 100
    assert run("svl_videomme", lambda doc: "E")[0]["metrics"]["accuracy"]["value"] == 0


def test_questions_on_one_video_are_one_unit(run):
    """Right on all of one video, wrong on all of the other: two units, not six."""
    result, _, _ = run("svl_videomme", lambda doc: doc["answer"] if doc["videoID"] == "clip0" else "E")
    found = result["metrics"]["accuracy"]
    assert (found["value"], found["stderr"]) == (0.5, pytest.approx(0.5))


@pytest.mark.parametrize("task", MVBENCH)
def test_mvbench_reads_files_and_folders_of_frames(task, run):
    def right(doc):
        return "(" + "ABC"[doc["candidates"].index(doc["answer"])] + ")"

    result, _, shown = run(f"svl_mvbench_{task}", right, frames=3)
    assert result["metrics"]["accuracy"]["value"] == 1
    assert shown == [[0, 4, 8], [0, 2, 3]]
    unread = run(f"svl_mvbench_{task}", lambda doc: right(doc) if doc["answer"] == "two" else "")[0]
    assert unread["metrics"]["accuracy"]["value"] == 0.5  # upstream leaves out what was not answered
    assert unread["metrics"]["upstream_mvbench_accuracy"]["value"] == 100


def test_a_model_answers(run):
    result, rows, _ = run("svl_videomme", limit=2, max_new_tokens=2, frames=4)
    assert result["n"] == len(rows) == 2
    assert result["metrics"]["accuracy"]["value"] is not None


def test_a_model_without_videos_is_told(run, llava):
    with pytest.raises(SvlError, match="asks about videos, but model 'llava' takes none"):
        run("svl_videomme", lambda doc: "A", lvlm=llava)


def test_every_task_of_mvbench_is_there():
    names = {name.removeprefix("svl_") for name in benchmark("mvbench").tasks}
    shipped = {name for name in benchmarks.task_files(benchmarks.OWN.parents[0]) if "mvbench" in name}
    assert shipped == {f"svl_{name}" for name in names}
    assert len(names) == 20
    assert all(benchmarks.task_settings(f"svl_{name}", None)["dataset_name"] in name for name in names)


def test_videos_are_found_by_name_wherever_they_are(tmp_path):
    for name in ("a/x.mp4", "b/x.mp4", "b/y.mkv"):
        write_video(tmp_path / name, 1)
    look_up = video_lookup(tmp_path, "video")
    assert look_up({"video": "y"}) == look_up({"video": "y.mkv"}) == [str(tmp_path / "b/y.mkv")]
    assert look_up({"video": "a/x.mp4"}) == [str(tmp_path / "a/x.mp4")]
    with pytest.raises(SvlError, match=r"its video 'x': several files have that name: a/x\.mp4, b/x\.mp4"):
        look_up({"video": "x"})
    with pytest.raises(SvlError, match=r"its video 'z\.mp4': it is not in"):
        look_up({"video": "z.mp4"})
