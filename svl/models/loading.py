"""Loading any Hugging Face vision-language or text-only checkpoint."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from svl.core.errors import SvlError, did_you_mean, explained
from svl.models.anatomy import Anatomy, find_anatomy, image_token_id
from svl.models.devices import find_device, numbered_device
from svl.models.lvlm import Lvlm
from svl.models.options import LoadOptions
from svl.models.placement import load_spread, weights_by_place
from svl.models.size_checks import check_counts, check_size, described_model
from svl.models.weight_files import FilesState, check_index, state_of_files, stored_names
from svl.text.escaping import for_terminal
from svl.text.progress import still_working

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

log = logging.getLogger(__name__)

EXTRAS = {"num2words": "smolvlm"}  # packages that some models of transformers need -> the extra of svl that has them


def load(path: str | Path, options: LoadOptions | None = None, **settings: Any) -> Lvlm:
    """Load a checkpoint folder or hub id, image-text or text-only, for inference.

    Args:
        path: folder with a `config.json`, or a hub id.
        options: how to read it.
        settings: the fields of LoadOptions one by one, instead of `options`.

    Raises:
        SvlError: if the path is missing, holds no model, an incomplete one, or one without decoder layers.
    """
    options = LoadOptions.of(options, settings)
    path = resolve_model_path(path)
    options = replace(options, name=options.model_name(path))
    asked = path, options, state_of_files(path)
    if asked not in _last_model:
        _last_model.clear()  # before the next one needs memory
        _last_model[asked] = _load(path, options)
    return _last_model[asked]


# Jobs of a sweep share the dense model: surgery never changes it.
_last_model: dict[tuple[str, LoadOptions, FilesState], Lvlm] = {}


def forget_last() -> None:
    """Let go of the model that was loaded last, which is kept for the next job of a sweep.

    Frees an accelerator's memory once nobody else holds the model.
    """
    _last_model.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _load(path: str, options: LoadOptions) -> Lvlm:
    from svl.models.transformers_internals import without_report

    device = None if options.device_map is not None else numbered_device(find_device(options.device))
    config, auto = read_model_config(path, options)
    if os.path.isdir(path):
        check_index(Path(path))
    check_size(path, config, auto, options)
    if isinstance(options.device_map, dict) and not options.trust_remote_code:  # whose code may need values
        weights_by_place(described_model(auto, config, path, torch.bfloat16, options), options.device_map)
    processor, token = load_processor(path, config, options)
    with explained_loading(path), without_report(), still_working("loading"):
        model, info = _read_weights(path, auto, options, device)
    anatomy = find_anatomy(model, options.layers, image_token=token, protect=options.protect)
    check_complete(path, info, model, anatomy)
    tell_left_out(path, info, anatomy)
    if device is not None:
        with explained(f"cannot use model.device='{options.device}'"):
            model = nn.Module.to(model, device)
    model.eval()
    lvlm = Lvlm(model, processor, anatomy, options.model_name(path))
    log.info("loaded %s: %d decoder layers, %.1f M parameters", lvlm.name, anatomy.n_layers, lvlm.parameters() / 1e6)
    return lvlm


def _read_weights(
    path: str, auto: Any, options: LoadOptions, device: torch.device | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model and transformers' report, its weights read straight to where they belong."""
    settings: dict[str, Any] = {
        "dtype": options.torch_dtype,
        "revision": options.revision,
        "trust_remote_code": options.trust_remote_code,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # `check_complete` names them
    }
    if options.attn_implementation != "auto":
        settings["attn_implementation"] = options.attn_implementation
    if device is None:
        return load_spread(partial(auto.from_pretrained, path, **settings), options)
    if device.type != "cpu":
        if importlib.util.find_spec("accelerate"):
            settings["device_map"] = {"": device}
        else:
            log.warning("without the package accelerate, weights are read to host memory first, then to %s", device)
    return auto.from_pretrained(path, **settings)


def resolve_model_path(path: str | Path) -> str:
    """The path, as it is to be read; raises SvlError if it is a folder that does not exist."""
    path = os.path.expanduser(path)
    if path.startswith((".", "/")) and not os.path.isdir(path):
        raise SvlError(f"model.path: there is no folder '{path}'")
    return path


@contextmanager
def explained_loading(path: str | Path) -> Iterator[None]:
    """Within the block, whatever transformers raises about the checkpoint at `path` becomes one line."""
    try:
        with explained(f"cannot load a model from '{path}'"):
            yield
    except SvlError as error:
        if "trust_remote_code" in str(error.__cause__):
            raise SvlError(f"{error} To let it run, set model.trust_remote_code=true") from error.__cause__
        if isinstance(error.__cause__, ImportError):
            for package, extra in EXTRAS.items():
                if package in str(error.__cause__):
                    needs = f"'{path}' needs the package {package}, which is not installed: pip install 'svl[{extra}]'"
                    raise SvlError(needs) from error.__cause__
        raise


