"""Configuration of mPLUG-Owl2: the fields of the original `config.json`, under their names."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.models.llama.configuration_llama import LlamaConfig


@strict
class MPLUGOwl2VisionConfig(PreTrainedConfig):
    """The vision tower, CLIP's ViT-L with fused projections.

    Attributes:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: of the transformer.
        image_size, patch_size: in pixels; images are squares.
        use_cls_token, use_post_layernorm: false in mPLUG-Owl2.1 only, which is another model.
    """

    model_type = "mplug_owl_vision_model"
    base_config_key = "visual_model"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 448
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cls_token: bool = True
    use_post_layernorm: bool = True


@strict
class MPLUGOwl2AbstractorConfig(PreTrainedConfig):
    """The visual abstractor.

    Attributes:
        num_learnable_queries: an image becomes as many visual tokens, and one that ends it.
        hidden_size, encoder_hidden_size: width of queries and of what they look at, the tower's.
        intermediate_size, num_hidden_layers, num_attention_heads: of its layers.
        grid_size: patches along a side of an image (null in original checkpoints: 32).
    """

    model_type = "mplug_owl_visual_abstract"
    base_config_key = "visual_abstractor"

    num_learnable_queries: int = 64
    hidden_size: int = 1024
    encoder_hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 6
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    grid_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.grid_size = self.grid_size or 32
        super().__post_init__(**kwargs)


@strict
class MPLUGOwl2VisualConfig(PreTrainedConfig):
    """Vision tower (`visual_model`) and abstractor (`visual_abstractor`); each a config, or its fields."""

    model_type = "mplug_owl2_visual"
    base_config_key = "visual_config"
    sub_configs = {"visual_model": MPLUGOwl2VisionConfig, "visual_abstractor": MPLUGOwl2AbstractorConfig}

    visual_model: Any = None
    visual_abstractor: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name, kind in self.sub_configs.items():
            given = getattr(self, name) or {}
            if not isinstance(given, PreTrainedConfig):
                # original checkpoints list all defaults of the transformers of 2023, too
                known = {field.name for field in fields(kind)}
                setattr(self, name, kind(**{k: v for k, v in given.items() if k in known}))
        super().__post_init__(**kwargs)


@strict
class MPLUGOwl2Config(LlamaConfig):
    """An mPLUG-Owl2: LLaMA's fields at the top, the visual parts' under `visual_config`.

    Attributes:
        visual_config: a `MPLUGOwl2VisualConfig`, or its fields.
        image_token_index: stands where a visual token goes; default: the one after the vocabulary's last.

    Raises:
        ValueError: if the visual parts do not fit each other, or are those of mPLUG-Owl2.1.
    """

    model_type = "mplug_owl2"
    sub_configs = {"visual_config": MPLUGOwl2VisualConfig}

    visual_config: Any = None
    image_token_index: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)  # names code that may come with a checkpoint and is not needed here
        if not isinstance(self.visual_config, PreTrainedConfig):
            given = self.visual_config or {}
            self.visual_config = MPLUGOwl2VisualConfig(**{k: v for k, v in given.items() if k != "model_type"})
        if self.image_token_index is None:
            self.image_token_index = self.vocab_size
        super().__post_init__(**kwargs)
        tower, abstractor = self.visual_config.visual_model, self.visual_config.visual_abstractor
        if not (tower.use_cls_token and tower.use_post_layernorm):
            raise ValueError("a visual_model without use_cls_token and use_post_layernorm belongs to mPLUG-Owl2.1")
        if not tower.hidden_size == abstractor.encoder_hidden_size == abstractor.hidden_size:
            raise ValueError(
                f"hidden_size {tower.hidden_size} of visual_model is not encoder_hidden_size and hidden_size of "
                f"visual_abstractor ({abstractor.encoder_hidden_size}, {abstractor.hidden_size})"
            )
        if tower.image_size // tower.patch_size != abstractor.grid_size:
            raise ValueError(
                f"images of {tower.image_size} pixels in patches of {tower.patch_size} do not make the grid_size "
                f"{abstractor.grid_size} of visual_abstractor"
            )

    @property
    def image_seq_length(self) -> int:
        """Visual tokens per image."""
        return self.visual_config.visual_abstractor.num_learnable_queries + 1


__all__ = ["MPLUGOwl2AbstractorConfig", "MPLUGOwl2Config", "MPLUGOwl2VisionConfig", "MPLUGOwl2VisualConfig"]
