"""The `svl-export` command: a pruned checkpoint from a plan and a checkpoint on disk."""

from __future__ import annotations

import json
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from svl.checkpoints import export, hub
from svl.checkpoints.export import ExportRecord
from svl.core.errors import SvlError, explained
from svl.core.patch import Patch
from svl.core.plan import Plan
from svl.models.options import LoadOptions
from svl.text.command_line import CommandLineParser, run_command

log = logging.getLogger(__name__)
PATCH, TRAINED = "patch/{}/patch.safetensors", "recover/{}/trained.safetensors"  # in the store of a run, by key
Changes = dict[str, Path | None]  # files by option: patch, trained
REMOVED = ("removed", "removed_attn", "removed_mlp")  # of a plan's JSON
DESCRIPTION = """A pruned checkpoint from a plan and a checkpoint on disk.

No model is loaded: tensors that stay are copied as bytes under their new names. The source is only read.

  svl-export plan=plan.json source=llava-hf/llava-1.5-7b-hf out=pruned

The layers of a run are in its folder's plan.json, the weights that it changed in its store (outputs/store, or
SVL_STORE) under the keys that its result.json lists: they are taken, too, if they are found.

A checkpoint whose weights are pickles (pytorch_model.bin) has to be converted first:

  svl-export convert source=Qwen/Qwen-VL-Chat out=converted"""
CONVERT_DESCRIPTION = """A checkpoint whose weights are pickles (.bin) as one of safetensors files, tensor by tensor.

No code in the pickles runs. The folder appears whole or not at all.

  svl-export convert source=Qwen/Qwen-VL-Chat out=converted"""


def command_parser() -> CommandLineParser:
    """The options of `svl-export`."""
    parser = CommandLineParser("svl-export", description=DESCRIPTION)
    parser.add_argument("--plan", metavar="FILE", required=True, help="which layers go, as JSON (plan.json of a run)")
    parser.add_argument("--source", metavar="DIR|ID", required=True, help="dense checkpoint: a folder or a hub id")
    parser.add_argument("--out", metavar="DIR", required=True, help="the folder to make")
    parser.add_argument("--patch", metavar="FILE", help=f"what compensation has changed (STORE/{PATCH.format('KEY')})")
    parser.add_argument("--trained", metavar="FILE", help=f"what recovery has trained (STORE/{TRAINED.format('KEY')})")
    parser.add_argument(
        "--protect",
        metavar="auto|none",
        default="auto",
        help="whether layers that others depend on must stay (default: auto, which refuses plans that remove them)",
    )
    parser.add_argument("--shard-size", metavar="SIZE", default="5GB", help="largest weights file (default: 5GB)")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the result to this repository")
    parser.add_argument("--layers", metavar="PATH", help="dotted path of the decoder layers, if it is not found")
    parser.add_argument("--revision", metavar="NAME", help="hub branch, tag or commit of the source")
    parser.add_argument("--name", help="of the dense model, in the card (default: the last part of the source)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the checkpoint")
    return parser


def convert_parser() -> CommandLineParser:
    """The options of `svl-export convert`."""
    parser = CommandLineParser("svl-export convert", description=CONVERT_DESCRIPTION)
    parser.add_argument("--source", metavar="DIR|ID", required=True, help="checkpoint of pickles: a folder or a hub id")
    parser.add_argument("--out", metavar="DIR", required=True, help="the folder to make")
    parser.add_argument("--revision", metavar="NAME", help="hub branch, tag or commit of the source")
    return parser


def convert_checkpoint(args: Namespace) -> None:
    """What `svl-export convert` does.

    Raises:
        SvlError: on bad input.
    """
    from svl.checkpoints.conversion import convert

    print(f"converted to {convert(args.source, args.out, args.revision)}")


