"""mPLUG-Owl2 (Ye et al., 2023, https://arxiv.org/abs/2311.04257) for today's transformers."""


def register() -> None:
    """Make the model known to transformers' Auto classes, under the type that its checkpoints name ("mplug_owl2")."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    from svl.models.ports.mplug_owl2.configuration_mplug_owl2 import MPLUGOwl2Config
    from svl.models.ports.mplug_owl2.modeling_mplug_owl2 import MPLUGOwl2ForConditionalGeneration
    from svl.models.ports.mplug_owl2.processing_mplug_owl2 import MPLUGOwl2Processor
    from svl.models.ports.mplug_owl2.tokenization_mplug_owl2 import MPLUGOwl2Tokenizer

    AutoConfig.register(MPLUGOwl2Config.model_type, MPLUGOwl2Config, exist_ok=True)
    AutoModelForImageTextToText.register(MPLUGOwl2Config, MPLUGOwl2ForConditionalGeneration, exist_ok=True)
    AutoTokenizer.register(MPLUGOwl2Config, tokenizer_class=MPLUGOwl2Tokenizer, exist_ok=True)
    AutoProcessor.register(MPLUGOwl2Config, MPLUGOwl2Processor, exist_ok=True)
