"""Cosine fit in place of a removed run (ReplaceMe, arXiv 2505.02819, the cosine variant).

T, from the identity, minimises by Adam the mean over tokens of 1 - cos(M T, h_e - h_s + M), or with `accurate` of
1 - cos(M T + h_s - M, h_e); M is what the MLP before the run [s, e) writes, and W_down <- T^T W_down.

Cost: one more pass over the calibration set, whose M, h_s and h_e are kept (12 d bytes per token and run), and the
steps of the optimiser. This is optimisation of d x d numbers per run, not training of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from svl.core import Hidden, Patch, Plan, SvlError, Update, one_of


@dataclass(frozen=True)
class LinearCosine:
    """One d x d map per removed run, by cosine.

    Attributes:
        lr: learning rate of Adam.
        epochs: passes over the tokens.
        batch: tokens per step.
        accurate: compare the stream after the run, not the update.
        rows: selected (tokens of weight above 0) | all.
        seed: of the order of tokens.
    """

    lr: float = 1e-4
    epochs: int = 10
    batch: int = 1024
    accurate: bool = False
    rows: str = "all"
    seed: int = 0
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def __post_init__(self) -> None:
        one_of("compensation.rows", self.rows, ("selected", "all"))
        if self.epochs < 0 or self.batch < 1 or self.lr <= 0:
            raise SvlError("compensation.epochs must be at least 0, batch at least 1, lr above 0")

    def fit(self, hidden: Hidden, plan: Plan) -> Patch:
        """T - I of every removed run that has a kept layer before it.

        Raises:
            SvlError: if the model lacks the projection, or the selector leaves no token.
        """
        one_of("the writer that compensation needs", "mlp", tuple(hidden.writers))
        runs = [(start, stop) for start, stop in plan.runs if start > 0]
        notes = () if len(runs) == len(plan.runs) else ("no layer before layer 0: its run is not compensated",)
        rows: dict[tuple[int, int], list[torch.Tensor]] = {run: [] for run in runs}
        if runs:
            points = sorted({i for run in runs for i in run})
            for sample in hidden.stream(points, [(s - 1, "mlp") for s, _ in runs]):
                for start, stop in runs:
                    w = sample.weights if sample.weights.ndim == 1 else sample.weights[start - 1]
                    use = w > 0 if self.rows == "selected" else torch.ones_like(w, dtype=torch.bool)
                    states = sample.wrote(start - 1, "mlp"), sample.h(start), sample.h(stop)
                    rows[start, stop].append(torch.stack(states, 1)[use.to(states[0].device)])
        updates = {}
        for run, parts in rows.items():
            tokens = torch.cat(parts)
            if len(tokens) == 0:
                raise SvlError("the selector leaves no token for compensation; choose another selector, or rows=all")
            updates[run[0] - 1, "mlp"] = Update(left=(self._minimise(tokens)).mT.float().cpu().contiguous())
        return Patch(updates, notes=notes)

    def _minimise(self, tokens: torch.Tensor) -> torch.Tensor:
        """T - I from rows (M, h_s, h_e): [n, 3, d]."""
        d, device = tokens.shape[-1], tokens.device
        generator = torch.Generator().manual_seed(self.seed)
        with torch.inference_mode(False), torch.enable_grad():
            change = torch.zeros(d, d, device=device, requires_grad=True)
            optimiser = torch.optim.Adam([change], lr=self.lr)
            for _ in range(self.epochs):
                for chosen in torch.randperm(len(tokens), generator=generator).split(self.batch):
                    written, before, after = tokens[chosen.to(device)].clone().unbind(1)
                    moved = written + written @ change
                    pair = (moved + before - written, after) if self.accurate else (moved, after - before + written)
                    loss = 1 - F.cosine_similarity(*pair, dim=-1).mean()
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
        return change.detach()
