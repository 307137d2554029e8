"""A pruned checkpoint for others: a plain Hugging Face folder that needs no svl to load.

It is written to a temporary folder beside its destination and renamed when complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svl.core import Plan, SvlError

if TYPE_CHECKING:
    from svl.models import Lvlm

CARD = """---
library_name: transformers
tags: [short-lvlm, layer-pruning]
---
# {name}, {kept} of {total} decoder layers

Layers {removed} (0-based) of `{name}` were removed without training{changed} by [svl](https://arxiv.org/abs/2507.23362),
an implementation of Short-LVLM and its baselines. It loads with plain transformers:

```python
from transformers import {auto}, {preprocessor}
model = {auto}.from_pretrained("{folder}")
processor = {preprocessor}.from_pretrained("{folder}")
```

Plan:

```json
{plan}```
{results}"""


def key(path: Path | str) -> str | None:
    """The key of the run that exported to `path`; None if there is nothing, or something else."""
    file = Path(path).expanduser() / "config.json"
    try:
        return json.loads(file.read_text()).get("layer_pruning", {}).get("key")
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def check(path: Path | str) -> None:
    """Raise SvlError if `path` exists and is no checkpoint that a run exported (whose rerun may find it there)."""
    if Path(path).expanduser().exists() and key(path) is None:
        raise SvlError(f"export.path '{path}' exists already; it is never overwritten")


def save(
    pruned: Lvlm,
    plan: Plan,
    path: Path | str,
    results: dict[str, Any] | None = None,
    *,
    compensated: Sequence[str] = (),
    key: str | None = None,
) -> Path:
    """Write `pruned` (made by `surgery.apply` from `plan`), its processor and a model card to the new folder `path`.

    The plan is also in `config.json`, under `layer_pruning`, with the projections that were changed (`compensated`,
    as "<original layer>.<writer>") and the `key` of the run. `results` are benchmark scores for the card.

    Raises:
        SvlError: if `path` exists.
    """
    path = Path(path).expanduser().absolute()
    if path.exists():
        raise SvlError(f"export.path '{path}' exists already; it is never overwritten")
    temporary = path.with_name(f".{path.name}.incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        record = {**json.loads(plan.to_json()), "compensated": list(compensated), "key": key}
        pruned.model.config.layer_pruning = record
        pruned.model.save_pretrained(temporary)
        pruned.processor.save_pretrained(temporary)
        scores = "\nResults:\n\n```json\n" + json.dumps(results, indent=1) + "\n```\n" if results else ""
        changed = f", and {', '.join(compensated)} (layer.projection) were changed to make up for them,"
        card = CARD.format(
            name=pruned.name, kept=len(plan.kept), total=plan.n_layers, removed=list(plan.removed), folder=path.name,
            auto="AutoModelForImageTextToText" if pruned.sees else "AutoModelForCausalLM",
            preprocessor="AutoProcessor" if pruned.sees else "AutoTokenizer", plan=plan.to_json(), results=scores,
            changed=changed if compensated else "",
        )  # fmt: skip
        (temporary / "README.md").write_text(card)
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner alone
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return path
