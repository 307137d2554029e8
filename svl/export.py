"""A pruned checkpoint for others: from a plan and a checkpoint on disk to a new one, which needs no svl to load.

(One of a model that transformers does not have, see svl.models, needs it for the model's code, and its card says so.)

    svl-export plan=FILE source=DIR|hub-id out=DIR [patch=FILE] [protect=none] [shard_size=5GB] [push_to_hub=OWNER/NAME]
               [layers=PATH] [revision=NAME] [name=NAME] [trust_remote_code=true]

No model is loaded: tensors that stay are copied as bytes under their new names, what a patch changes is computed one
tensor at a time. The new names and shapes are checked against the model that the new config describes before anything
is written. The result is the checkpoint that removing the layers in memory and `save_pretrained` would give, bit for
bit. It is written to a temporary folder beside its destination and renamed when complete; the source is only read.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svl.core import Patch, Plan, SvlError, Update, one_of
from svl.store import cannot_write

if TYPE_CHECKING:
    from torch import Tensor

    from svl.checkpoint import Piece, Stored
    from svl.skeleton import Place, Skeleton

    Computed = Callable[[], Iterable[Tensor]]
    Content = Stored | Computed

SETTINGS = ("plan", "source", "out", "patch", "protect", "shard_size", "push_to_hub", "layers", "revision", "name",
            "trust_remote_code")  # fmt: skip
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# Files of a checkpoint folder that are not taken along: weights in any format, and what is written anew.
LEFT = re.compile(
    r"\..*|.*\.(safetensors|bin|pt|pth|pkl|ckpt|gguf|onnx|h5|msgpack|index\.json)|config\.json|README\.md"
)
FOLDERS = ("additional_chat_templates",)  # taken along
SPARE = 2**24  # bytes beyond the weights: index, tokenizer, card


def key(path: Path | str) -> str | None:
    """The key of the run that exported to `path`; None if there is nothing, or something else."""
    try:
        config = json.loads((Path(path).expanduser() / "config.json").read_text())
        return config["layer_pruning"]["key"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def check(path: Path | str) -> None:
    """Raise SvlError if `path` exists and is no checkpoint that a run exported (whose rerun may find it there)."""
    if Path(path).expanduser().exists() and key(path) is None:
        raise SvlError(f"export.path '{path}' exists already; it is never overwritten")


def save(
    source: Path | str,
    plan: Plan,
    path: Path | str,
    patch: Patch | None = None,
    *,
    name: str | None = None,
    revision: str | None = None,
    layers: str | None = None,
    protect: str | Sequence[int] = "auto",
    trust_remote_code: bool = False,
    shard_size: int | str = "5GB",
    result: dict[str, Any] | None = None,
    key: str | None = None,
) -> Path:
    """Write the checkpoint that is left of `source` after `plan` (and `patch`) to the new folder `path`.

    The plan is also in `config.json`, under `layer_pruning`, with the projections that were changed (`compensated`,
    as "<original layer>.<writer>") and the `key` of the run, if it is one's.

    Args:
        source: checkpoint folder, or hub id.
        plan: which layers go.
        path: the folder to make.
        patch: what is folded into kept weights; layers are original indices.
        name: of the dense model, for the card; default: the last part of `source`.
        revision: hub branch, tag or commit.
        layers: dotted path of the decoder layers, where structure does not tell.
        protect: auto (layers whose removal would change what others do must stay), none, or a list of layers.
        trust_remote_code: run model code from the checkpoint.
        shard_size: largest weights file, in bytes or like "5GB".
        result: of the run that made the plan (its result.json), for the card.
        key: of that run.

    Raises:
        SvlError: before anything is written, if `path` exists, the source cannot be exported at file level (quantised,
            pickled, incomplete, of unknown layout), plan or patch do not fit it, or the disk has too little room.
    """
    from svl import card, checkpoint, loading, skeleton, surgery

    path = Path(path).expanduser().absolute()
    if path.exists():
        raise SvlError(f"export.path '{path}' exists already; it is never overwritten")
    limit = in_bytes(shard_size)
    folder = skeleton.local(source, revision)
    base = str(source) if folder != Path(source).expanduser().absolute() else None
    dense = skeleton.build(
        folder, layers=layers, protect=protect, trust_remote_code=trust_remote_code, shapes_only=True
    )
    name = name or Path(str(source)).name
    dense.anatomy.check(plan, name)
    pieces = list(plan_pieces(dense, plan, patch or Patch()))

    config, auto = loading.describe(folder, None, trust_remote_code)
    smaller = surgery.pruned_config(config, plan)
    pruned = skeleton.hollow(auto, smaller, dense.model.dtype, trust_remote_code, shapes_only=True)
    compare(pieces, pruned, dense)
    changed = sorted({f"{i}.{role}" for i, role in patch.updates} | {f"{i}.*" for i in patch.blends}) if patch else []
    pruned.config.architectures = [type(pruned).__name__]
    pruned.config.layer_pruning = {**json.loads(plan.to_json()), "compensated": changed, "key": key}
    others = [p for p in folder.iterdir() if p.is_file() and not LEFT.fullmatch(p.name)]
    others += [p for f in FOLDERS for p in (folder / f).glob("*") if p.is_file()]
    needed = sum(p.size for p in pieces) + sum(p.stat().st_size for p in others)
    check_room(path, needed + SPARE)
    with whole(path) as temporary:
        checkpoint.write(temporary, pieces, limit)
        for file in others:
            target = temporary / file.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
        pruned.config.save_pretrained(temporary)
        card.write(
            temporary, plan, title=path.name, name=name, auto=auto.__name__, source=folder, base=base,
            compensated=changed, result=result, port=type(pruned).__module__.startswith("svl."),
        )  # fmt: skip
    return path


def in_bytes(size: int | str) -> int:
    """A size like 5GB, 500MB or a number of bytes.

    Raises:
        SvlError: if it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B|)", str(size).strip().upper())
    if not found or not (number := int(float(found[1]) * UNITS["" if found[2] == "B" else found[2]])):
        raise SvlError(f"shard_size is '{size}', but must be a size like 5GB or 500MB")
    return number


