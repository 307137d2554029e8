"""Stand-ins for benchmarks on videos: the folders, columns and file names of the real ones, invented content."""

from __future__ import annotations

from pathlib import Path

import av
import yaml
from datasets import Dataset
from PIL import Image

OPTIONS = ["A. Red.", "B. Green.", "C. Blue.", "D. Gray."]


def write_video(file: Path, n: int) -> Path:
    """A video of 32 x 32 pixels whose frame i has the grey 10 i."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for i in range(n):
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), (10 * i,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


def _write_card(folder: Path, configurations: dict[str, str]) -> None:
    configs = [{"config_name": name, "data_files": files} for name, files in configurations.items()]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\nInvented content.\n")


def write_videomme(folder: Path) -> Path:
    """Three questions on each of two videos; `folder` holds data sets by name."""
    place = folder / "Video-MME"
    rows = [
        {
            "video_id": f"{v:03}", "duration": "short", "domain": "Knowledge", "sub_category": "Geography",
            "url": "https://example.org", "videoID": f"clip{v}", "question_id": f"{v:03}-{q}",
            "task_type": "Action Reasoning", "question": f"What is {q}?", "options": OPTIONS, "answer": "ABCD"[q],
        }
        for v in range(2) for q in range(3)
    ]  # fmt: skip
    (place / "videomme").mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(place / "videomme" / "test-00000-of-00001.parquet")
    _write_card(place, {"videomme": [{"split": "test", "path": "videomme/*"}]})
    for v in range(2):
        write_video(place / "data" / f"clip{v}.mp4", 21 if v else 5)
    return place


def write_mvbench(folder: Path, *tasks: str) -> Path:
    """Two questions of each task, on a file and on a folder of frames."""
    place = folder / "MVBench"
    for task in tasks:
        rows = [
            {"video": video, "question": "Which?", "candidates": ["one", "two", "three"], "answer": answer}
            for video, answer in ((f"{task}_a.mp4", "two"), (f"{task}_frames", "three"))
        ]
        (place / "json").mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_json(place / "json" / f"{task}.json")
        write_video(place / "video" / "some" / f"{task}_a.mp4", 9)
        frames = place / "video" / f"{task}_frames"
        frames.mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (32, 32), (10 * i,) * 3).save(frames / f"{i:05}.jpg")
    _write_card(place, {task: [{"split": "train", "path": f"json/{task}.json"}] for task in tasks})
    return place
