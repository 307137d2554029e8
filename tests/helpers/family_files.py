"""Checkpoints of the families in helpers.families, with files as the hub's, for transformers' own processor classes.

`write(folder, name)` puts the family's tiny model there, a tokenizer of its 64 tokens, and the preprocessor and
processor files with the keys that real ones have (their sizes are the tiny model's).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.families import END, FAMILIES, IMAGE, START, VIDEO, VOCABULARY, Family, phi4
from helpers.hub_mimics.files import CLIP_MEAN, CLIP_STD, HALF, RESCALE, write_json
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["user", "assistant", "what", "where", "is", "the", "colour", "shape", "red", "green", "blue"]
SIDE = {"height": 16, "width": 16}
USUAL = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3,
         "rescale_factor": RESCALE}  # fmt: skip
CLIP = {**USUAL, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
HALVES = {**USUAL, "image_mean": HALF, "image_std": HALF}
PATCHES = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
QWEN = {**HALVES, **PATCHES, "size": {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}}
QWEN_TOKENS = {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>", START: "<|vision_start|>", END: "<|vision_end|>"}
QWEN_NAMES = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_bos_token": "<|vision_start|>",
              "vision_eos_token": "<|vision_end|>"}  # fmt: skip


@dataclass(frozen=True)
class Files:
    """What stands beside a family's model.

    Attributes:
        processor: its class.
        kind: the class of its image processor.
        images: of preprocessor_config.json.
        settings: of processor_config.json; None for none.
        video: of video_preprocessor_config.json, with its class.
        tokens: special ones by their ids.
        names: of tokens, as tokenizer_config.json has them.
        mark, video_mark: what the chat template writes for a picture and a video; no mark: no chat template.
        style: of prompts, as model.prompt names it.
        tokenizer: "words"; "letters" for a class that insists on BPE; "pieces", each word with its blank, as
            sentencepiece has them.
    """

    processor: str
    kind: str
    images: dict[str, Any]
    settings: dict[str, Any] | None = None
    video: dict[str, Any] | None = None
    tokens: dict[int, str] = field(default_factory=lambda: {IMAGE: "<image>"})
    names: dict[str, str] = field(default_factory=dict)
    mark: str = "<image>"
    video_mark: str = ""
    style: str = "chat"
    tokenizer: str = "words"
    model: Callable[[], Family] | None = None


FILES = {
    "aria": Files(
        "AriaProcessor", "AriaImageProcessor",
        {"do_convert_rgb": True, "do_normalize": True, "image_mean": HALF, "image_std": HALF, "max_image_size": 980,
         "min_image_size": 336, "split_image": False},
        {"image_token": "<image>", "size_conversion": {"490": 3, "980": 5}},
        names={"image_token": "<image>"},
    ),
    "aya_vision": Files(
        "AyaVisionProcessor", "GotOcr2ImageProcessor",
        {**CLIP, "crop_to_patches": True, "max_patches": 2, "min_patches": 1, "size": SIDE},
        {"downsample_factor": 2, "end_of_img_token": "<|END_OF_IMG|>", "image_token": "<image>",
         "img_line_break_token": "<|IMG_LINE_BREAK|>", "img_patch_token": "<|IMG_PATCH|>", "img_size": 16,
         "patch_size": 4, "start_of_img_token": "<|START_OF_IMG|>", "tile_global_token": "TILE_GLOBAL",
         "tile_token": "TILE"},
        tokens={IMAGE: "<|IMG_PATCH|>", VIDEO: "<image>", START: "<|START_OF_IMG|>", END: "<|END_OF_IMG|>",
                58: "TILE_GLOBAL", 59: "TILE_1"},
    ),
    "blip2": Files(
        "Blip2Processor", "BlipImageProcessor", {**CLIP, "size": SIDE},
        {"image_token": None, "num_query_tokens": 5}, mark="", style="plain",
    ),
    "cohere2_vision": Files(
        "Cohere2VisionProcessor", "Cohere2VisionImageProcessor",
        {**HALVES, "crop_to_patches": True, "max_patches": 2, "min_patches": 1, "patch_size": 2, "size": SIDE},
        {"patch_size": 2},
        tokens={IMAGE: "<|IMG_PATCH|>", VIDEO: "<|IMG_LINE_BREAK|>", START: "<|START_OF_IMG|>", END: "<|END_OF_IMG|>"},
        names={"image_token": "<|IMG_PATCH|>", "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>",
               "img_line_break_token": "<|IMG_LINE_BREAK|>"},
        mark="<|IMG_PATCH|>",
    ),
    "deepseek_vl": Files(
        "DeepseekVLProcessor", "DeepseekVLImageProcessor", {**HALVES, "do_pad": True, "min_size": 4, "size": SIDE},
        {"num_image_tokens": 16}, tokens={IMAGE: "<image_placeholder>"},
        names={"image_token": "<image_placeholder>"}, mark="<image_placeholder>",
    ),
    "fast_vlm": Files(
        "LlavaProcessor", "CLIPImageProcessor",
        {**CLIP, "do_center_crop": True, "crop_size": {"height": 64, "width": 64}, "size": {"shortest_edge": 64}},
        {"image_token": "<image>", "num_additional_image_tokens": 0, "patch_size": 32,
         "vision_feature_select_strategy": "full"},
        names={"image_token": "<image>"},
    ),
    "fuyu": Files(
        "FuyuProcessor", "FuyuImageProcessor",
        {**HALVES, "do_pad": True, "padding_mode": "constant", "padding_value": 1.0,
         "patch_size": {"height": 4, "width": 4}, "size": SIDE},
        tokens={IMAGE: "|SPEAKER|", VIDEO: "|NEWLINE|", 1: "<s>", 4: "\u2581", 59: "\x04"}, mark="", style="plain",
        tokenizer="pieces",
    ),
    "gemma4": Files(
        "Gemma4Processor", "Gemma4ImageProcessor",
        {**HALVES, "max_soft_tokens": 70, "patch_size": 4, "pooling_kernel_size": 2},
        {"image_seq_length": 70, "audio_seq_length": 750, "audio_ms_per_token": 40,
         "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor", "feature_size": 128}},
        video={"video_processor_type": "Gemma4VideoProcessor", "max_soft_tokens": 70, "patch_size": 4,
               "pooling_kernel_size": 2, "do_sample_frames": True, "num_frames": 32},
        tokens={IMAGE: "<|image|>", VIDEO: "<|video|>", START: "<|image>", END: "<image|>", 57: "<|audio|>",
                58: "<|audio>", 59: "<audio|>"},
        names={"image_token": "<|image|>", "video_token": "<|video|>", "boi_token": "<|image>",
               "eoi_token": "<image|>", "audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"},
        mark="<|image|>", video_mark="<|video|>",
    ),
    "glm4v": Files(
        "Glm4vProcessor", "Glm4vImageProcessor", {**QWEN},
        video={**QWEN, "video_processor_type": "Glm4vVideoProcessor", "fps": 2, "num_frames": 16},
        tokens={IMAGE: "<|image|>", VIDEO: "<|video|>", START: "<|begin_of_image|>", END: "<|end_of_image|>",
                58: "<|begin_of_video|>", 59: "<|end_of_video|>"},
        mark="<|begin_of_image|><|image|><|end_of_image|>",
        video_mark="<|begin_of_video|><|video|><|end_of_video|>",
    ),
    "idefics2": Files(
        "Idefics2Processor", "Idefics2ImageProcessor",
        {**HALVES, "do_image_splitting": False, "do_pad": True, "size": {"longest_edge": 16, "shortest_edge": 8}},
        {"image_seq_len": 5},
        tokens={IMAGE: "<image>", START: "<fake_token_around_image>", END: "<end_of_utterance>"},
    ),
    "idefics3": Files(
        "Idefics3Processor", "Idefics3ImageProcessor",
        {**HALVES, "do_image_splitting": True, "do_pad": True, "max_image_size": {"longest_edge": 16},
         "size": {"longest_edge": 32}},
        {"image_seq_len": 4},
        tokens={IMAGE: "<image>", START: "<fake_token_around_image>", END: "<end_of_utterance>", 59: "<global-img>"},
    ),
    "instructblip": Files(
        "InstructBlipProcessor", "BlipImageProcessor", {**CLIP, "size": SIDE},
        {"image_token": None, "num_query_tokens": 5}, mark="", style="plain",
    ),
    "janus": Files(
        "JanusProcessor", "JanusImageProcessor", {**HALVES, "do_pad": True, "min_size": 4, "size": SIDE},
        {"num_image_tokens": 16, "use_default_system_prompt": False},
        tokens={IMAGE: "<image_placeholder>", START: "<begin_of_image>", END: "<end_of_image>"},
        names={"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"},
        mark="<image_placeholder>",
    ),
    "kosmos2_5": Files(
        "Kosmos2_5Processor", "Kosmos2_5ImageProcessor",
        {"do_convert_rgb": True, "do_normalize": True, "max_patches": 16, "patch_size": {"height": 2, "width": 2}},
        {"num_image_tokens": 5}, tokens={IMAGE: "<s>", START: "<image>", END: "</image>"},
        names={"image_token": "<s>", "boi_token": "<image>", "eoi_token": "</image>"}, mark="", style="plain",
    ),
    "lfm2_vl": Files(
        "Lfm2VlProcessor", "Lfm2VlImageProcessor",
        {**HALVES, "do_image_splitting": True, "do_pad": True, "downsample_factor": 2, "encoder_patch_size": 4,
         "max_image_tokens": 4, "max_num_patches": 16, "max_pixels_tolerance": 2.0, "max_tiles": 4,
         "min_image_tokens": 1, "min_tiles": 2, "tile_size": 16, "use_thumbnail": True, "return_row_col_info": True},
        {},
        tokens={IMAGE: "<image>", START: "<|image_start|>", END: "<|image_end|>", 59: "<|img_thumbnail|>"},
        names={"image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>",
               "image_thumbnail": "<|img_thumbnail|>"},
    ),
    "llama4": Files(
        "Llama4Processor", "Llama4ImageProcessor",
        {**HALVES, "max_patches": 4, "resize_to_max_canvas": False, "size": SIDE},
        {"fake_image_token": "<|image|>", "image_token": "<|image|>", "patch_size": 4, "pixel_shuffle_ratio": 0.5,
         "start_of_image_token": "<|image_start|>", "end_of_image_token": "<|image_end|>", "patch_token": "<|patch|>",
         "tile_x_separator_token": "<|tile_x_separator|>", "tile_y_separator_token": "<|tile_y_separator|>"},
        tokens={IMAGE: "<|patch|>", VIDEO: "<|image|>", START: "<|image_start|>", END: "<|image_end|>",
                58: "<|tile_x_separator|>", 59: "<|tile_y_separator|>"},
        mark="<|image|>",
    ),
    "mistral3": Files(
        "PixtralProcessor", "PixtralImageProcessor",
        {**CLIP, "patch_size": {"height": 4, "width": 4}, "size": {"longest_edge": 16}},
        {"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]", "image_token": "[IMG]", "patch_size": 4,
         "spatial_merge_size": 2},
        tokens={IMAGE: "[IMG]", START: "[IMG_BREAK]", END: "[IMG_END]"}, mark="[IMG]",
    ),
    "mllama": Files(
        "MllamaProcessor", "MllamaImageProcessor", {**CLIP, "do_pad": True, "max_image_tiles": 1, "size": SIDE},
        tokens={IMAGE: "<|image|>", END: "<|python_tag|>"}, names={"image_token": "<|image|>"}, mark="<|image|>",
    ),
    "molmo2": Files(
        "Molmo2Processor", "Molmo2ImageProcessor",
        {**HALVES, "max_crops": 2, "overlap_margins": [1, 1], "patch_size": 4, "pooling_size": [2, 2], "size": SIDE},
        {"image_use_col_tokens": True, "use_frame_special_tokens": True, "use_single_crop_col_tokens": False,
         "use_single_crop_start_token": True, "video_use_col_tokens": False},
        video={"video_processor_type": "Molmo2VideoProcessor", "max_fps": 2, "num_frames": 64, "patch_size": 4,
               "pooling_size": [2, 2], "size": SIDE},
        tokens={IMAGE: "<im_patch>", VIDEO: "<|video|>", START: "<im_start>", END: "<im_end>", 59: "<|image|>",
                58: "<im_col>", 57: "<low_res_im_start>", 56: "<frame_start>", 55: "<frame_end>", 54: "<im_low>"},
        names={"image_token": "<|image|>", "video_token": "<|video|>"}, mark="<|image|>", video_mark="<|video|>",
    ),
    "ovis2": Files(
        "Ovis2Processor", "Ovis2ImageProcessor",
        {**CLIP, "crop_to_patches": True, "max_patches": 2, "min_patches": 1, "size": SIDE,
         "use_covering_area_grid": True},
        {"image_seq_length": 4, "image_token": "<image>"},
        tokens={IMAGE: "<IMG_ATOM>", VIDEO: "<image>", 51: "<IMG_START>", 52: "<IMG_GRID>", 53: "<IMG_COL>",
                54: "<IMG_ROW>", 55: "<IMG_END>"},
    ),
    "paligemma": Files(
        "PaliGemmaProcessor", "SiglipImageProcessor", {**HALVES, "image_seq_length": 16, "size": SIDE},
        names={"image_token": "<image>"}, mark="", style="paligemma",
    ),
    "perception_lm": Files(
        "PerceptionLMProcessor", "PerceptionLMImageProcessor",
        {**HALVES, "max_num_tiles": 4, "size": SIDE, "tile_size": 16, "vision_input_type": "thumb+tile"},
        {"patch_size": 4, "pooling_ratio": 2},
        video={**HALVES, "video_processor_type": "PerceptionLMVideoProcessor", "size": SIDE},
        tokens={IMAGE: "<|image|>", VIDEO: "<|video|>"},
        names={"image_token": "<|image|>", "video_token": "<|video|>"}, mark="<|image|>", video_mark="<|video|>",
    ),
    "phi4_multimodal": Files(
        "Phi4MultimodalProcessor", "Phi4MultimodalImageProcessor",
        {**HALVES, "dynamic_hd": 2, "patch_size": 4, "size": {"height": 128, "width": 128}},
        {"audio_processor": {"feature_extractor_type": "Phi4MultimodalFeatureExtractor", "feature_size": 16}},
        tokens={IMAGE: "<|image|>", VIDEO: "<|audio|>"},
        names={"image_token": "<|image|>", "audio_token": "<|audio|>"}, mark="<|image|>",
        model=lambda: phi4(128, 545),  # its processor counts as many tokens, whatever the size
    ),
    "pixtral": Files(
        "PixtralProcessor", "PixtralImageProcessor",
        {**CLIP, "patch_size": {"height": 4, "width": 4}, "size": {"longest_edge": 16}},
        {"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]", "image_token": "[IMG]", "patch_size": 4},
        tokens={IMAGE: "[IMG]", START: "[IMG_BREAK]", END: "[IMG_END]"}, mark="[IMG]",
    ),
    "qwen3_5": Files(
        "Qwen3VLProcessor", "Qwen2VLImageProcessor", QWEN,
        video={**QWEN, "video_processor_type": "Qwen3VLVideoProcessor"},
        tokens=QWEN_TOKENS, names=QWEN_NAMES, mark="<|vision_start|><|image_pad|><|vision_end|>",
        video_mark="<|vision_start|><|video_pad|><|vision_end|>", tokenizer="letters",
    ),
    "qwen3_vl_moe": Files(
        "Qwen3VLProcessor", "Qwen2VLImageProcessor", QWEN,
        video={**QWEN, "video_processor_type": "Qwen3VLVideoProcessor"},
        tokens=QWEN_TOKENS, names=QWEN_NAMES, mark="<|vision_start|><|image_pad|><|vision_end|>",
        video_mark="<|vision_start|><|video_pad|><|vision_end|>",
    ),
    "vipllava": Files(
        "LlavaProcessor", "CLIPImageProcessor",
        {**CLIP, "crop_size": SIDE, "do_center_crop": True, "size": {"shortest_edge": 16}},
        names={"image_token": "<image>"},
    ),
}  # fmt: skip


def write(folder: Path, name: str) -> Path:
    """A checkpoint of the family, as `svl.load` reads it; its folder."""
    files = FILES[name]
    (files.model or FAMILIES[name])().model.save_pretrained(folder)
    write_tokenizer(folder, files)
    known = {"processor_class": files.processor}
    write_json(folder, preprocessor_config={**files.images, "image_processor_type": files.kind, **known})
    if files.settings is not None:
        write_json(folder, processor_config={**files.settings, **known})
    if files.video is not None:
        write_json(folder, video_preprocessor_config={**files.video, **known})
    if files.mark:
        write_json(folder, chat_template={"chat_template": template(files)})
    return folder


def template(files: Files) -> str:
    """One line a turn, its parts in their order."""
    part = (
        f"{{% if part['type'] == 'image' %}}{files.mark}{{% elif part['type'] == 'video' %}}{files.video_mark}"
        "{% else %}{{ part['text'] }}{% endif %}"
    )
    return (
        f"{{% for m in messages %}}{{{{ m['role'] }}}} {{% for part in m['content'] %}}{part}{{% endfor %}}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )


def write_tokenizer(folder: Path, files: Files) -> None:
    """Words from 5 on, special tokens where the family's config has them."""
    special = {0: "<pad>", 1: "<bos>", 2: "<eos>", 3: "<unk>", **files.tokens}
    ordinary = {"words": WORDS, "letters": "Ġabcdefghijklmnopqrstuvwxyz", "pieces": [f"▁{word}" for word in WORDS]}
    words = iter([*ordinary[files.tokenizer], *(f"word{i}" for i in range(VOCABULARY))])
    vocabulary = {special.get(i) or next(words): i for i in range(VOCABULARY)}
    if files.tokenizer == "pieces":
        core = Tokenizer(models.Unigram([(piece, -1.0) for piece in vocabulary], unk_id=3))
        core.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        if files.tokenizer == "letters":
            core = Tokenizer(models.BPE(vocabulary, []))
        core.add_special_tokens(list(special.values()))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
    start = special[1]
    core.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 1)])
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    ends = {"bos_token": start, "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_json(
        folder,
        tokenizer_config={**ends, **files.names, "extra_special_tokens": files.names, "model_max_length": 256,
                          "processor_class": files.processor, "tokenizer_class": "PreTrainedTokenizerFast"},
    )  # fmt: skip
