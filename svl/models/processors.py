"""What checkpoints' processors lack or get wrong, and other settings of their image processors."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoProcessor,
    InstructBlipProcessor,
    Kosmos2_5Processor,
    MllamaProcessor,
    PaliGemmaProcessor,
    ProcessorMixin,
)
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from svl.core.errors import SvlError, did_you_mean, explained, reason_of
from svl.models.weight_files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

KIND = "image_processor_type"  # the setting that names another class
CLASS_TOKEN = ("clip_vision_model",)  # towers that put a token of their own before those of the patches
# By name, as not every version of transformers has all of them.
PICTURE_FIRST = {"Blip2Processor", "FuyuProcessor", "InstructBlipProcessor", "Kosmos2_5Processor"}
IMAGES_OR_VIDEOS = {"Glm4vProcessor", "Molmo2Processor", "SmolVLMProcessor"}
PROMPT_BOTH_WAYS = {"PaliGemmaProcessor"}


def puts_picture_first(processor: Any) -> bool:
    """Whether a processor puts a picture before the prompt itself; no mark in the text says where."""
    return _is_one_of(processor, PICTURE_FIRST)


def reads_images_or_videos(processor: Any) -> bool:
    """Whether one call of a processor, or of its model, reads images or videos, and not both."""
    return _is_one_of(processor, IMAGES_OR_VIDEOS)


def reads_prompt_both_ways(processor: Any) -> bool:
    """Whether the tokens of a prompt see those behind them, and only those of an answer (token type 1) do not."""
    return _is_one_of(processor, PROMPT_BOTH_WAYS)


def _is_one_of(processor: Any, names: Collection[str]) -> bool:
    return any(kind.__name__ in names for kind in type(processor).__mro__)


def read_processor(
    path: str | Path, config: PreTrainedConfig, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The processor of a checkpoint of this config, completed; raises whatever transformers raises."""
    processor: Any = corrected(
        AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    )
    stated, _ = ProcessorMixin.get_processor_dict(path, revision=revision)
    if isinstance(processor, ProcessorMixin) and processor.chat_template is None:
        processor.chat_template = stated.get("chat_template")  # some classes do not take theirs
    if hasattr(processor, "vision_feature_select_strategy"):
        complete_visual_tokens(processor, config, stated)
    return processor


def corrected(processor: Any) -> Any:
    """A processor that also takes batches in which some prompts, or all, have no image; most do as they are."""
    if isinstance(processor, PaliGemmaProcessor):
        parts = processor.image_processor, processor.tokenizer
        return PaliGemmaPrompts(*parts, chat_template=processor.chat_template)
    if isinstance(processor, MllamaProcessor):  # its usual one takes no batch whose first prompt has none
        settings = processor.image_processor.to_dict()
        processor.image_processor = MllamaImageProcessorPil.from_dict(settings)
    if isinstance(processor, InstructBlipProcessor):
        readers = processor.tokenizer, getattr(processor, "qformer_tokenizer")  # noqa: B009 (set by its parent)
        return InstructBlipPrompts(processor.image_processor, *readers, processor.num_query_tokens)
    if isinstance(processor, Kosmos2_5Processor):
        return Kosmos25Prompts(processor.image_processor, processor.tokenizer, processor.num_image_tokens)
    return processor


