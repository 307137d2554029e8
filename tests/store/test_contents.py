"""What a store holds, as `svl-report ls` and `show` list it."""

import json

import pytest

from svl.core import SvlError
from svl.store import contents
from svl.store.artifacts import Store
from svl.store.contents import find_artifact, format_artifact, format_listing, list_artifacts


def listing(store, stage=None, wanted=None):
    return "\n".join(format_listing(store, stage, wanted))


def test_everything_is_listed_with_size_and_summary(filled_store):
    store, out = filled_store, listing(filled_store)
    for key in (store.stats, store.plan, store.score, store.run, store.track, store.lonely, store.probe):
        assert out.count(f"  {key}  ") == 1
    sizes = {
        key: sum(file.stat().st_size for file in (store.root / "plan" / key).iterdir())
        for key in (store.plan, store.lonely)
    }
    assert f"{store.plan}     {sizes[store.plan] / 1000:.1f} kB" in out  # the file and the manifest
    assert f"plan: 2, {sum(sizes.values()) / 1000:.1f} kB" in out
    assert "Tail removes [3]" in out
    assert "t a 0.5, n = 4, without layers [3]" in out
    assert "t a undefined" in out
    assert "demo: tiny tail none none 25 % seed 0" in out


def test_lists_of_one_stage_or_with_one_word(filled_store):
    out = listing(filled_store, stage="plan")
    assert filled_store.plan in out
    assert filled_store.score not in out
    found = listing(filled_store, wanted="TAIL").splitlines()
    assert [line.split()[0] for line in found if line.startswith("  ")] == [filled_store.plan, filled_store.run]


def test_lists_of_many_show_the_newest(filled_store, monkeypatch):
    monkeypatch.setattr(contents, "SHOWN", 1)
    assert "... 1 older ones (ls stage=plan shows all)" in listing(filled_store)


def test_one_artifact_is_shown_with_its_users_and_state(filled_store):
    store = filled_store
    out = format_artifact(store, store.plan[:10])
    assert out.startswith(f"plan/{store.plan}: Tail removes [3]\n")
    assert "intact" in out
    assert f"stats: {store.stats}" in out
    assert f"used by: run/{store.run}" in out
    (store.root / "plan" / store.plan / "data.bin").write_bytes(b"")
    assert "DAMAGED" in format_artifact(store, f"plan/{store.plan}")


def test_keys_are_found_by_their_beginning(filled_store):
    store = filled_store
    assert find_artifact(store, store.run[:9]) == store.root / "run" / store.run
    wrong = store.run[:-1] + ("0" if store.run[-1] != "0" else "1")
    with pytest.raises(SvlError, match=f"did you mean '{store.run}'"):
        find_artifact(store, wrong)
    (store.root / "plan" / (store.run[:5] + "f" * 11)).mkdir()
    with pytest.raises(SvlError, match="is the beginning of 2 keys: plan/"):
        find_artifact(store, store.run[:5])
    with pytest.raises(SvlError, match=r"begins with 'zzz'; `svl-report ls stage=run` lists them"):
        find_artifact(store, "zzz")
    with pytest.raises(SvlError, match=r"stage is 'plans', but must be one of: .*did you mean 'plan'"):
        find_artifact(store, "plans/abc")


@pytest.mark.parametrize(
    "text", ["{", "[]", json.dumps({"files": 3}), "[" * 100_000, json.dumps({"created": 3, "files": {}, "output": {}})]
)
def test_damaged_manifests_are_not_listed(text, filled_store):
    (filled_store.root / "plan" / filled_store.plan / "manifest.json").write_text(text)
    assert filled_store.plan not in {artifact.key for artifact in list_artifacts(filled_store)}
    with pytest.raises(SvlError, match="is damaged"):
        format_artifact(filled_store, filled_store.plan)


def test_escape_sequences_do_not_reach_the_terminal(filled_store):
    filled_store.make("data", {"path": "\x1b]0;title\x07"}, lambda _: {})
    assert "\x1b" not in listing(filled_store)
    assert "\\x1b]0;title" in listing(filled_store)


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_what_is_no_folder_is_no_store(kind, tmp_path):
    if kind == "file":
        (tmp_path / "file").touch()
    with pytest.raises(SvlError, match="there is no store"):
        listing(Store(tmp_path / kind))
