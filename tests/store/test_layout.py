"""Which folders count as stores."""

import pytest

from svl.core import SvlError
from svl.store import layout
from svl.store.artifacts import Store
from svl.store.layout import MARKER


def nothing(_):
    return {}


def test_new_and_empty_folders_are_marked(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".DS_Store").touch()
    for name in ("new", "empty", "a/b/c"):
        Store(tmp_path / name).make("plan", {}, nothing)
        assert (tmp_path / name / MARKER).read_text() == '{"format": 1}\n'


def test_a_mark_that_another_process_sets_meanwhile_is_nothing_foreign(tmp_path, monkeypatch):
    """Between looking for a mark and looking for what no store has."""

    def looked_too_early(root):
        (root / MARKER).write_text('{"format": 1}')
        return False

    monkeypatch.setattr(layout, "is_marked", looked_too_early)
    layout.mark_store(tmp_path)
    monkeypatch.undo()
    assert layout.is_marked(tmp_path)


def test_reading_marks_nothing(tmp_path):
    store = Store(tmp_path / "store")
    assert store.get("plan", {}) is None
    assert list(store.entries("run")) == []
    assert not store.root.exists()


def test_stores_of_version_0_1_0_are_adopted_when_they_are_written(tmp_path):
    store = Store(tmp_path / "store")
    key = store.make("plan", {}, nothing).key
    (store.root / MARKER).unlink()
    for name in ("fingerprint/0123456789abcdef", "lock/plan-0123456789abcdef", "tmp/served-77/x"):
        (store.root / name).parent.mkdir(parents=True, exist_ok=True)
        (store.root / name).touch()
    assert store.get("plan", {}).key == key  # reading needs no mark
    assert not (store.root / MARKER).exists()
    store.make("plan", {"another": 1}, nothing)
    assert (store.root / MARKER).exists()


@pytest.mark.parametrize(
    "name",
    ["paper.tex", "run/2025-01-01/result.json", "data/x.png", "tmp/notes", "plan", "lock/x", "0123456789abcdef/x"],
)
def test_folders_with_anything_else_are_refused(name, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(SvlError, match=r"is no store: it holds '.*'; name a new or empty folder") as caught:
        Store(tmp_path).make("plan", {}, nothing)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [name.rpartition("/")[2]]


def test_a_mark_set_by_hand_is_taken(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SvlError) as caught:
        Store(tmp_path).make("plan", {}, nothing)
    line = str(caught.value).partition("echo '")[2].partition("'")[0]  # as the error says
    (tmp_path / MARKER).write_text(line)
    assert not Store(tmp_path).make("plan", {}, nothing).reused
