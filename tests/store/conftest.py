"""A store with a bit of everything."""

from typing import Any

import pytest

from svl.store.artifacts import Store
from svl.store.in_use import end_lease


@pytest.fixture
def filled_store(tmp_path, monkeypatch):
    """A store with one run and what it is made of, and a plan and a score that no run refers to; not in use."""
    monkeypatch.setenv("SVL_STORE", str(tmp_path / "store"))
    store: Any = Store(tmp_path / "store")

    def add(stage, inputs, **output):
        def build(folder):
            (folder / "data.bin").write_bytes(bytes(1500))
            return output

        return store.make(stage, inputs, build).key

    store.stats = add("stats", {"statistics": ["cosine"]}, samples=8)
    store.plan = add("plan", {"stats": store.stats, "strategy": {"class": "svl.strategies.tail.Tail"}}, removed=[3])
    store.score = add("score", {"removed": [3]}, task="t", metric="a", metrics={"a": {"value": 0.5}}, n=4)
    names = {"name": "demo", "model": "tiny", "strategy": "tail", "ratio": 0.25, "seed": 0}
    store.run = add("run", names, **names, keys={"plan": [store.plan], "evaluate": [store.score]})
    store.track = add("track", {"run": store.run}, run=store.run, location="there")
    store.lonely = add("plan", {"stats": "gone"}, removed=[1])
    store.unused = add("score", {"removed": [1]}, task="t", metric="a", metrics={"a": {"value": None}}, n=4)
    store.orphan = add("track", {"run": "gone"}, run="gone")
    store.probe = add("probe", {"what": "losses"}, value=1.0)
    end_lease(store.root)
    return store
