"""The model of a configuration, from its config and headers alone: no weight is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from svl.checkpoints.safetensors_files import StoredTensor, read_tensors
from svl.checkpoints.skeleton import loaded_dtype
from svl.config import asked_removals, load_options, plain_values
from svl.config_methods import build_method
from svl.core import Compensation, Stats, SvlError, checked_plan, fitted_patch
from svl.data.card_metadata import read_metadata
from svl.demo import bundled
from svl.doctor.findings import Section
from svl.doctor.memory import ModelShape, in_words
from svl.models.anatomy import Anatomy, find_anatomy
from svl.models.hub_snapshot import HubSnapshot, find_hub_snapshot
from svl.models.loading import load_processor, read_model_config
from svl.models.lvlm import Lvlm
from svl.models.options import LoadOptions
from svl.models.placement import weights_by_place
from svl.models.prompts import with_prompt_style
from svl.models.transformers_internals import empty_model
from svl.models.weight_files import PICKLES, check_index, find_weight_files
from svl.pruning.folding import check_foldable, check_patch_for_model, check_single_somewhere, merge_kinds
from svl.pruning.layer_trials import joinable_layers
from svl.store.artifacts import Store

PICKLED = "its weights are pickles: for export and vLLM, convert them once (svl-export convert)"


@dataclass(frozen=True)
class Examined:
    """A model without weights (on the meta device), its processor, and what its memory depends on."""

    lvlm: Lvlm
    shape: ModelShape


def examine_model(cfg: DictConfig, store: Store, section: Section) -> Examined | None:
    """Everything that can be said of the model; None if it cannot be loaded."""
    found: Examined | None = None
    with section.examined("the model"):
        checkpoint = bundled.resolve_bundled(cfg.model.path, store)
        options = load_options(cfg.model, _examine_source(checkpoint, cfg.model.revision, section))
        config, auto = read_model_config(checkpoint, options)
        section.ok(f"{type(config).__name__}, {config.model_type}: transformers has it as {auto.__name__}")
        dtype = loaded_dtype(config, _stored_tensors(checkpoint), options)
        model = empty_model(auto, config, dtype, options.trust_remote_code, shapes_only=True)
        processor, token = load_processor(checkpoint, config, options)
        anatomy = find_anatomy(model, options.layers, image_token=token, protect=options.protect)
        lvlm = Lvlm(model, processor, anatomy, options.model_name(checkpoint))
        lvlm = with_prompt_style(lvlm, cfg.model.prompt, plain_values(cfg.model.image_processor))
        found = Examined(lvlm, model_shape(lvlm, dtype))
        _examine_layers(cfg, anatomy, section)
        _examine_placement(options, lvlm, section)
        _examine_methods(cfg, lvlm, section)
        size = f"{found.shape.parameters / 1e9:.2f} billion parameters"
        section.ok(f"{size}, {in_words(found.shape.weights)} in {str(dtype).removeprefix('torch.')}")
    return found


def _examine_source(checkpoint: str, revision: str | None, section: Section) -> str | None:
    """Where the checkpoint is, its licence and its files; of a hub id, gives the commit."""
    if os.path.isdir(checkpoint):
        folder = Path(checkpoint)
        files = find_weight_files(folder)
        check_index(folder)
        size = sum(file.stat().st_size for file in files.files)
        section.ok(f"folder '{folder}': {len(files.files)} files with weights, {in_words(size)}")
        if files.pickled:
            section.note(PICKLED)
        try:
            _note_licence(read_metadata(folder / "README.md"), section)
        except (SvlError, OSError, ValueError) as error:
            section.note(f"its model card cannot be read: {error}")
        return None
    found = find_hub_snapshot(checkpoint, revision)
    section.ok(f"hub id '{checkpoint}', commit {found.commit[:12]}")
    _examine_hub(found, section)
    return found.commit


def _examine_hub(found: HubSnapshot, section: Section) -> None:
    """The files, licence and conditions of a repository."""
    if found.cached:
        section.note("the hub does not answer: this is what its cache has")
    weights = [name for name in found.files if name.endswith((".safetensors", *PICKLES))]
    size = "of unknown size" if found.weight_bytes is None else in_words(found.weight_bytes)
    if not weights:
        section.fails("its weights are not in the cache" if found.cached else "it has no weights")
    else:
        section.ok(f"{len(weights)} files with weights, {size}{'' if found.cached else ' to download'}")
    if weights and not any(name.endswith(".safetensors") for name in weights):
        section.note(PICKLED)
    if found.gated:
        section.note("it is gated: accept its licence on its page, and log in (hf auth login) or set HF_TOKEN")
    _note_licence(found.card, section)


def _note_licence(card: dict[str, Any], section: Section) -> None:
    licence = card.get("license_name") or card.get("license")
    section.note(f"licence: {licence}" if licence else "its card names no licence")


def _stored_tensors(checkpoint: str) -> Iterator[StoredTensor]:
    """What lies in a folder, by its headers; nothing of a hub id, or of pickles."""
    folder = Path(checkpoint)
    if folder.is_dir() and not find_weight_files(folder).pickled:
        yield from read_tensors(folder).values()


def model_shape(lvlm: Lvlm, dtype: torch.dtype) -> ModelShape:
    """What memory depends on, of a model whose weights need not be there."""
    text = lvlm.model.config.get_text_config(decoder=True)
    layer = lvlm.layers[lvlm.anatomy.removable[0] if lvlm.anatomy.removable else 0]
    hidden = lvlm.anatomy.hidden_size
    widths = [max(p.shape) for name, p in layer.named_parameters() if "mlp" in name and p.ndim == 2]
    heads = getattr(text, "num_attention_heads", None) or 1
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or hidden // heads
    return ModelShape(
        parameters=lvlm.parameters(),
        bytes_each=dtype.itemsize,
        layers=lvlm.anatomy.n_layers,
        hidden=hidden,
        mlp_width=max(widths, default=4 * hidden),
        cache_width=2 * kv_heads * width,
        vocabulary=getattr(text, "vocab_size", 0) or 0,
    )


def _examine_layers(cfg: DictConfig, anatomy: Anatomy, section: Section) -> None:
    """How many layers there are, which must stay and why, and whether as many may go as are asked for."""
    section.ok(f"{anatomy.n_layers} decoder layers ('{anatomy.layers}'), of width {anatomy.hidden_size}")
    reasons: dict[str, list[int]] = {}
    for layer, reason in anatomy.protected.items():
        reasons.setdefault(reason, []).append(layer)
    for reason, layers in reasons.items():
        section.note(f"stay: {_in_ranges(layers)}: {reason}")
    n = asked_removals(cfg, anatomy.n_layers)
    asked = f"ratio={cfg.ratio:g} removes {n} layers" if cfg.n_remove is None else f"n_remove={n}"
    if n > len(anatomy.removable):
        section.fails(f"{asked}, but only {len(anatomy.removable)} may go")
    else:
        section.ok(f"{asked}, of {len(anatomy.removable)} that may go")


def _examine_placement(options: LoadOptions, lvlm: Lvlm, section: Section) -> None:
    """Where the weights will lie."""
    if options.device_map is None:
        return
    if isinstance(options.device_map, str):
        found = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
        place = f"{found} accelerators, then the host, then the disk" if found else "the host, then the disk"
        section.note(f"model.device_map={options.device_map}: transformers fills {place}")
        return
    with section.examined("model.device_map"):
        for where, size in weights_by_place(lvlm.model, options.device_map).items():
            section.ok(f"model.device_map: {in_words(size)} of weights on '{where}'")


def _in_ranges(layers: list[int]) -> str:
    """Layers as text, such as "0-2, 7"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def _examine_methods(cfg: DictConfig, lvlm: Lvlm, section: Section) -> None:
    """Which methods apply."""
    compensation = build_method(cfg.compensation, "compensation")
    try:
        check_foldable(lvlm)
    except SvlError as error:
        matters = compensation.foldable and not compensation.does_nothing
        (section.fails if matters else section.note)(str(error))
    else:
        _examine_writers(lvlm.anatomy, section)
    if compensation.joins:
        with section.examined("joining layers"):
            joinable_layers(lvlm)
    _examine_choices(cfg, lvlm, compensation, section)
    if not lvlm.takes_images:
        section.note("it reads text only: selectors of visual tokens, FastV and pictures do not apply")
    elif lvlm.takes_videos:
        section.ok("it takes pictures and videos")
    else:
        section.ok("it takes pictures")
    if cfg.model.offload:
        section.note("model.offload: trial removals, refit, come and benchmarks need the whole model in memory instead")


