"""Stage `texts`: what the dense model writes by itself, once for a model, kept in the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svl.data.samples import Sample, Samples
from svl.run.early_checks import check_recovery
from svl.run.keys import stage_code
from svl.run.stages import make_stage
from svl.text.progress import show_progress

if TYPE_CHECKING:
    from svl.run.setup import RunSetup
    from svl.store.artifacts import Entry

FILE = "texts.json"


def make_texts(setup: RunSetup) -> Entry | None:
    """The artifact; None if no compensation is fitted to texts."""
    calibration, n = setup.cfg.calibration, setup.generated
    if not n:
        return None

    def build(folder: Path) -> dict[str, Any]:
        from svl.calibration.generated_texts import generate_texts

        check_recovery(setup)
        texts = generate_texts(setup.dense, n, calibration.generated_tokens, calibration.seed, show_progress)
        (folder / FILE).write_text(json.dumps(texts, indent=0) + "\n")
        return {"texts": len(texts)}

    inputs = {
        "model": setup.model,
        "code": stage_code("texts"),
        "texts": n,
        "tokens": calibration.generated_tokens,
        "seed": calibration.seed,
    }
    return make_stage(setup, "texts", inputs, build)


def read_texts(entry: Entry | None) -> Samples:
    """The texts of the artifact as samples; no samples without one."""
    if entry is None:
        return Samples("", ())
    texts = json.loads((entry.path / FILE).read_text())
    name = "the model's own texts"
    return Samples(name, tuple(Sample(row, text, plain=True, source=name) for row, text in enumerate(texts)))
