"""Write the support table of docs/families.md from docs/families.json, the results of the family tests.

    python -m pytest tests/models/test_families.py tests/models/test_inputs.py \\
        tests/models/test_family_inputs.py tests/checkpoints/test_export.py \\
        --families docs/families.json
    python scripts/make_family_table.py

Nothing in the table is written by hand: a cell is what the tests of that family and column showed when they last ran.
"""

from __future__ import annotations

import json
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- table: scripts/make_family_table.py -->", "<!-- end of table -->"
COLUMNS = {
    "surgery": "surgery",
    "tis": "TIS",
    "compensation": "compensation",
    "export": "export",
    "several_images": "several images",
    "video": "video",
}
WORDS = {"exact": "yes", "refused": "refused", "none": "no", "text": "–", None: "not tested"}


def table(results: dict) -> str:
    """The table as Markdown: families by name, then the reasons of what is refused or protected."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"As last tested, with {versions}:",
        "",
        f"| family | decoder layers | {' | '.join(COLUMNS.values())} | protected layers |",
        "|---|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    reasons: dict[str, list[str]] = {}

    def mark(reason: str) -> str:
        """A footnote number."""
        return f"<sup>{list(reasons).index(reason) + 1}</sup>"

    for name, row in sorted(results["families"].items()):
        cells = []
        for column in COLUMNS:
            word = row.get(column)
            note = row.get(f"{column}_note") if word == "refused" else None
            if note := general(note, name):
                reasons.setdefault(note, []).append(name)
            cells.append(WORDS.get(word, f"**{word}**") + (mark(note) if note else ""))
        kept = []
        for layer, why in row.get("protected", {}).items():
            reasons.setdefault(why, []).append(name)
            kept.append(f"{layer}{mark(why)}")
        layers = f"`{row['layers']}`" if "layers" in row else "–"
        lines.append(f"| `{name}` | {layers} | {' | '.join(cells)} | {', '.join(kept) or '–'} |")
    notes = [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes])


def general(note: str | None, name: str) -> str | None:
    """A refusal without the names and numbers of the tiny model that it was tested on."""
    return note.partition("; ")[0].replace(f"'{name}' ", "the model ") if note else None


def main() -> None:
    """Replace the table in docs/families.md."""
    page = DOCS / "families.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    results = json.loads((DOCS / "families.json").read_text())
    page.write_text(f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
