"""Vision-language and text models: loading them, finding their parts, writing their prompts."""

import logging

# torchao, which transformers imports wherever it is installed, makes torch warn of a call that it no longer needs. Said
# here, because that happens while transformers is imported.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