def check_room(path: Path, needed: int) -> None:
    """Raise SvlError unless the disk of a folder to be made has `needed` bytes free."""
    place = next(p for p in path.parents if p.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise SvlError(
            f"the export needs {needed / 1e9:.2f} GB, but {place} has {free / 1e9:.2f} GB left; nothing was written"
        )


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block is through; if it fails, nothing is left."""
    temporary = path.with_name(f".{path.name}.incomplete")
    shutil.rmtree(temporary, ignore_errors=True)  # of one that was killed
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and (reason := cannot_write(error)):
            raise SvlError(f"cannot export to '{path}': {reason}") from error
        raise


# ---------------------------------------------------------------------------------------------- tensor by tensor


def plan_pieces(dense: Skeleton, plan: Plan, patch: Patch) -> Iterator[Piece]:
    """What the new checkpoint consists of, in the order in which it lies at the source.

    Raises:
        SvlError: if the names on disk do not number decoder layers in one way, or the patch does not fit.
    """
    from svl import surgery
    from svl.checkpoint import Piece

    prefix, new_index = layers_on_disk(dense), {old: new for new, old in enumerate(plan.kept)}
    merged, revised = blended(dense, plan, patch), updated(dense, plan, patch)
    for key, stored in dense.stored.items():
        number, rest = numbered(key, prefix)
        if number is not None and number not in new_index:
            continue
        name = key if number is None else f"{prefix}.{new_index[number]}.{rest}"
        place, shape = dense.places.get(key), stored.shape
        content: Content = stored
        if number is not None and place and place.name in merged:
            terms = [(dense.stored.get(f"{prefix}.{k}.{rest}"), c) for k, c in patch.blends[number].items()]
            content = merge(name, stored, terms)
        if place and place.name in revised:
            content = revise(content, stored, dense, place, *revised[place.name])
        if place and plan.removed and (axis := surgery.packed(place.name, dense.anatomy.layers)) is not None:
            content = slices(stored, axis, plan)
            shape = tuple(n * len(plan.kept) // plan.n_layers if i == axis else n for i, n in enumerate(shape))
        yield Piece(name, stored.dtype, shape, content)


def blended(dense: Skeleton, plan: Plan, patch: Patch) -> set[str]:
    """Parameters of the dense model that the patch blends.

    Raises:
        SvlError: if it blends a layer that is removed.
    """
    from svl import surgery

    layers = dense.model.get_submodule(dense.anatomy.layers)
    if gone := patch.blends.keys() - set(plan.kept):
        raise SvlError(f"the patch blends layer {min(gone)}, which the pruned model does not have")
    return {f"{dense.anatomy.layers}.{i}.{rest}" for i in patch.blends for rest in surgery.projections(layers[i])}


def merge(name: str, stored: Stored, terms: Sequence[tuple[Stored | None, float]]) -> Computed:
    """The weighted sum of tensors on disk, by blocks of rows.

    Raises:
        SvlError: if one is missing or has another shape.
    """
    from svl import checkpoint, surgery

    sources = [s for s, _ in terms if s is not None and s.shape == stored.shape]
    if len(sources) < len(terms):
        raise SvlError(f"layers cannot be merged into '{name}': their weights differ in shape")
    coefficients = {i: c for i, (_, c) in enumerate(terms)}

    def compute() -> Iterator[Tensor]:
        for start, stop in checkpoint.row_blocks(stored):
            yield surgery.blend({i: s.read(start, stop) for i, s in enumerate(sources)}, coefficients)

    return compute


def updated(dense: Skeleton, plan: Plan, patch: Patch) -> dict[str, tuple[Update, bool]]:
    """Parameters of the dense model that the patch updates, and whether the model has them as [.., n_in, d].

    Raises:
        SvlError: if it names a removed layer or an unknown writer, or has parts that the writer cannot take.
    """
    from svl import surgery

    found = {}
    for (layer, role), update in patch.updates.items():
        if layer not in plan.kept:
            raise SvlError(f"the patch changes '{role}' of layer {layer}, which the pruned model does not have")
        for name, flipped in surgery.changed(dense.anatomy, layer, role, update).items():
            found[f"{dense.anatomy.layers}.{layer}.{name}"] = (update, flipped)
    return found


def revise(content: Content, stored: Stored, dense: Skeleton, place: Place, update: Update, flipped: bool) -> Computed:
    """A tensor on disk with an update folded into it; `flipped` if the model has it as [.., n_in, d].

    Raises:
        SvlError: if the disk has it other than as a matrix, or one of several, either way round.
    """
    from svl import surgery

    kinds = {type(op).__name__ for op in place.converter.operations} if place.converter else set()
    if not kinds <= {"Transpose", "MergeModulelist"}:
        raise SvlError(f"the layout of '{dense.folder}' is not known: it stores '{place.name}' by {', '.join(kinds)}")
    turned = stored.shape[-2:] != tuple(dense.model.state_dict()[place.name].shape)[-2:]

    def compute() -> Iterator[Tensor]:
        import torch

        tensor = torch.cat(list(content())) if callable(content) else content.read()
        yield surgery.revise(tensor, update, flipped != turned)

    return compute


def slices(stored: Stored, axis: int, plan: Plan) -> Computed:
    """The parts of a tensor that belong to kept layers, of one equal part per layer along `axis` (0 or 1)."""
    import torch

    from svl import checkpoint

    def rows() -> Iterator[Tensor]:
        height = stored.shape[0] // plan.n_layers
        for i in plan.kept:
            yield stored.read(i * height, (i + 1) * height)

    def columns() -> Iterator[Tensor]:
        for start, stop in checkpoint.row_blocks(stored):
            parts = stored.read(start, stop).chunk(plan.n_layers, 1)
            yield torch.cat([parts[i] for i in plan.kept], 1)

    return columns if axis else rows


def layers_on_disk(dense: Skeleton) -> str:
    """The path before the number of a decoder layer in names on disk.

    Raises:
        SvlError: if there is no such path, or layers that the model does not have.
    """
    found: set[str] | None = None
    for key, place in dense.places.items():
        if (number := dense.layer(place.name)) is None:
            continue
        parts = key.split(".")
        paths = {".".join(parts[:i]) for i, part in enumerate(parts) if part == str(number)}
        found = paths if found is None else found & paths
    if not found or len(found) > 1:
        raise SvlError(
            f"the layout of '{dense.folder}' is not known: its names do not number decoder layers in one way"
        )
    (prefix,) = found
    if beyond := [k for k in dense.stored if (numbered(k, prefix)[0] or 0) >= dense.anatomy.n_layers]:
        raise SvlError(f"the layout of '{dense.folder}' is not known: '{beyond[0]}' is beyond the last decoder layer")
    return prefix


def numbered(name: str, prefix: str) -> tuple[int | None, str]:
    """Number and rest of a name `<prefix>.N.<rest>`; None and the name itself for any other."""
    found = re.match(rf"{re.escape(prefix)}\.(\d+)\.(.+)", name)
    return (int(found[1]), found[2]) if found else (None, name)


def compare(pieces: Iterable[Piece], pruned: Any, dense: Skeleton) -> None:
    """Raise SvlError unless `pieces` make the model `pruned`, each parameter in its shape and none missing."""
    from svl import skeleton

    parameters = pruned.state_dict()
    shapes = {piece.name: piece.shape for piece in pieces}
    places = skeleton.match(pruned, shapes)
    wrong = [
        name for name, place in places.items()
        if place.converter is None and tuple(parameters[place.name].shape) != shapes[name]
    ]  # fmt: skip
    if wrong := [*wrong, *skeleton.lacking(pruned, places)]:
        raise SvlError(f"the layout of '{dense.folder}' is not known: '{wrong[0]}' does not fit the pruned model")


# ------------------------------------------------------------------------------------------------------- the Hub


def check_hub(repo: str) -> None:
    """Raise SvlError unless `repo` is a name for a repository, and the Hub knows who is asking."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        HfApi().whoami()
    except HFValidationError as error:
        raise SvlError(f"push_to_hub: {error}") from error
    except (HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise SvlError(f"push_to_hub: the Hub refuses: {str(error).splitlines()[0]}") from error


def push(folder: Path, repo: str) -> str:
    """Upload an exported checkpoint to the Hub, into a repository made for it if need be; its address.

    Raises:
        SvlError: if the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        address = HfApi().create_repo(repo, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Pruned by svl")
    except (HTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SvlError(f"push_to_hub: the Hub refuses ({reason}); the export is in '{folder}'") from error
    return str(address)


# ------------------------------------------------------------------------------------------------ command line


def run(given: dict[str, str]) -> str:
    """What `svl-export` does; what it says.

    Raises:
        SvlError: on bad input, before anything is written.
    """
    from safetensors import SafetensorError

    from svl import surgery

    for word in given:
        one_of("setting", word, SETTINGS)
    for word in ("plan", "source", "out"):
        if word not in given:
            raise SvlError(f"{word}= is missing; see svl-export --help")
    one_of("protect", given.get("protect", "auto"), ("auto", "none"))
    one_of("trust_remote_code", given.get("trust_remote_code", "false"), ("false", "true"))
    file = Path(given["plan"]).expanduser()
    try:
        plan = Plan.from_json(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise SvlError(f"plan: cannot read '{file}': {error}") from error
    patch = None
    if "patch" in given:
        try:
            patch = surgery.load_patch(Path(given["patch"]).expanduser())
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise SvlError(f"patch: '{given['patch']}' is no patch: {error}") from error
    repo = given.get("push_to_hub")
    if repo:
        check_hub(repo)
    path = save(
        given["source"], plan, given["out"], patch, name=given.get("name"), revision=given.get("revision"),
        layers=given.get("layers"), protect=given.get("protect", "auto"),
        trust_remote_code=given.get("trust_remote_code") == "true", shard_size=given.get("shard_size", "5GB"),
        result=result_beside(file, plan),
    )  # fmt: skip
    return f"exported to {path}" + (f"\nuploaded to {push(path, repo)}" if repo else "")


def result_beside(file: Path, plan: Plan) -> dict[str, Any] | None:
    """The result.json of the run whose plan.json `file` is, if it lies there."""
    try:
        result = json.loads(file.with_name("result.json").read_text())
        return result if file.name == "plan.json" and result["plan"]["removed"] == list(plan.removed) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def main() -> None:
    """Entry point: mistakes in the input become one line and exit code 1; bugs keep their traceback."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return
    try:
        if loose := [w for w in words if "=" not in w]:
            raise SvlError(f"'{loose[0]}' is no setting: they are written name=value; see svl-export --help")
        print(run(dict(w.split("=", 1) for w in words)))
    except SvlError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
