"""What a store holds, artifact by artifact, for people: the lists of `svl-report ls` and `show`."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import humanize
import yaml

from svl.core.errors import SvlError, did_you_mean, one_of
from svl.store.artifacts import CREATED, MANIFEST, Store
from svl.store.files import nested_strings
from svl.store.layout import SCHEMA, files_of_store
from svl.text.escaping import for_terminal

SHOWN = 10  # artifacts of a stage that a list of everything shows


@dataclass(frozen=True)
class Artifact:
    """A finished artifact as its folder and manifest have it, its files not read."""

    path: Path
    manifest: dict[str, Any]

    @property
    def stage(self) -> str:
        return self.path.parent.name

    @property
    def key(self) -> str:
        return self.path.name

    @cached_property
    def bytes(self) -> int:
        """Size of its files."""
        return sum(size for size, _ in self.manifest["files"].values()) + (self.path / MANIFEST).stat().st_size

    @cached_property
    def age(self) -> float:
        """Seconds since it was made."""
        return time.time() - datetime.strptime(self.manifest["created"], CREATED).timestamp()

    @cached_property
    def summary(self) -> str:
        """It in a few words."""
        return for_terminal(summarise_artifact(self.stage, self.manifest["output"] or {}, self.manifest["inputs"]))

    @cached_property
    def references(self) -> set[str]:
        """All strings in what it was made of (keys of other artifacts among them); of a run, also the keys it lists."""
        return {*nested_strings(self.manifest["inputs"]), *nested_strings((self.manifest["output"] or {}).get("keys"))}

    def __str__(self) -> str:
        size, age = humanize.naturalsize(self.bytes), humanize.naturaldelta(self.age)
        return f"{self.key}  {size:>9}  {age:>10}  {self.summary}".rstrip()


def summarise_artifact(stage: str, output: dict[str, Any], inputs: dict[str, Any]) -> str:
    """What an artifact is, from its output and inputs, in a few words."""
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
    if stage == "recover":
        spent = f"{output.get('steps')} steps, {output.get('seconds', 0):.0f} s"
        return f"{(inputs.get('recovery') or {}).get('class', '').rpartition('.')[2]}, {spent}"
    if stage == "score":
        value = output.get("metrics", {}).get(output.get("metric"), {}).get("value")
        shown = "undefined" if value is None else f"{value:.4g}"
        layers = f"without layers {inputs['removed']}" if inputs.get("removed") else "dense"
        return f"{output.get('task')} {output.get('metric')} {shown}, n = {output.get('n')}, {layers}"
    if stage == "efficiency":
        return ", ".join(f"{part} x{ratio['value']:.2f}" for part, ratio in output.get("speedup", {}).items())
    names = ("name", "path", "what", "run", "location", "difference", "removed")
    return ", ".join(f"{k} {v}" for k in names if (v := output.get(k, inputs.get(k))) is not None)


def check_store_exists(store: Store) -> None:
    """Raise SvlError unless the folder of a store is there."""
    if not store.root.is_dir():
        raise SvlError(f"there is no store {store.root}; name another with store=DIR")


def list_artifacts(store: Store, stage: str | None = None) -> Iterator[Artifact]:
    """Artifacts whose manifest can be read, stage by stage, oldest first. Damaged ones are left out; `gc` names them.

    Raises:
        SvlError: if there is no store, or no such stage.
    """
    check_store_exists(store)
    if stage is not None:
        one_of("stage", stage, list(SCHEMA))
    for name in [stage] if stage else SCHEMA:
        artifacts = [found for folder in files_of_store(store.root, name) if (found := _read_artifact(folder))]
        yield from sorted(artifacts, key=lambda artifact: (-artifact.age, artifact.key))


def _read_artifact(folder: Path) -> Artifact | None:
    """The artifact in `folder`; None if its manifest does not give all that lists show."""
    try:
        artifact = Artifact(folder, json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        str(artifact)  # computes what is shown
        artifact.references  # noqa: B018
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return None
    return artifact


def find_artifact(store: Store, word: str, stage: str | None = None) -> Path:
    """The folder of the artifact whose key begins with `word` ("stage/key" is understood, too).

    Raises:
        SvlError: if there is none, or more than one.
    """
    prefix = word.rpartition("/")[2]
    stage = word.rpartition("/")[0] or stage
    check_store_exists(store)
    if stage is not None:
        one_of("stage", stage, list(SCHEMA))
    places = [folder for name in ([stage] if stage else SCHEMA) for folder in files_of_store(store.root, name)]
    found = [place for place in places if prefix and place.name.startswith(prefix)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(f"{p.parent.name}/{p.name}" for p in found[:8]) + (" ..." if len(found) > 8 else "")
        raise SvlError(f"'{word}' is the beginning of {len(found)} keys: {names}; give more of it")
    hint = did_you_mean(prefix, [p.name for p in places]) or f"; `svl-report ls stage={stage or 'run'}` lists them"
    raise SvlError(f"no {stage or 'artifact'} in {store.root} has a key that begins with '{word}'{hint}")


def format_listing(store: Store, stage: str | None, wanted: str | None) -> Iterator[str]:
    """Lines of text: what the store holds, per stage; of many, the newest, unless one stage or a word is asked for."""
    stages: dict[str, list[Artifact]] = defaultdict(list)
    for artifact in list_artifacts(store, stage):
        if wanted is None or wanted.lower() in str(artifact).lower():
            stages[artifact.stage].append(artifact)
    for name, found in stages.items():
        yield f"{name}: {len(found)}, {_total_size(found)}"
        few = found if stage or wanted else found[-SHOWN:]
        if len(few) < len(found):
            yield f"  ... {len(found) - len(few)} older ones (ls stage={name} shows all)"
        yield from (f"  {artifact}" for artifact in few)
    everything = [artifact for found in stages.values() for artifact in found]
    kind = f" with '{wanted}'" if wanted else ""
    plural = "" if len(everything) == 1 else "s"
    yield f"{len(everything)} artifact{plural}{kind} in {store.root}, {_total_size(everything)}"


def _total_size(artifacts: list[Artifact]) -> str:
    return humanize.naturalsize(sum(artifact.bytes for artifact in artifacts))


def format_artifact(store: Store, word: str) -> str:
    """One artifact's manifest, readable, with what uses it.

    Raises:
        SvlError: if there is no such artifact, or its manifest cannot be read.
    """
    folder = find_artifact(store, word)
    every = list(list_artifacts(store))
    artifact = next((a for a in every if a.path == folder), None)
    if artifact is None:
        raise SvlError(f"the manifest of {folder} is damaged; `svl-report gc` removes it, running again makes it anew")
    users = [f"{a.stage}/{a.key}" for a in every if artifact.key in a.references and a.path != folder]
    manifest = {k: v for k, v in artifact.manifest.items() if k != "digest"}
    manifest["files"] = {name: humanize.naturalsize(size) for name, (size, _) in manifest["files"].items()}
    body = yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    state = "intact" if store.read(folder, warn=False) else "DAMAGED: it counts as missing and is computed again"
    facts = f"{humanize.naturalsize(artifact.bytes)}, {humanize.naturaldelta(artifact.age)} old, {state}"
    head = f"{artifact.stage}/{artifact.key}: {artifact.summary}\n{facts}\n{folder}\n"
    return for_terminal(f"{head}\n{body}\nused by: {', '.join(users) or 'nothing'}")
