"""Write the bundled prose: svl/demo/text/*.jsonl, from two books of Project Gutenberg.

    python scripts/make_prose_data.py 1661.txt 1404.txt

The books are The Adventures of Sherlock Holmes (A. C. Doyle, 1892; eBook 1661) and The Federalist Papers (A. Hamilton,
J. Madison, J. Jay, 1788; eBook 1404), both in the public domain. Passages are whole paragraphs, unwrapped, of 1,000 to
1,600 characters. Calibration takes passages of stories I to VIII; `fiction` (in its domain) of stories IX to XII;
`essays` (out of its domain) of the Federalist. Order is random by one seed, so that the first n are a fair sample.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "svl" / "demo" / "text"
SIZES = {"calibration": 192, "fiction": 40, "essays": 40}


def passages(text: str) -> Iterator[str]:
    """Passages of whole paragraphs; headings and lists divide them."""
    passage = ""
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split()).replace("--", " - ").replace("_", "")
        if paragraph[:40].isupper() or not paragraph.isascii() or block.startswith("  "):
            passage = ""
            continue
        passage = f"{passage}\n\n{paragraph}".strip()
        if len(passage) >= 1000:
            if len(passage) <= 1600:
                yield passage
            passage = ""


def body(file: Path) -> str:
    """A book without the notes before and after it."""
    text = file.read_text("ascii").replace("\r", "")
    return re.split(r"\*\*\* (?:START|END) OF .*", text)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("holmes", type=Path)
    parser.add_argument("federalist", type=Path)
    arguments = parser.parse_args()
    early, late = re.split(r"\nIX\. THE ADVENTURE OF THE ENGINEER", body(arguments.holmes))
    sources = {"calibration": early, "fiction": late, "essays": body(arguments.federalist)}
    FOLDER.mkdir(exist_ok=True)
    for number, (name, text) in enumerate(sources.items()):
        chosen = random.Random(number).sample(list(passages(text)), SIZES[name])
        book = "The Federalist Papers" if name == "essays" else "The Adventures of Sherlock Holmes"
        lines = [json.dumps({"text": passage, "source": book}) for passage in chosen]
        (FOLDER / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
