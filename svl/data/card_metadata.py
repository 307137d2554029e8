"""The YAML block at the top of a README.md of the hub: the metadata of a model or a data set."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from svl.core.errors import SvlError

LONGEST = 2**19  # characters
DEEPEST = 100  # lists in lists; the parser needs the square of that
FAST_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_metadata(readme: Path) -> dict[str, Any]:
    """The metadata of a card; empty if there is no card, or it has none.

    Raises:
        SvlError: if they are longer than any card's.
        OSError: if the file cannot be read.
        ValueError: if they are no YAML.
    """
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    try:
        with open(readme, encoding="utf-8-sig") as file:
            text = file.read(LONGEST)
            rest = file.read(1)
    except (FileNotFoundError, IsADirectoryError):
        return {}
    block = REGEX_YAML_BLOCK.search(text)
    if block is None:
        if rest and text.lstrip().startswith("---"):
            raise SvlError(f"'{readme}' has more than {LONGEST // 2**10} KB of metadata; shorten them")
        return {}
    steps = ((letter in "[{") - (letter in "]}") for letter in block[2] if letter in "[]{}")
    if (depth := max(accumulate(steps), default=0)) > DEEPEST:
        raise ValueError(f"lists are nested {depth} deep")
    try:
        found = yaml.load(block[2], FAST_YAML)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    return found if isinstance(found, dict) else {}