def complete_visual_tokens(processor: Any, config: PreTrainedConfig, stated: Collection[str]) -> None:
    """Let a processor of LLaVA's kind know what the count of visual tokens follows from, where its files do not say.

    They did not for years, and do not in checkpoints derived from those; the model's config always does.

    Args:
        processor: is changed.
        config: of the model.
        stated: settings that the processor's files have.
    """
    tower = getattr(config, "vision_config", None)
    if tower is None:
        return
    if processor.vision_feature_select_strategy is None:
        # a model that has no such field (VipLlava) leaves out the tower's own token, as "default" says
        processor.vision_feature_select_strategy = getattr(config, "vision_feature_select_strategy", "default")
    if hasattr(processor, "num_image_tokens") and processor.num_image_tokens is None:
        processor.num_image_tokens = (tower.image_size // tower.patch_size) ** 2
    if hasattr(processor, "patch_size") and processor.patch_size is None:
        processor.patch_size = tower.patch_size
    if "num_additional_image_tokens" not in stated and hasattr(processor, "num_additional_image_tokens"):
        processor.num_additional_image_tokens = int(tower.model_type in CLASS_TOKEN)


class PaliGemmaPrompts(PaliGemmaProcessor):
    """PaliGemma's processor, which reads prompts without an image, too: `<bos>`, and the text as it is.

    The original refuses a batch of such prompts, and writes `<bos>` into the middle of the text of one among others.
    It ends every text with a line's end, also one that has its answer; here the template writes it behind the question.
    """

    def prepare_inputs_layout(  # type: ignore[override]
        self, images: Any = None, text: Any = None, **kwargs: Any
    ) -> Any:
        """As the parent's for prompts with an image, but for the line's end."""
        texts = [text] if isinstance(text, str) else list(text or [])
        where = [i for i, prompt in enumerate(texts) if self.image_token in prompt]
        written = [f"{self.tokenizer.bos_token}{prompt}" for prompt in texts]
        if where:
            images, given, *_ = super().prepare_inputs_layout(images, [texts[i] for i in where], **kwargs)
            for i, prompt in zip(where, given, strict=True):
                written[i] = prompt.removesuffix("\n")  # the one that it has added
        return images, written, None, None

    def validate_inputs(  # type: ignore[override]
        self, images: Any = None, text: Any = None, **kwargs: Any
    ) -> None:
        """As the parent's, where there are images."""
        if images is None:
            ProcessorMixin.validate_inputs(self, images=images, text=text, **kwargs)
        else:
            super().validate_inputs(images=images, text=text, **kwargs)


class InstructBlipPrompts(InstructBlipProcessor):
    """InstructBLIP's processor, whose Q-Former reads an instruction from its first position on, as it learned to."""

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """As the parent's, with the padding of the instruction on the right."""
        inputs = super().__call__(images=images, text=text, **kwargs)
        ids, mask = inputs["qformer_input_ids"], inputs["qformer_attention_mask"]
        for tokens, present in zip(ids, mask, strict=True):
            padding = int(present.argmax())
            tokens.copy_(tokens.roll(-padding))
            present.copy_(present.roll(-padding))
        return inputs


class Kosmos25Prompts(Kosmos2_5Processor):
    """Kosmos-2.5's processor, whose picture is where it is in prompts padded on the left, too."""

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """As the parent's, which writes `<bos>` into the prompt, and takes prompts to be padded on the right."""
        inputs = super().__call__(images=images, text=text, **{**kwargs, "add_special_tokens": False})
        for row, present in zip(inputs["image_embeds_position_mask"], inputs["attention_mask"], strict=True):
            row.copy_(row.roll(int(present.argmax())))
        return inputs


def with_settings(image_processor: Any, settings: Mapping[str, Any]) -> Any:
    """The same image processor with other settings; `image_processor_type` among them makes it one of another class.

    Raises:
        SvlError: if there is no image processor, no such class, no such setting, or it refuses the value.
    """
    if image_processor is None:
        raise SvlError("model.image_processor: this model has no image processor")
    kind, known = type(image_processor), image_processor.to_dict()
    if KIND in settings:
        kind = image_processor_class(str(settings[KIND]))
        known = {**kind().to_dict(), **known}
    changed = {name: value for name, value in settings.items() if name != KIND}
    for name in changed:
        if name not in known:
            raise SvlError(f"model.image_processor has no setting '{name}'{did_you_mean(name, known)}")
    with explained(f"model.image_processor: {kind.__name__} does not take {changed}"):
        return kind.from_dict({**known, **changed, KIND: kind.__name__})


def write_image_settings(folder: Path, config: PreTrainedConfig, settings: Mapping[str, Any]) -> None:
    """Let the processor of the checkpoint `folder`, of this config, have other settings of its image processor.

    Raises:
        SvlError: as `with_settings`, or if its files have no place for them.
    """
    with explained(f"cannot read the processor of '{folder}'"):
        images = with_settings(getattr(read_processor(folder, config), "image_processor", None), settings)
    wanted = json.loads(images.to_json_string())
    file, content = folder / "processor_config.json", {}
    if file.is_file():
        content = read_json(file)
    if "image_processor" in content:
        content["image_processor"] = wanted
    else:
        file = folder / "preprocessor_config.json"
        kept = read_json(file) if file.is_file() else {}
        content = {**wanted, **{name: kept[name] for name in ("processor_class",) if name in kept}}
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    again = read_processor(folder, config).image_processor
    if json.loads(again.to_json_string()) != wanted:
        raise SvlError(f"model.image_processor cannot be exported: {type(again).__name__} is not read from {file.name}")


def image_processor_class(name: str) -> Any:
    """The image processor of transformers of this name.

    Raises:
        SvlError: if there is none.
    """
    import transformers

    known = [each for each in dir(transformers) if each.endswith("ImageProcessor")]
    if name not in known:
        raise SvlError(f"model.image_processor.{KIND} '{name}' is no class of transformers{did_you_mean(name, known)}")
    try:
        return getattr(transformers, name)
    except ImportError as error:
        raise SvlError(f"model.image_processor.{KIND}: {reason_of(error)}") from error
