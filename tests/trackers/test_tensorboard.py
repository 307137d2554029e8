"""Runs of TensorBoard, read back by its own reader."""

import dataclasses
import io

import pytest
from helpers.records import CONFIG, CURVES, NUMBERS
from PIL import Image

from svl.trackers.tensorboard import TensorBoard

pytest.importorskip("tensorboard", reason="extra `tensorboard`")


def read_back(folder):
    """Everything in a run's event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return found.Reload()


def text_of(found, name):
    (value,) = found.Tensors(f"{name}/text_summary")
    return value.tensor_proto.string_val[0].decode()


def test_tensorboard_run_holds_everything(record, tmp_path):
    losses = [{"step": 10, "loss": 0.5}, {"step": 20, "loss": 0.25}]
    where = TensorBoard(folder=str(tmp_path / "tb")).mirror(dataclasses.replace(record, training=losses))
    found = read_back(where)
    scalars = {name: found.Scalars(name) for name in found.Tags()["scalars"]}
    numbers = {
        name: events[0].value for name, events in scalars.items() if not name.startswith(("layers/", "recover/"))
    }
    assert [(e.step, e.value) for e in scalars["recover/loss"]] == [(10, 0.5), (20, 0.25)]
    assert numbers == pytest.approx(NUMBERS)
    assert {name: [(e.step, e.value) for e in scalars[f"layers/{name}"]] for name in CURVES} == {
        name: [(i, pytest.approx(value)) for i, value in enumerate(values)] for name, values in CURVES.items()
    }
    (image,) = found.Images("figures/importance")
    assert Image.open(io.BytesIO(image.encoded_image_string)).size == (3, 2)
    assert '"name": "short_lvlm"' in text_of(found, "config")
    assert '"question": "Is it?"' in text_of(found, "flips")
    assert all(line.startswith("    ") for line in text_of(found, "report/flips.md").splitlines())
    plugin = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    for value in (b"strategy/name", b"short_lvlm", CONFIG["strategy"]["name"].encode()):
        assert value in plugin


def test_a_run_that_is_mirrored_again_replaces_itself(record, tmp_path):
    tracker = TensorBoard(folder=str(tmp_path / "tb"))
    failed = dataclasses.replace(record, key="failed-1", name="../x\n", group="..", result={}, error="SvlError: no")
    places = [tracker.mirror(run) for run in (record, record, failed)]
    assert places[0] == places[1]
    folders = {file.parent for file in (tmp_path / "tb").rglob("events.out.*")}
    assert {str(folder) for folder in folders} == set(places)
    assert len([file for file in (tmp_path / "tb").rglob("*") if file.is_file()]) == 2  # nothing unfinished is left
    assert "SvlError: no" in text_of(read_back(places[2]), "error")


def test_a_run_that_cannot_be_written_leaves_the_one_before(record, tmp_path):
    tracker = TensorBoard(folder=str(tmp_path / "tb"))
    where = tracker.mirror(record)
    lost = dataclasses.replace(record, figures={"gone": tmp_path / "gone.png"})
    with pytest.raises(Exception, match="gone"):
        tracker.mirror(lost)
    assert read_back(where).Tags()["images"] == ["figures/importance"]
    assert not list((tmp_path / "tb").rglob("*.incomplete"))
