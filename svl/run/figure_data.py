"""What stages keep for figures: token scores of one example, spectra of a compensation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svl.core import Patch, Stats, checked_weights

if TYPE_CHECKING:
    from svl.data.samples import Samples
    from svl.models.lvlm import Lvlm

SPECTRUM = 128  # singular values of a compensation that are kept


def write_example_picture(lvlm: Lvlm, samples: Samples, folder: Path) -> None:
    """Write the first picture of the samples (example.png), if its visual tokens form one grid, and example.json."""
    from svl.models.sample_inputs import encode_samples

    sample = next((s for s in samples if s.images and not s.frames), None)
    if sample is None or not lvlm.takes_images:
        return
    inputs, _, visual = encode_samples(lvlm, [sample])
    if not bool(visual.any()):
        return
    n, rest = divmod(int(visual.sum()), len(sample.images))  # of the first of its pictures, if all are alike
    grid = [math.isqrt(n)] * 2
    if (thw := inputs.get("image_grid_thw")) is not None:  # frames, rows, columns of patches, merged into tokens
        merge = math.isqrt(int(thw.prod(-1).sum()) // int(visual.sum()))
        grid = [int(thw[0, 1]) // merge, int(thw[0, 2]) // merge]
        n, rest = grid[0] * grid[1], 0
    if rest or grid[0] * grid[1] != n:
        return  # tiles and thumbnails have no plain grid
    tokens = lvlm.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0][~visual[0]].tolist())
    record = {"row": sample.row, "prompt": sample.prompt, "grid": grid, "tokens": tokens}
    (folder / "example.json").write_text(json.dumps(record))
    sample.pictures[0].save(folder / "example.png")


def write_token_scores(stats: Stats, calibrated: Path, folder: Path) -> None:
    """Add the selector's scores to the example that calibration kept in `calibrated`; the result goes to `folder`."""
    file = calibrated / "example.json"
    if stats.selector is None or not file.exists():
        return
    example = json.loads(file.read_text())
    trace = next(t for t in stats.traces if t.index == example["row"])
    weights, scores = checked_weights(stats.selector, trace, stats.n_layers), stats.selector.scores(trace)
    if weights.ndim == 2:
        weights = weights.mean(0)
    if scores.ndim == 2:
        scores = scores.mean(0)
    text = zip(example.pop("tokens"), scores[~trace.visual].tolist(), weights[~trace.visual].tolist(), strict=True)
    first = math.prod(example["grid"])
    example["visual"] = scores[trace.visual][:first].tolist()
    example["visual_selected"] = weights[trace.visual][:first].tolist()
    example["text"] = [list(row) for row in text]
    (folder / "example.json").write_text(json.dumps(example))


def spectra_record(patch: Patch) -> dict[str, dict[str, Any]]:
    """Of a patch's spectra by layer: the largest `values`, their number `of`, and the sum of all `squares`."""
    return {
        str(layer): {
            "values": [float(f"{value:.4g}") for value in values[:SPECTRUM]],
            "of": len(values),
            "squares": sum(value * value for value in values),
        }
        for layer, values in patch.spectra.items()
    }
