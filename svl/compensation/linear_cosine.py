"""Cosine fit in place of a removed run (ReplaceMe, arXiv 2505.02819, the cosine variant).

T, from the identity, minimises by Adam the mean over tokens of 1 - cos(M T, h_e - h_s + M), or with `accurate` of
1 - cos(M T + h_s - M, h_e); M is what the MLP before the run [s, e) writes, and W_down <- T^T W_down.

Cost: one more pass over the calibration set, whose M, h_s and h_e are kept in the CPU's memory (12 d bytes per token
and run) and come to the device batch by batch, and the steps of the optimiser, with four d x d matrices on the device.
This is optimisation of d x d numbers per run, not training of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from svl.compensation.run_rows import Run, anchor_of, check_rows, notes_on_runs, stream_run_rows
from svl.core import Compensation, HiddenStates, Patch, Plan, SvlError, Update, check_count, check_number


@dataclass(frozen=True)
class LinearCosine(Compensation):
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
        check_rows(self.rows)
        check_number("compensation.lr", self.lr, above=0)
        check_count("compensation.epochs", self.epochs)
        check_count("compensation.batch", self.batch, least=1)
        check_count("compensation.seed", self.seed)

    def fit(self, hidden: HiddenStates, plan: Plan) -> Patch:
        """T - I of every removed run that has a kept layer before it.

        Raises:
            SvlError: if the model lacks the projection, or the selector leaves no token.
        """
        runs, notes = plan.runs_with_layer_before, notes_on_runs(plan)
        if not runs:
            return Patch(notes=notes)
        kept: dict[Run, list[torch.Tensor]] = {run: [] for run in runs}
        devices: dict[Run, torch.device] = {}
        for run, rows in stream_run_rows(hidden, plan, self.rows):
            states = torch.stack([rows.written, rows.before, rows.after], 1)
            kept[run].append(states[(rows.weights > 0).to(states.device)].cpu())
            devices[run] = states.device
        updates = {}
        for run, parts in kept.items():
            tokens = torch.cat(parts)
            if len(tokens) == 0:
                raise SvlError("the selector leaves no token for compensation; choose another selector, or rows=all")
            change = self._minimise(tokens, devices[run])
            updates[anchor_of(plan, run)] = Update(left=change.mT.float().cpu().contiguous())
        return Patch(updates, notes=notes)

    def _minimise(self, tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
        """T - I, computed on `device`, from rows (M, h_s, h_e): [n, 3, d], on the CPU."""
        d = tokens.shape[-1]
        generator = torch.Generator().manual_seed(self.seed)
        with torch.inference_mode(False), torch.enable_grad():
            change = torch.zeros(d, d, device=device, requires_grad=True)
            optimiser = torch.optim.Adam([change], lr=self.lr)
            for _ in range(self.epochs):
                for chosen in torch.randperm(len(tokens), generator=generator).split(self.batch):
                    written, before, after = tokens[chosen].to(device).clone().unbind(1)
                    moved = written + written @ change
                    pair = (moved + before - written, after) if self.accurate else (moved, after - before + written)
                    loss = 1 - F.cosine_similarity(*pair, dim=-1).mean()
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
        return change.detach()
