"""Models in the shape of LLaVA-1.5 with random weights, and a processor made on the spot: for measurements that need
neither trained weights nor files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import svl
from svl.models.anatomy import find_anatomy

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
)
WORDS = [f"w{i}" for i in range(1000)]


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA-1.5."""

    name: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    ratios: tuple[float, ...]
    side: int = 336
    vision_hidden: int = 1024
    vision_layers: int = 24
    vocabulary: int = 32064

    @property
    def visual(self) -> int:
        """Visual tokens of a picture."""
        return (self.side // 14) ** 2

    def config(self) -> LlavaConfig:
        """The config of LLaVA-1.5, in these sizes."""
        vision = CLIPVisionConfig(
            hidden_size=self.vision_hidden, intermediate_size=4 * self.vision_hidden, patch_size=14,
            num_hidden_layers=self.vision_layers, num_attention_heads=self.vision_hidden // 64, image_size=self.side,
        )  # fmt: skip
        text = LlamaConfig(
            hidden_size=self.hidden, intermediate_size=self.mlp, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, vocab_size=self.vocabulary, max_position_embeddings=4096,
        )  # fmt: skip
        image = self.vocabulary - 1
        return LlavaConfig(vision_config=vision, text_config=text, image_token_id=image, image_seq_length=self.visual)

    def processor(self) -> LlavaProcessor:
        """A word-level tokenizer, and pictures as CLIP takes them."""
        words = {word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS])}
        core = Tokenizer(models.WordLevel(words | {"<image>": self.vocabulary - 1}, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
            additional_special_tokens=["<image>"], padding_side="left",
        )  # fmt: skip
        pictures = CLIPImageProcessor(
            size={"shortest_edge": self.side}, crop_size={"height": self.side, "width": self.side}
        )
        return LlavaProcessor(
            pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=TEMPLATE,
        )  # fmt: skip


SHAPES = {
    "7b": Shape("LLaVA-1.5-7B", 4096, 11008, 32, 32, (0.1, 0.2, 0.3)),
    "13b": Shape("LLaVA-1.5-13B", 5120, 13824, 40, 40, (0.2, 0.3, 0.4)),
}
SMALL = {
    "7b": Shape("tiny", 64, 172, 8, 4, (0.125, 0.25), 56, 64, 2, 1100),
    "13b": Shape("tiny, deeper", 64, 172, 10, 4, (0.2,), 56, 64, 2, 1100),
}


def random_llava(shape: Shape, device: torch.device) -> svl.Lvlm:
    """The model in bf16, its weights drawn on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(
            shape.config(), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.requires_grad_(False).eval()
    anatomy = find_anatomy(model, image_token=shape.vocabulary - 1)
    return svl.Lvlm(model, shape.processor(), anatomy, shape.name)