def read_model_config(path: str | Path, options: LoadOptions | None = None) -> tuple[PreTrainedConfig, Any]:
    """The config of a checkpoint, and the transformers class (AutoModelFor...) that makes its model.

    Raises:
        SvlError: if there is no readable config, its model has no decoder layers to prune, or it asks for more layers
            than there are weights, or for quantised ones.
    """
    from transformers import AutoConfig, PreTrainedConfig

    import svl.models.ports  # noqa: F401 (makes their models known to transformers)
    from svl.models.transformers_internals import model_class

    options = options or LoadOptions()
    with explained_loading(path):
        fields, _ = PreTrainedConfig.get_config_dict(path, revision=options.revision)
        check_counts(fields, path)
        config = AutoConfig.from_pretrained(
            path, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
        check_not_quantised(path, config)
        auto = model_class(config, options.trust_remote_code)
    if auto is None and (custom := getattr(config, "auto_map", None)):
        raise SvlError(
            f"'{path}' is a {config.model_type} model of its own code, which offers {', '.join(sorted(custom))}, but "
            "neither AutoModelForCausalLM nor AutoModelForImageTextToText, which alone can be pruned: look for a "
            "version of it in transformers' own format"
        )
    if auto is None:
        raise SvlError(f"'{path}' is a {config.model_type} model, which has no decoder layers to prune")
    return config, auto


def check_not_quantised(path: str | Path, config: PreTrainedConfig) -> None:
    """Raise SvlError if the weights are quantised, other than in ways that transformers undoes on loading."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = settings.get("quant_method", "unknown method")
    if method != "mxfp4" and not settings.get("dequantize"):
        raise SvlError(
            f"cannot load a model from '{path}': its weights are quantised ({method}), and layers are pruned in full "
            "precision only; name the checkpoint that it was made from"
        )


def check_complete(path: str, info: dict[str, Any], model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Raise SvlError if weights were missing, or decoder layers stored that the config does not count."""
    if misfits := info["mismatched_keys"]:  # transformers would go on with random numbers in their place
        name, stored, asked = min(misfits)
        raise SvlError(
            f"cannot load a model from '{path}': {name} is stored in the shape {tuple(stored)}, but its config "
            f"describes {tuple(asked)}"
        )
    if missing := info["missing_keys"]:  # and in theirs
        raise SvlError(f"the checkpoint '{path}' lacks {len(missing)} weights, {min(missing)} for one")
    for name in info["unexpected_keys"]:
        if _layer_behind(anatomy, name) is not None and not is_prediction_layer(model, anatomy, name):
            raise SvlError(
                f"the checkpoint '{path}' has {name}, but its config says {anatomy.n_layers} decoder layers: the "
                "layers behind them would be left out"
            )


def tell_left_out(path: str, info: dict[str, Any], anatomy: Anatomy) -> None:
    """Log which stored weights the model has no place for, and which layers behind the decoder are left out."""
    unexpected = info["unexpected_keys"]
    if unused := [name for name in unexpected if _layer_behind(anatomy, name) is None]:
        log.warning(
            "  left out: %d stored weights that the model has no place for, %s for one",
            len(unused),
            for_terminal(min(unused)),
        )
    names = (*unexpected, *stored_names(path))
    if behind := {number for name in names if (number := _layer_behind(anatomy, name)) is not None}:
        log.info("  left out: prediction layer %s, stored behind the decoder", ", ".join(map(str, sorted(behind))))


def _layer_behind(anatomy: Anatomy, name: str) -> int | None:
    """The number of the layer that a stored tensor belongs to, if the config counts fewer."""
    number = anatomy.layer_number(name)
    return None if number is None or number < anatomy.n_layers else number


def is_prediction_layer(model: PreTrainedModel, anatomy: Anatomy, name: str) -> bool:
    """Whether a tensor belongs to a layer behind the last that guesses tokens further ahead, and is not loaded."""
    from svl.models.transformers_internals import ignored_on_load

    number = _layer_behind(anatomy, name)
    if number is None:
        return False
    n_extra = getattr(model.config.get_text_config(), "num_nextn_predict_layers", 0) or 0
    return ignored_on_load(model, name) or number < anatomy.n_layers + n_extra


def load_processor(
    path: str | Path, config: PreTrainedConfig, options: LoadOptions | None = None
) -> tuple[ProcessorMixin | PreTrainedTokenizerBase, int | None]:
    """The processor of a model (a tokenizer for text-only ones) and the id of its image placeholder.

    Args:
        path: of the checkpoint.
        config: as `read_model_config` gives it.
        options: how to read it; its `image_token` is used where config and processor do not tell.

    Raises:
        SvlError: if the processor is missing, or the model takes images and no one knows where in their prompts.
    """
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from svl.models.processors import read_processor
    from svl.models.transformers_internals import model_class

    options = options or LoadOptions()
    source: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    takes_images = (
        model_class(config, options.trust_remote_code) is AutoModelForImageTextToText
        or image_token_id(config) is not None
    )
    with explained_loading(path):
        if not takes_images:
            return AutoTokenizer.from_pretrained(path, **source), None
        processor = read_processor(path, config, **source)
    if (token := image_placeholder(config, processor, options.image_token)) is None:
        raise SvlError(  # going on would treat it as a text model
            f"{config.model_type} models take images, but where in their prompts is not known: name the placeholder "
            "with model.image_token="
        )
    return processor, token


def image_placeholder(
    config: PreTrainedConfig, processor: ProcessorMixin | PreTrainedTokenizerBase, image_token: int | str | None
) -> int | None:
    """Id of the image placeholder: what the user names, else the config, else the processor.

    Raises:
        SvlError: if the user names one that the tokenizer does not know.
    """
    if image_token is None and (known := image_token_id(config)) is not None:
        return known
    token = getattr(processor, "image_token", None) if image_token is None else image_token
    if not isinstance(token, str):
        return token
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    if token not in (vocabulary := tokenizer.get_vocab()):
        guess = did_you_mean(token, tokenizer.all_special_tokens)
        raise SvlError(f"model.image_token '{token}' is no token of the model{guess}")
    return vocabulary[token]
