"""What a store holds: listed, shown, and cleaned of what no run will ever read."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from svl.core import SvlError, did_you_mean, one_of
from svl.store import SCHEMA, Store

SHOWN = 10  # artifacts of a stage that a list of everything shows
RECENT = 3600  # seconds in which scratch of a process that is not of this machine counts as in use
DERIVED = ("stats", "plan", "patch", "score", "efficiency")  # a run refers to them, directly or through each other
ABOUT_A_RUN = ("track", "gap")


@dataclass(frozen=True)
class Artifact:
    """A finished artifact as its folder and manifest say, its files not read."""

    path: Path
    manifest: dict[str, Any]

    @property
    def stage(self) -> str:
        return self.path.parent.name

    @property
    def key(self) -> str:
        return self.path.name

    @property
    def bytes(self) -> int:
        """Size of its files."""
        return sum(n for n, _ in self.manifest["files"].values()) + (self.path / "manifest.json").stat().st_size

    @property
    def age(self) -> float:
        """Seconds since it was made."""
        return time.time() - datetime.strptime(self.manifest["created"], "%Y-%m-%dT%H:%M:%S%z").timestamp()

    @property
    def what(self) -> str:
        """It in a few words."""
        return _what(self.stage, self.manifest["output"] or {}, self.manifest["inputs"])

    def __str__(self) -> str:
        return f"{self.key}  {size(self.bytes):>9}  {period(self.age):>6}  {self.what}".rstrip()


def _what(stage: str, output: dict[str, Any], inputs: dict[str, Any]) -> str:
    if stage == "run":
        parts = [output.get(k) or "none" for k in ("model", "strategy", "selector", "compensation")]
        return f"{output.get('name')}: {' '.join(parts)} {100 * output.get('ratio', 0):g} % seed {output.get('seed')}"
    if stage == "plan":
        method = (inputs.get("strategy") or {}).get("class", "").rpartition(".")[2]
        return f"{method} removes {output.get('removed')}"
    if stage == "stats":
        return f"{', '.join(inputs.get('statistics', []))} of {output.get('samples')} samples"
    if stage == "patch":
        return f"changes {', '.join(output.get('changed', [])) or 'nothing'}"
    if stage == "score":
        value = output.get("metrics", {}).get(output.get("metric"), {}).get("value")
        shown = "undefined" if value is None else f"{value:.4g}"
        gone = f"without layers {inputs['removed']}" if inputs.get("removed") else "dense"
        return f"{output.get('task')} {output.get('metric')} {shown}, n = {output.get('n')}, {gone}"
    if stage == "efficiency":
        return ", ".join(f"{part} x{ratio['value']:.2f}" for part, ratio in output.get("speedup", {}).items())
    names = ("name", "path", "what", "run", "location", "difference", "removed")
    return ", ".join(f"{k} {v}" for k in names if (v := output.get(k, inputs.get(k))) is not None)


def size(n: float) -> str:
    """1234567 -> "1.2 MB"."""
    power = next((i for i in range(4) if n < 1000 ** (i + 1)), 4)
    value = n / 1000**power
    return f"{value:.{0 if power == 0 or value >= 100 else 1}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def period(seconds: float) -> str:
    """8000 -> "2 h"."""
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{max(seconds, 0) / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def artifacts(store: Store, stage: str | None = None) -> Iterator[Artifact]:
    """Artifacts whose manifest can be read, stage by stage, oldest first.

    Raises:
        SvlError: if there is no store, or no such stage.
    """
    if not store.root.is_dir():
        raise SvlError(f"there is no store {store.root}; name another with store=DIR")
    if stage is not None:
        one_of("stage", stage, list(SCHEMA))
    for name in [stage] if stage else SCHEMA:
        found = []
        for file in (store.root / name).glob("*/manifest.json"):
            try:
                made = Artifact(file.parent, json.loads(file.read_text(encoding="utf-8")))
                found.append((made.age, made.key, made.what and made))
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue  # damaged, which `gc` tells
        yield from (made for _, _, made in sorted(found, key=lambda x: (-x[0], x[1])) if made)


def find(store: Store, word: str, stage: str | None = None) -> Path:
    """The folder of the artifact whose key begins with `word` ("stage/key" is understood, too).

    Raises:
        SvlError: if there is none, or more than one.
    """
    prefix = word.rpartition("/")[2]
    stage = word.rpartition("/")[0] or stage
    if not store.root.is_dir():
        raise SvlError(f"there is no store {store.root}; name another with store=DIR")
    if stage is not None:
        one_of("stage", stage, list(SCHEMA))
    places = [p for s in ([stage] if stage else SCHEMA) for p in sorted((store.root / s).glob("*")) if p.is_dir()]
    found = [place for place in places if prefix and place.name.startswith(prefix)]
    if len(found) == 1:
        return found[0]
    kind = stage or "artifact"
    if found:
        names = ", ".join(f"{p.parent.name}/{p.name}" for p in found[:8]) + (" ..." if len(found) > 8 else "")
        raise SvlError(f"'{word}' is the beginning of {len(found)} keys: {names}; give more of it")
    hint = did_you_mean(prefix, [p.name for p in places]) or f"; `svl-report ls stage={stage or 'run'}` lists them"
    raise SvlError(f"no {kind} in {store.root} has a key that begins with '{word}'{hint}")


def listing(store: Store, stage: str | None, wanted: str | None) -> Iterator[str]:
    """Lines of text: what the store holds, per stage; of many, the newest, unless one stage or a word is asked for."""
    stages: dict[str, list[Artifact]] = defaultdict(list)
    for made in artifacts(store, stage):
        if wanted is None or wanted.lower() in str(made).lower():
            stages[made.stage].append(made)
    total = sum(made.bytes for found in stages.values() for made in found)
    for name, found in stages.items():
        yield f"{name}: {len(found)}, {size(sum(made.bytes for made in found))}"
        few = found if stage or wanted else found[-SHOWN:]
        if len(few) < len(found):
            yield f"  ... {len(found) - len(few)} older ones (ls stage={name} shows all)"
        yield from (f"  {made}" for made in few)
    kind = f" with '{wanted}'" if wanted else ""
    count = sum(map(len, stages.values()))
    yield f"{count} artifact{'s' * (count != 1)}{kind} in {store.root}, {size(total)}"


def shown(store: Store, word: str) -> str:
    """One artifact's manifest, readable, with what uses it.

    Raises:
        SvlError: if there is no such artifact, or its manifest cannot be read.
    """
    folder = find(store, word)
    every = list(artifacts(store))
    made = next((a for a in every if a.path == folder), None)
    if made is None:
        raise SvlError(f"the manifest of {folder} is damaged; `svl-report gc` removes it, running again makes it anew")
    users = [f"{a.stage}/{a.key}" for a in every if made.key in _words(a) and a.path != folder]
    manifest = {k: v for k, v in made.manifest.items() if k != "digest"}
    manifest["files"] = {name: size(n) for name, (n, _) in manifest["files"].items()}
    body = yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    state = "intact" if store.read(folder, warn=False) else "DAMAGED: it counts as missing and is computed again"
    head = f"{made.stage}/{made.key}: {made.what}\n{size(made.bytes)}, {period(made.age)} old, {state}\n{folder}\n"
    return f"{head}\n{body}\nused by: {', '.join(users) or 'nothing'}"


def _words(made: Artifact) -> set[str]:
    """All strings in what an artifact was made of; of a run, also in the keys it lists."""

    def walk(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from walk(item)

    return {*walk(made.manifest["inputs"]), *walk((made.manifest["output"] or {}).get("keys"))}


# ---------------------------------------------------------------------------------------------- cleaning


@dataclass(frozen=True)
class Leftover:
    """Something that can go: where, why, and whether that still holds."""

    path: Path
    why: str
    still: Callable[[], bool]

    @cached_property
    def bytes(self) -> int:
        """Size of its files."""
        files = [self.path] if self.path.is_file() else self.path.rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())

    @property
    def lock(self) -> str | None:
        """Name of the lock that its writer would hold, or that it is."""
        if self.path.parent.name == "lock":
            return self.path.name
        if self.path.parent.name in SCHEMA:
            return f"{self.path.parent.name}-{self.path.name}"
        return self.path.name if re.fullmatch(r"[a-z]+-[0-9a-f]{16}", self.path.name) else None


def leftovers(store: Store, unreferenced: bool, days: float) -> Iterator[Leftover]:
    """What can be removed; nothing that a running process holds.

    Half-written artifacts, scratch of processes that are gone, damaged artifacts, and locks that nobody holds. If
    `unreferenced`, also artifacts older than so many days that no run refers to, directly or through others. What is
    drawn from a hub, assembled checkpoints, checks, and measurements of searches stay: any later run may read them.

    Raises:
        SvlError: if there is no store.
    """
    if not store.root.is_dir():
        raise SvlError(f"there is no store {store.root}; name another with store=DIR")
    for place in sorted((store.root / "tmp").glob("*")):
        left = Leftover(place, "half-written, by a process that is gone", place.exists)
        if left.lock or not _in_use(place):
            yield left
    for stage in SCHEMA:
        for place in sorted((store.root / stage).glob("*")):
            if _damaged(store, place):
                yield Leftover(place, "damaged", partial(_damaged, store, place))
    if unreferenced:
        for made in without_runs(store):
            if made.age > 86400 * days:
                yield Leftover(made.path, "no run refers to it", made.path.exists)
    for file in sorted((store.root / "lock").glob("*")):
        yield Leftover(file, "a lock that nobody holds", file.exists)


def _damaged(store: Store, place: Path) -> bool:
    return place.exists() and store.read(place, warn=False) is None


def _in_use(scratch: Path) -> bool:
    """Whether the process whose number ends a name may be at work: it lives here, or has written within the hour."""
    number = scratch.name.rpartition("-")[2]
    if number.isdigit():
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            pass
        except PermissionError:
            return True
        else:
            return True
    newest = max(p.stat().st_mtime for p in (scratch, *scratch.rglob("*")))
    return time.time() - newest < RECENT


def without_runs(store: Store) -> list[Artifact]:
    """Derived artifacts that no run refers to, and what is about runs that are gone."""
    every = list(artifacts(store))
    by_key = {made.key: made for made in every}
    reached = {made.key for made in every if made.stage == "run"}
    runs, new = set(reached), set(reached)
    while new:
        new = {word for key in new for word in _words(by_key[key]) if word in by_key} - reached
        reached |= new
    derived = [made for made in every if made.stage in DERIVED and made.key not in reached]
    return derived + [made for made in every if made.stage in ABOUT_A_RUN and not _words(made) & runs]


def remove(store: Store, left: Leftover) -> bool:
    """Remove a leftover, in one step for everyone else; False if a process holds it, or it is whole again."""
    lock = store.root / "lock" / (left.lock or f"gc-{os.getpid()}")
    with _held(lock) as ours:
        if ours and (gone := left.still()) and left.path != lock:
            away = store.root / "tmp" / f"removed-{left.path.name}-{os.getpid()}"
            away.parent.mkdir(exist_ok=True)
            os.replace(left.path, away)
            shutil.rmtree(away) if away.is_dir() else away.unlink()
        if ours:  # whoever waits for the lock sees that its file is gone, and makes a new one
            lock.unlink(missing_ok=True)
        return ours and gone


def _is_free(lock: Path) -> bool:
    """Whether nobody holds a lock."""
    if not lock.exists():
        return True
    with _held(lock) as ours:
        return ours


@contextmanager
def _held(file: Path) -> Iterator[bool]:
    """Hold a lock if nobody else does; whether that worked."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def clean(store: Store, unreferenced: bool, days: float, sure: bool) -> Iterator[str]:
    """Lines of text: what goes (or would go, unless `sure`), and how much that frees."""
    freed, held = 0, 0
    kinds: dict[str, int] = defaultdict(int)
    found = {left.path: left for left in reversed(list(leftovers(store, unreferenced, days)))}  # each for one reason
    for left in reversed(found.values()):
        size_of = left.bytes
        if not (remove(store, left) if sure else _is_free(store.root / "lock" / (left.lock or "none"))):
            held += 1
            continue
        freed += size_of
        kinds[left.why] += 1
        if left.path.parent.name != "lock":
            yield f"{left.path.relative_to(store.root)}  {size(size_of)}  {left.why}"
    if held:
        yield f"{held} kept: another process is at work on them"
    if not kinds:
        yield f"nothing to remove in {store.root}"
        return
    count = ", ".join(f"{n} x {why}" for why, n in kinds.items())
    did = "removed" if sure else "would be removed"
    yield f"{did}: {count}; {size(freed)} in {store.root}" + ("" if sure else "\nsay yes=true to remove them")
