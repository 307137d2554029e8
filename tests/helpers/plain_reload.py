"""Compute logits of checkpoints with transformers alone, where svl cannot be imported.

    python -I plain_reload.py FOLDER...

Each folder has a checkpoint, `pruned`, and model inputs, `inputs.safetensors`; its `logits.safetensors` is written.
"""

import sys

sys.modules["svl"] = None  # type: ignore[assignment] # from here on, importing it fails

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model, info = AutoModelForImageTextToText.from_pretrained(
        f"{folder}/pruned", dtype="float32", output_loading_info=True
    )
    if any(info.values()):
        sys.exit(f"{folder}: {info}")
    AutoProcessor.from_pretrained(f"{folder}/pruned")
    with torch.inference_mode():
        logits = model(**load_file(f"{folder}/inputs.safetensors")).logits
    save_file({"logits": logits.contiguous()}, f"{folder}/logits.safetensors")