def _examine_writers(anatomy: Anatomy, section: Section) -> None:
    """Which compensations can be folded, as far as the layers' projections tell."""
    missing = {"attn", "mlp"} - set(anatomy.writers)
    several = {
        role: [i for i, writer in enumerate(writers) if not writer.single] for role, writers in anatomy.writers.items()
    }
    several = {role: layers for role, layers in several.items() if layers}
    if missing:
        roles = " or ".join(sorted(missing))
        section.note(f"some layer has no {roles} writer: compensations that need it are refused")
    for role, layers in several.items():
        section.note(
            f"'{role}' of layers {_in_ranges(layers)} has several matrices (experts): compensations that refit it are "
            "refused there"
        )
    if not missing and not several:
        section.ok(
            "attention and MLP of every layer write through one matrix, without a norm behind it as far as names tell: "
            "compensations can be folded in (a run tries that out before it calibrates)"
        )


def _examine_choices(cfg: DictConfig, lvlm: Lvlm, compensation: Compensation, section: Section) -> None:
    """What of strategy and compensation cannot be on these layers, as far as it is known without any measurement."""
    with section.examined("the compensation"):
        check_single_somewhere(compensation, lvlm.anatomy)
    kinds = merge_kinds(lvlm.anatomy, lvlm.layers)
    if len(set(kinds)) > 1:
        apart = [i for i in range(1, len(kinds)) if kinds[i] is None or kinds[i] != kinds[i - 1]]
        section.note(
            f"layers of other kinds than the one before them, which are not merged with it: {_in_ranges(apart)}"
        )
    try:
        strategy = build_method(cfg.strategy, "strategy")
    except SvlError:
        return  # as is said of the settings
    with section.examined("the strategy"):
        stats = Stats(lvlm.anatomy.n_layers, lvlm.anatomy.removable, kinds=kinds)
        n_remove = asked_removals(cfg, stats.n_layers)
        if n_remove > len(stats.removable):
            return  # as is said of the layers
        strategy.check(stats, n_remove)
        if not strategy.needs and not compensation.needs:  # what they come to is known
            plan = checked_plan(strategy, stats, n_remove)
            check_patch_for_model(fitted_patch(compensation, None, plan), plan, lvlm.anatomy, lvlm.layers)  # type: ignore[arg-type]
