"""What the folder of a store looks like: its marker, stages, keys and scratch. Nothing else in it is ever touched."""

from __future__ import annotations

import json
import re
from pathlib import Path

from svl.core.errors import SvlError
from svl.store.files import write_text_whole
from svl.store.locks import UNIQUE

MARKER = "svl-store.json"
FORMAT = 1  # raise it when what this module describes changes

# Raise a stage's number when its meaning changes: older artifacts are then no longer found.
SCHEMA = {
    "checkpoint": 1,
    "data": 1,
    "stats": 1,
    "texts": 1,
    "probe": 1,
    "plan": 2,
    "patch": 1,
    "recover": 1,
    "overlap": 1,
    "check": 2,
    "score": 1,
    "efficiency": 1,
    "run": 1,
    "gap": 1,
    "track": 1,
}

SCRATCH, LOCKS, IN_USE, FINGERPRINTS = "tmp", "lock", "in-use", "fingerprint"
UNFINISHED = "unfinished"  # what builders of long stages keep, to go on after they were killed

_KEY = "[0-9a-f]{16}"
_ARTIFACT = f"(?:{'|'.join(SCHEMA)})-{_KEY}"
# What may lie in the folders of a store: names of finished artifacts, and of scratch (also that of older versions).
_NAMES = {
    **dict.fromkeys(SCHEMA, _KEY),
    SCRATCH: rf"{_ARTIFACT}(\.{UNIQUE})?|[a-z]+\.{UNIQUE}|(served|together)-[0-9]+|removed-{_KEY}-[0-9]+",
    UNFINISHED: _ARTIFACT,
    LOCKS: rf"({_ARTIFACT}|gc-[0-9]+)(\.marker)?",
    IN_USE: rf"{UNIQUE}(\.marker|\.keys)?",
    FINGERPRINTS: r"[0-9a-f]{16}(\.[0-9]+)?|\..*",
}


def files_of_store(root: Path, kind: str) -> list[Path]:
    """What lies in the folder of a stage or kind of scratch under a name of the store's own, sorted."""
    names = re.compile(_NAMES[kind])
    return sorted(path for path in (root / kind).glob("*") if names.fullmatch(path.name))


def lock_name(stage: str, key: str) -> str:
    """The lock of an artifact."""
    return f"{stage}-{key}"


def lock_of_scratch(name: str) -> str | None:
    """The lock that the writer of an artifact in `tmp` holds; None for other scratch."""
    found = re.match(rf"{_ARTIFACT}(?=\.|$)", name)
    return found[0] if found else None


def is_marked(root: Path) -> bool:
    """Whether a folder is marked as a store.

    Raises:
        SvlError: if the mark cannot be read, or is of a format that this version does not know.
    """
    try:
        text = (root / MARKER).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise SvlError(f"cannot read '{root / MARKER}': {error.strerror or error}") from error
    try:
        number = json.loads(text)["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SvlError(f"'{root / MARKER}' is damaged; it should read {_mark()}") from error
    if number != FORMAT:
        raise SvlError(f"the store {root} is of format {number}, but this version of svl knows format {FORMAT}")
    return True


def mark_store(root: Path) -> None:
    """Mark a folder as a store, unless it is: one that is new, empty, or holds nothing but what a store does.

    Raises:
        SvlError: if it holds anything else.
    """
    if is_marked(root):
        return
    if foreign := _first_foreign(root):
        raise SvlError(
            f"'{root}' is no store: it holds '{foreign.relative_to(root)}'; name a new or empty folder with "
            f"paths.store= or SVL_STORE (or if it is one all the same: {_how_to_mark(root)})"
        )
    root.mkdir(parents=True, exist_ok=True)
    write_text_whole(root / MARKER, _mark() + "\n")


def check_marked(root: Path) -> None:
    """Raise SvlError unless a folder is marked as a store, saying how to mark it."""
    if not is_marked(root):
        raise SvlError(
            f"'{root}' is not marked as a store, so nothing in it is removed; if it is one, mark it: "
            f"{_how_to_mark(root)}"
        )


def _first_foreign(root: Path) -> Path | None:
    """Something in a folder that no store has; hidden files do not count."""
    for folder in sorted(root.glob("*")):
        if folder.name.startswith(".") or folder.name == MARKER:  # which another process may have written just now
            continue
        if folder.name not in _NAMES or not folder.is_dir():
            return folder
        known = set(files_of_store(root, folder.name))
        for path in sorted(folder.glob("*")):
            if path not in known and not path.name.startswith("."):
                return path
    return None


def _mark() -> str:
    return json.dumps({"format": FORMAT})


def _how_to_mark(root: Path) -> str:
    return f"echo '{_mark()}' > '{root / MARKER}'"
