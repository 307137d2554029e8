"""What holds of every tracker."""

import dataclasses
import threading

import pytest
from helpers.records import RESULT

from svl.core import SvlError
from svl.trackers import mirroring
from svl.trackers.mlflow import Mlflow
from svl.trackers.none import Nowhere
from svl.trackers.record import Record, Tracker
from svl.trackers.several import Several
from svl.trackers.tensorboard import TensorBoard
from svl.trackers.wandb import Wandb


@dataclasses.dataclass(frozen=True)
class Hanging(Tracker):
    """A tracker that never ends."""

    def mirror(self, record: Record) -> str | None:
        """Wait for ever."""
        threading.Event().wait()
        return None


def test_a_tracker_that_hangs_is_given_up(record, monkeypatch):
    monkeypatch.setattr(mirroring, "GRACE", 0.1)
    with pytest.raises(TimeoutError, match=r"not through after 0.2 s \(tracker.timeout\)"):
        mirroring.mirror_in_time(Hanging(timeout=0.1), record)
    assert mirroring.mirror_in_time(Nowhere(), record) is None


def test_a_missing_library_is_found_before_any_work(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SvlError, match=r"pip install 'svl\[mlflow\]'"):
        Mlflow().check()
    with pytest.raises(SvlError, match=r"pip install wandb, or set tracker=none"):
        Wandb().check()
    for tracker in (TensorBoard(), Several(of={"none": Nowhere(), "tensorboard": TensorBoard()})):
        with pytest.raises(SvlError, match=r"pip install 'svl\[tensorboard\]'"):
            tracker.check()
    Nowhere().check()


def test_several_trackers_stand_for_each_of_them(record):
    first, second = Keeping(given=[]), Keeping(given=[])
    both = Several(of={"first": first, "second": second, "none": Nowhere()})
    assert both.each("several") == both.of
    assert first.each("it") == {"it": first}
    assert both.mirror(record) == "there, there"
    assert first.given == second.given == [record]
    with pytest.raises(SvlError, match="tracker=several has no tracker"):
        Several().check()


@dataclasses.dataclass(frozen=True)
class Keeping(Tracker):
    """A tracker that shows what it is given."""

    given: list = dataclasses.field(default_factory=list)

    def mirror(self, record: Record) -> str | None:
        """Keep the record."""
        self.given.append(record)
        return "there"


def test_no_tracker_gets_a_secret(record):
    config = {"tracker": {"uri": "http://user:sesame@host/x", "api_key": "sesame"}, "model": {"image_token": "<image>"}}
    secret = dataclasses.replace(
        record,
        config=config,
        error="cannot reach http://user:sesame@host: password=sesame",
        result=RESULT | {"settings": {"strategy": {"hf_token": "sesame", "p": 0.5}}},
    )
    tracker = Keeping()
    assert mirroring.mirror_in_time(tracker, secret) == "there"
    (given,) = tracker.given
    assert "sesame" not in str(dataclasses.asdict(given))
    assert given.config["model"] == {"image_token": "<image>"}
    assert given.result["settings"]["strategy"]["p"] == 0.5
    assert given.summary() == record.summary()
