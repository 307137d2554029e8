"""Write texts that a dense model writes by itself, as data for recovery without any: a JSON line each.

    python scripts/make_generated_texts.py --model svl:smollm2_135m --texts 1024 --out data/recovery/own_texts.jsonl

They are what `calibration.generated` fits compensations to (`svl.calibration.generated_texts`): sampled at temperature
1, each from one random token. `recovery.data.path=FILE` trains on them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import svl
from svl.calibration.generated_texts import generate_texts
from svl.demo.bundled import resolve_bundled
from svl.store.artifacts import Store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder, hub id, or svl:NAME of a bundled model")
    parser.add_argument("--texts", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=128, help="of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--store", type=Path, default=Path("outputs/store"), help="where bundled models are assembled")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    lvlm = svl.load(resolve_bundled(args.model, Store(args.store)), dtype=args.dtype)
    texts = generate_texts(lvlm, args.texts, args.tokens, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


if __name__ == "__main__":
    main()
