"""Write docs/reference_scores.md from experiments/paper/published_scores.csv.

python scripts/make_reference_scores.py
"""

from __future__ import annotations

from pathlib import Path

from tabulate import tabulate

from svl.report.published import TOLERANCE, PublishedScore, published_scores

PAGE = Path(__file__).parents[1] / "docs" / "reference_scores.md"
COLUMNS = ("benchmark", "model", "published", "protocol", "source")
HEAD = f"""# Published scores to check yourself against

**None of these numbers was measured with this code.** They are what others published, with the protocol as far as it is
known. Where a run's model is among them, `svl-report` prints them below its table, and a caution where the dense row
lies more than {TOLERANCE:g} points (of 100; MME: of 2,000) from all of them. What usually differs then:

* **Pictures.** LLaVA-1.5 pads pictures to a square with the mean colour; the processor of its copies on the hub crops.
* **System prompt.** LLaVA and Vicuna-based models were scored with one (`model.prompt=vicuna_v1`).
* **OCR tokens** in TextVQA's prompt (LLaVA's own numbers have them, lmms-eval's tasks do not).
* **Split or version.** VizWiz and DocVQA are often reported on the test server; SEED-Bench with or without video
  frames; MMBench has several releases.
* **Reading of answers.** Exact match, first letter, a judge, or the likelihood of the options.

Written by `scripts/make_reference_scores.py` from `experiments/paper/published_scores.csv`.
"""


def main() -> None:
    """Write the page."""
    parts = [HEAD]
    for model in dict.fromkeys(score.model for score in published_scores()):
        found = [score for score in published_scores() if score.model == model]
        rows = [[s.benchmark, _method(s), f"{s.value:g}", s.protocol, s.source] for s in found]
        table = tabulate(rows, COLUMNS, "github", disable_numparse=True)
        parts.append(f"\n## {model}\n\n{table}\n")
    PAGE.write_text("".join(parts), encoding="utf-8")


def _method(score: PublishedScore) -> str:
    return score.method if not score.layers_kept else f"{score.method}, {score.layers_kept} layers kept"


if __name__ == "__main__":
    main()
