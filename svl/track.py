"""Mirrors of a run for people to look at: Weights & Biases, or nothing. The store stays the truth.

* `Tracker` is all the pipeline knows: start, log, finish. No tracker is `NullTracker`, never an `if`.
* Nothing is ever read back from a tracker, and no failure of one may cost a result: `WandbTracker` warns once, with
  the reason, and is silent from then on.
* Nothing else in svl imports wandb, and this module does so only when a run starts.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from svl.core import one_of

log = logging.getLogger(__name__)

INIT_TIMEOUT = 30.0  # seconds an unreachable W&B server may hold up an online run (W&B's own default is 90)


class Tracker(Protocol):
    """What the pipeline tells about a run. No method raises because of the tracker's own troubles."""

    @property
    def location(self) -> str | None:
        """Where the mirror of this run is (folder or URL); None before `start`, and if there is none or it failed."""
        ...

    @property
    def failed(self) -> bool:
        """Whether the mirror of this run broke: tracking it is worth another try."""
        ...

    def start(
        self, config: dict[str, Any], *, name: str, group: str, tags: Sequence[str], key: str, folder: Path
    ) -> None:
        """Open a run.

        Args:
            config: resolved settings of the run, plain nested values.
            name: readable name, e.g. "demo_lvlm-short_lvlm-r0.25".
            group: name of the sweep.
            tags: short labels, e.g. "strategy:short_lvlm".
            key: key of the result in the store; one key, one run.
            folder: output folder of the run.
        """
        ...

    def log(self, result: dict[str, Any], figures: Mapping[str, Path] | None = None) -> None:
        """Mirror a result (the content of result.json) and `figures`, PNG files by title."""
        ...

    def finish(self, ok: bool) -> None:
        """Close the run; `ok=False` marks it as failed."""
        ...


@dataclass(frozen=True)
class NullTracker:
    """No tracking."""

    location: str | None = field(default=None, init=False)
    failed: bool = field(default=False, init=False)

    def start(
        self, config: dict[str, Any], *, name: str, group: str, tags: Sequence[str], key: str, folder: Path
    ) -> None:
        """Nothing."""

    def log(self, result: dict[str, Any], figures: Mapping[str, Path] | None = None) -> None:
        """Nothing."""

    def finish(self, ok: bool) -> None:
        """Nothing."""


def summary(result: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a result under its W&B name; missing values are left out.

    `eval/<task>/<metric>`, `eval/average`, `eval/retained`, `cost/<x>`, `prune/ratio`, `prune/n_remove`,
    `seconds/<stage>`.
    """
    numbers = {
        f"eval/{task}/{metric}": estimate["value"]
        for task, score in result["scores"].items()
        for metric, estimate in score["metrics"].items()
    }
    numbers |= {f"eval/{name}": result[name]["value"] for name in ("average", "retained") if result[name]}
    numbers |= {f"prune/{name}": result[name] for name in ("ratio", "n_remove")}
    numbers |= {f"{group}/{name}": value for group in ("cost", "seconds") for name, value in result[group].items()}
    return {name: value for name, value in numbers.items() if value is not None}


@dataclass
class WandbTracker:
    """Weights & Biases.

    `entity=None` leaves the choice to W&B (its environment variable or the account). `mode` is offline, online or
    disabled; the environment variable WANDB_MODE, where set, goes first. An offline run lies in `<folder>/wandb` and
    is uploaded with `wandb sync`.

    Raises:
        SvlError: if `mode` is none of the three.
    """

    project: str = "short-lvlm"
    entity: str | None = None
    mode: str = "offline"
    location: str | None = field(default=None, init=False)
    failed: bool = field(default=False, init=False)
    _run: Any = field(default=None, init=False, repr=False, compare=False)  # None: not started, failed or finished

    def __post_init__(self) -> None:
        one_of("tracker.mode", self.mode, ("offline", "online", "disabled"))

    def start(
        self, config: dict[str, Any], *, name: str, group: str, tags: Sequence[str], key: str, folder: Path
    ) -> None:
        """Open the run `key` of `group`; see `Tracker.start`."""
        self._run, self.location, self.failed = None, None, False
        with self._never_fail("start"):
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # or W&B reports its crashes to a server of its own
            import wandb

            mode = os.environ.get("WANDB_MODE") or self.mode
            folder.mkdir(parents=True, exist_ok=True)  # or W&B would write to the temporary directory
            wandb.setup(wandb.Settings(silent=True))  # process-wide, so that a batch job is never asked to log in
            run = wandb.init(
                project=self.project,
                entity=self.entity,
                mode=mode,  # type: ignore[arg-type]  # WANDB_MODE is W&B's to check
                dir=str(folder),
                id=key,
                resume="allow" if mode == "online" else None,  # offline there is nothing to resume, W&B would warn
                reinit="finish_previous",
                group=group[:128],  # W&B's limits: a longer name or tag is an error there
                name=name[:128],
                tags=[tag[:64] for tag in tags],
                job_type="prune",
                config=config,
                settings=wandb.Settings(
                    silent=True,
                    console="off",  # run.log has it
                    x_disable_stats=True,  # runs take minutes; `seconds/*` and `cost/*` tell more
                    disable_git=True,
                    save_code=False,
                    init_timeout=INIT_TIMEOUT,
                ),
            )
            if not run.disabled:
                self._run, self.location = run, run.url or run.settings.sync_dir

    def log(self, result: dict[str, Any], figures: Mapping[str, Path] | None = None) -> None:
        """Mirror a result, the numbers first: whatever fails after them, they are in the run."""
        if self._run is None:
            return
        with self._never_fail("log"):
            import wandb

            run, plan = self._run, result["plan"]
            run.summary.update(summary(result))

            removed = set(plan["removed"])
            layers = [
                [i, (plan["importance"] or [None] * plan["n_layers"])[i], i in removed] for i in range(plan["n_layers"])
            ]
            run.define_metric("layer", summary="none")
            run.define_metric("layers/*", step_metric="layer", summary="none")
            for i, importance, gone in layers:
                point = {"layer": i, "layers/removed": int(gone)}
                run.log(point if importance is None else point | {"layers/importance": importance})
            for title, path in (figures or {}).items():
                run.log({f"figures/{title}": wandb.Image(str(path))})

            # The file stays in the run's folder: W&B's own copy would be gone before an offline run is uploaded.
            file = Path(run.dir) / "plan.json"
            file.write_text(json.dumps(plan, indent=1) + "\n")
            artifact = wandb.Artifact(f"plan-{run.id}", type="plan")
            artifact.add_file(str(file), policy="immutable", skip_cache=True)
            run.log_artifact(artifact)
            # Last, because W&B stages tables in the home directory, which on clusters may be read-only.
            run.log({"layers": wandb.Table(columns=["layer", "importance", "removed"], data=layers)})

    def finish(self, ok: bool) -> None:
        """Close the run, as failed unless `ok`; a second call does nothing."""
        if self._run is None:
            return
        with self._never_fail("finish"):
            run, self._run = self._run, None
            run.finish(exit_code=0 if ok else 1)

    @contextmanager
    def _never_fail(self, doing: str) -> Iterator[None]:
        """Turn any exception into one warning and an inactive tracker."""
        try:
            yield
        # Deliberately broad: a mirror that breaks (no disk, no server, no login, an interface that changed) must not
        # take hours of computed results with it.
        except Exception as error:  # noqa: BLE001
            self._run = self.location = None
            self.failed = True
            reason = " ".join(str(error).split()) or type(error).__name__
            log.warning("W&B failed to %s, so this run is not tracked any further; results are kept: %s", doing, reason)
