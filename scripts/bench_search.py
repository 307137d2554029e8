"""Greedy search by loss: ours against the full model run again for every candidate. Prints ratios of one run.

    python scripts/bench_search.py --model svl:smollm2_135m --calibration svl/demo/text/calibration.jsonl

Both searches are SLEB (arXiv 2402.09025) on the same samples: at every step each layer still there, but for the first
and the last, is switched off in turn. `naive` switches layers to the identity and runs the whole model for each, with
the model's own loss; ours is `svl.probe.ModelProbe`. Nothing is rebuilt in either. A layer-forward is one sample
through one decoder layer. Steps alternate between the two, so that both see the same state of the machine.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from svl.calibration.removal_probe import ModelProbe
from svl.core import layers_to_remove
from svl.data.sample_files import read_samples
from svl.demo import bundled
from svl.models import loading, lvlm
from svl.models.sample_inputs import encode_answer
from svl.store.artifacts import Store


class Naive:
    """Every candidate with a forward pass of its own through everything."""

    def __init__(self, lvlm: lvlm.Lvlm, examples):
        self.lvlm, self.layer_forwards = lvlm, 0
        self.inputs = [encode_answer(lvlm, e) for e in examples]

    @torch.no_grad()
    def losses(self, removed, candidates):
        found = {}
        for i in candidates:
            gone, total, n = {*removed, i}, 0.0, 0
            forwards = {k: self.lvlm.layers[k].forward for k in gone}
            for k in gone:
                self.lvlm.layers[k].forward = lambda hidden_states, *_, **__: hidden_states
            for inputs, answer in self.inputs:
                labels = inputs["input_ids"].where(answer, torch.full_like(inputs["input_ids"], -100))
                size = int((labels[:, 1:] >= 0).sum())
                total += float(self.lvlm.model(**inputs, labels=labels, use_cache=False).loss) * size
                n += size
                self.layer_forwards += len(self.lvlm.layers) - len(gone)
            for k, forward in forwards.items():
                self.lvlm.layers[k].forward = forward
            found[i] = total / n
        return None, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint folder, hub id or svl:NAME")
    parser.add_argument("--calibration", required=True, type=Path)
    parser.add_argument("--store", type=Path, default=Path("outputs/store"), help="where svl:NAME is assembled")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=0.25)
    arguments = parser.parse_args()

    path = bundled.resolve_bundled(arguments.model, Store(arguments.store))
    lvlm = loading.load(path, dtype="float32", device="cpu", name=arguments.model.rpartition(":")[2])
    examples = read_samples(arguments.calibration, arguments.samples)
    n_layers, n = lvlm.anatomy.n_layers, layers_to_remove(arguments.ratio, lvlm.anatomy.n_layers)
    searches = {"naive": Naive(lvlm, examples.samples), "ours": ModelProbe(lvlm, examples)}
    removed: dict[str, list[int]] = {name: [] for name in searches}
    seconds = dict.fromkeys(searches, 0.0)
    print(f"{lvlm.name}: {n} of {n_layers} layers, {len(examples)} samples, {torch.get_num_threads()} threads")
    for step in range(n):
        for name, search in searches.items():
            alive = [i for i in range(n_layers) if i not in removed[name]]
            began = time.perf_counter()
            _, losses = search.losses(removed[name], [i for i in alive[1:-1] if i in lvlm.anatomy.removable])
            seconds[name] += time.perf_counter() - began
            removed[name].append(min(losses, key=lambda i: (losses[i], -i)))
        print(f"step {step + 1}: " + ", ".join(f"{k} removes {v[-1]} ({seconds[k]:.1f} s)" for k, v in removed.items()))
    work = {name: search.layer_forwards for name, search in searches.items()}
    print(f"same layers: {removed['naive'] == removed['ours']} ({removed['ours']})")
    print(f"layer-forwards: naive {work['naive']}, ours {work['ours']}, ratio {work['naive'] / work['ours']:.2f}")
    naive, ours = seconds.values()
    print(f"seconds: naive {naive:.1f}, ours {ours:.1f}, ratio {naive / ours:.2f}")


if __name__ == "__main__":
    main()
