"""A pruned checkpoint for others: a plain Hugging Face folder that needs no svl to load.

It is written to a temporary folder beside its destination and renamed when complete.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from svl.core import Plan, SvlError
from svl.models import Lvlm

CARD = """---
library_name: transformers
tags: [short-lvlm, layer-pruning]
---
# {name}, {kept} of {total} decoder layers

Layers {removed} (0-based) of `{name}` were removed without training by [svl](https://arxiv.org/abs/2507.23362),
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


def save(pruned: Lvlm, plan: Plan, path: Path | str, results: dict[str, Any] | None = None) -> Path:
    """Write `pruned` (made by `surgery.apply` from `plan`), its processor and a model card to the new folder `path`.

    `results` are benchmark scores for the card. The plan is also in `config.json`, under `layer_pruning`.

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
        pruned.model.config.layer_pruning = json.loads(plan.to_json())
        pruned.model.save_pretrained(temporary)
        pruned.processor.save_pretrained(temporary)
        scores = "\nResults:\n\n```json\n" + json.dumps(results, indent=1) + "\n```\n" if results else ""
        card = CARD.format(
            name=pruned.name, kept=len(plan.kept), total=plan.n_layers, removed=list(plan.removed), folder=path.name,
            auto="AutoModelForImageTextToText" if pruned.sees else "AutoModelForCausalLM",
            preprocessor="AutoProcessor" if pruned.sees else "AutoTokenizer", plan=plan.to_json(), results=scores,
        )  # fmt: skip
        (temporary / "README.md").write_text(card)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return path
