"""Qwen-VL and Qwen-VL-Chat (Bai et al., 2023, https://arxiv.org/abs/2308.12966) for today's transformers."""


def register() -> None:
    """Make the model known to transformers' Auto classes, under the type that its checkpoints name ("qwen")."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    from svl.models.ports.qwen_vl.configuration_qwen_vl import QwenVLConfig
    from svl.models.ports.qwen_vl.modeling_qwen_vl import QwenVLForConditionalGeneration
    from svl.models.ports.qwen_vl.processing_qwen_vl import QwenVLProcessor
    from svl.models.ports.qwen_vl.tokenization_qwen_vl import QWenTokenizer

    AutoConfig.register(QwenVLConfig.model_type, QwenVLConfig, exist_ok=True)
    AutoModelForImageTextToText.register(QwenVLConfig, QwenVLForConditionalGeneration, exist_ok=True)
    AutoTokenizer.register(QwenVLConfig, tokenizer_class=QWenTokenizer, exist_ok=True)
    AutoProcessor.register(QwenVLConfig, QwenVLProcessor, exist_ok=True)