def export_checkpoint(args: Namespace) -> None:
    """What `svl-export` does.

    Raises:
        SvlError: on bad input, before anything is written.
    """
    from svl.pruning import patch_file

    file = Path(args.plan).expanduser()
    with explained(f"plan: cannot read '{file}'"):
        plan = Plan.from_json(file.read_text(encoding="utf-8"))
    result = result_beside_plan(file, plan)
    given = {"patch": args.patch, "trained": args.trained}
    changes = changes_of_run(
        result, file, {name: Path(text).expanduser() if text else None for name, text in given.items()}
    )
    patch = patch_file.load_patch(changes["patch"]) if changes["patch"] else None
    if changes["trained"]:
        patch = replace(patch or Patch(), trained=patch_file.load_trained(changes["trained"]))
    if args.push_to_hub:
        hub.check_hub_access(args.push_to_hub)
    options = LoadOptions(
        revision=args.revision,
        layers=args.layers,
        protect=args.protect,
        name=args.name,
        trust_remote_code=args.trust_remote_code,
    )
    scored = result if is_of_run(result, changes) else None
    record = ExportRecord(scored, image_processor=image_settings(result))
    path = export.save(args.source, plan, args.out, patch, options, shard_size=args.shard_size, record=record)
    print(f"exported to {path}")
    if args.push_to_hub:
        print(f"uploaded to {hub.push_to_hub(path, args.push_to_hub)}")


def result_beside_plan(file: Path, plan: Plan) -> dict[str, Any] | None:
    """The result.json of the run whose plan.json `file` is, if it lies there."""
    try:
        result = json.loads(file.with_name("result.json").read_text(encoding="utf-8"))
        theirs, ours = result["plan"], json.loads(plan.to_json())
        is_same = all((theirs.get(name) or []) == (ours.get(name) or []) for name in REMOVED)
        return result if file.name == "plan.json" and is_same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def changes_of_run(result: dict[str, Any] | None, file: Path, given: Changes) -> Changes:
    """Files with what was changed of weights that stay: those given, else those of the run whose plan `file` is.

    A checkpoint of a run's plan has the weights that the run scored. They are looked for in SVL_STORE, in
    outputs/store and in a folder `store` beside any of those above the plan.

    Raises:
        SvlError: if the run with this result compensated or trained, and the files of that are neither given nor found.
    """
    result, found, missing = result or {}, dict(given), []
    stores = [Path(os.environ.get("SVL_STORE", "outputs/store"))]
    stores += [folder / "store" for folder in file.absolute().parents]
    for name, stored, stage, has_changed in (
        ("patch", PATCH, "compensate", result.get("compensated")),
        ("trained", TRAINED, "recover", (result.get("training") or {}).get("steps")),
    ):
        if given[name] or not has_changed:
            continue
        key = ((result.get("keys") or {}).get(stage) or ["KEY"])[0]
        places = [store / stored.format(key) for store in stores]
        found[name] = next((place for place in places if place.is_file()), None)
        if found[name]:
            print(f"with {name}={found[name]}, as the run of this plan")
        else:
            missing.append(f"{name}={places[0]}")
    if missing:
        raise SvlError(
            f"the run of this plan changed weights that stay, too: add {' '.join(missing)} (from the run's store), or "
            "export from a copy of plan.json in another folder, without the run's results, to remove layers only"
        )
    return found


def is_of_run(result: dict[str, Any] | None, changes: Changes) -> bool:
    """Whether these are the changed weights of the run with this result, by the keys that they are stored under.

    If not, its scores are another model's, which is told.
    """
    keys, stages = (result or {}).get("keys") or {}, {"patch": "compensate", "trained": "recover"}
    others = [
        str(file)
        for name, file in changes.items()
        if file and file.absolute().parent.name not in keys.get(stages[name], ())
    ]
    if result and others:
        log.warning("not from this plan's run, so the card tells none of its results: %s", ", ".join(others))
    return not others


def image_settings(result: dict[str, Any] | None) -> dict[str, Any]:
    """The settings of the image processor that a run of this result had."""
    settings = ((result or {}).get("settings") or {}).get("model") or {}
    return settings.get("image_processor") or {}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: mistakes in the input become one line and exit code 1; bugs keep their traceback."""
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if words[0] == "convert":
        sys.exit(
            run_command("svl-export", lambda: convert_checkpoint(convert_parser().parse_args(words[1:] or ["-h"])))
        )
    sys.exit(run_command("svl-export", lambda: export_checkpoint(command_parser().parse_args(words))))


if __name__ == "__main__":
    main()
