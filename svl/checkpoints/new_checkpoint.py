"""A pruned checkpoint before it is written: planned from headers and checked, then written in one go."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import nn

from svl.checkpoints import hub
from svl.checkpoints.auxiliary_files import copy_auxiliary_files, find_auxiliary_files
from svl.checkpoints.model_card import CardFacts, write_model_card
from svl.checkpoints.pruned_tensors import (
    check_fits,
    layer_prefix,
    plan_tensors,
    prediction_layers,
    split_layer_number,
)
from svl.checkpoints.pruning_record import CONVERTED, FIELD, converted_model, pruning_record, trained_modules
from svl.checkpoints.safetensors_writing import NewTensor, write_weights
from svl.checkpoints.skeleton import Skeleton, read_skeleton
from svl.core.errors import SvlError
from svl.core.patch import NO_STOCK_FORM, Patch
from svl.core.plan import Plan
from svl.models.loading import read_model_config
from svl.models.lvlm import Lvlm
from svl.models.options import LoadOptions
from svl.models.processors import write_image_settings
from svl.models.transformers_internals import empty_model
from svl.pruning.folding import check_foldable
from svl.pruning.pruned_config import pruned_config
from svl.pruning.selfcheck import check_layer_settings
from svl.pruning.sublayers import with_zeros
from svl.store.files import whole_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from svl.checkpoints.export import ExportRecord

log = logging.getLogger(__name__)

SPARE = 2**24  # bytes beyond weights and copied files: index, config, card


@dataclass(frozen=True)
class NewCheckpoint:
    """A pruned checkpoint before it is written.

    Attributes:
        dense: what it is made from.
        name: of the dense model.
        plan: which of its layers are gone.
        pruned: the model that it holds, without values; its config is the new one.
        tensors: the weights.
        files: of the dense checkpoint, which are taken along.
    """

    dense: Skeleton
    name: str
    plan: Plan
    pruned: PreTrainedModel
    tensors: list[NewTensor]
    files: list[Path]

    @property
    def bytes(self) -> int:
        """Size on disk, at most."""
        return sum(t.size for t in self.tensors) + sum(file.stat().st_size for file in self.files) + SPARE

    def write(self, path: Path, limit: int, run: ExportRecord) -> None:
        """Write it to the new folder `path`, in shards of at most `limit` bytes, with its card.

        `run` is the one that made the plan; empty if none did.

        Raises:
            SvlError: if the folder exists, or cannot be written.
        """
        facts = CardFacts(
            plan=self.plan,
            record=getattr(self.pruned.config, FIELD),
            title=path.name,
            name=self.name,
            auto=self.dense.auto.__name__,
            needs_svl=type(self.pruned).__module__.startswith("svl."),
            source=self.dense.folder,
            result=run.result or {},
        )
        with whole_folder(path) as folder:
            write_weights(folder, self.tensors, limit)
            copy_auxiliary_files(self.dense.folder, self.files, folder)
            self.pruned.config.save_pretrained(folder)
            if run.image_processor:
                write_image_settings(folder, self.pruned.config, run.image_processor)
            write_model_card(folder, facts)


def plan_checkpoint(
    source: Path | str, plan: Plan, patch: Patch, options: LoadOptions, key: str | None
) -> NewCheckpoint:
    """What is left of a checkpoint folder or hub id; `key` is that of the run that made the plan.

    Raises:
        SvlError: if the source cannot be exported at file level, or plan or patch do not fit it.
    """
    if patch.maps:
        raise SvlError(f"the patch cannot be exported: {NO_STOCK_FORM}")
    folder = hub.local_checkpoint(source, options.revision)
    options = replace(options, revision=None, name=options.model_name(source))
    dense = read_skeleton(folder, options, shapes_only=True)
    name = options.model_name(source)
    dense.anatomy.check_plan(plan, name)
    files = find_auxiliary_files(folder)
    if plan.sublayers:
        names = ", ".join(f"{layer}.{role}" for layer, role in plan.sublayers)
        log.warning(
            "  %s write zeros in the checkpoint, which cannot leave them out: it is no smaller or faster", names
        )
    tensors = list(plan_tensors(dense, plan, with_zeros(patch, plan)))

    dense_config, _ = read_model_config(folder, options)
    base_model = converted_model(getattr(dense_config, CONVERTED, None)) or hub.hub_id(source)
    record = pruning_record(plan, patch, key, base_model, getattr(dense_config, FIELD, None))
    if trained := trained_modules(patch, dense.anatomy.layers):
        record["trained"] = trained
    config = pruned_config(dense_config, plan)
    if left_out := prediction_layers(dense, layer_prefix(dense)):
        log.info("  left out: prediction layer %s, stored behind the decoder", ", ".join(map(str, left_out)))
        config.get_text_config(decoder=True).num_nextn_predict_layers = 0
    pruned = empty_model(dense.auto, config, dense.model.dtype, options.trust_remote_code, shapes_only=True)
    check_fits(tensors, pruned, dense)
    if not set(plan.removed) & set(dense.anatomy.waived):
        kept = cast(nn.ModuleList, pruned.get_submodule(dense.anatomy.layers))
        check_layer_settings(dense.layers, kept, plan, name)
    pruned.config.architectures = [type(pruned).__name__]
    setattr(pruned.config, FIELD, record)
    return NewCheckpoint(dense, name, plan, pruned, tensors, files)


def check_source(source: Path | str, options: LoadOptions, n_remove: int, compensates: bool) -> int:
    """Check what can be known before there is a plan; gives the least bytes of an export without `n_remove` layers.

    Raises:
        SvlError: if the source cannot be exported at file level, or (if the plan `compensates`) not be compensated.
    """
    folder = hub.local_checkpoint(source, options.revision)
    dense = read_skeleton(folder, options, shapes_only=True)
    find_auxiliary_files(folder)
    if compensates:
        check_foldable(Lvlm(dense.model, None, dense.anatomy, options.model_name(source)))  # type: ignore[arg-type]
    prefix = layer_prefix(dense)
    prediction_layers(dense, prefix)
    check_fits(plan_tensors(dense, Plan(dense.anatomy.n_layers, ()), Patch()), dense.model, dense)
    sizes: dict[int | None, int] = defaultdict(int)
    for name, stored in dense.stored.items():
        sizes[split_layer_number(name, prefix)[0]] += stored.size
    outside = sizes.pop(None, 0)
    layers = sorted(size for number, size in sizes.items() if number is not None and number < dense.anatomy.n_layers)
    return outside + sum(layers[: dense.anatomy.n_layers - n_remove])
