"""A W&B workspace in which strategies are compared: `python scripts/wandb_workspace.py entity=TEAM [project=NAME]`.

Saves it to the server that `wandb login` knows and prints its address; needs `pip install wandb-workspaces`. Panels
read the names that svl/trackers/record.py gives to the numbers of a run.
"""

from __future__ import annotations

import sys

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws


def workspace(entity: str, project: str = "short-lvlm") -> ws.Workspace:
    """Quality against ratio and cost, and curves over layers."""
    summary = wr.SummaryMetric
    quality = [
        wr.ScatterPlot(title=title, x=summary(x), y=summary("eval/retained"))
        for title, x in (("retained by ratio", "prune/ratio"), ("retained by parameters", "cost/params"))
    ]
    quality.append(wr.BarPlot(title="average", metrics=["eval/average"], groupby="strategy._target_"))
    curves = [
        wr.LinePlot(title=name, x="layer", y=[f"layers/{name}"], smoothing_factor=0)
        for name in ("importance", "cosine", "removed")
    ]
    sections = [("Comparison", quality), ("Layers", curves)]
    return ws.Workspace(
        name="svl: strategies",
        entity=entity,
        project=project,
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections],
    )


if __name__ == "__main__":
    words = dict(word.partition("=")[::2] for word in sys.argv[1:])
    if "entity" not in words or words.keys() - {"entity", "project"}:
        sys.exit("usage: wandb_workspace.py entity=USER-OR-TEAM [project=NAME]")
    shown = workspace(**words)
    shown.save()
    print(shown.url)
