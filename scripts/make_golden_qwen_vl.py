"""What the original code of Qwen-VL-Chat computes, for tests/models/ports/test_qwen_vl.py.

    python scripts/make_golden_qwen_vl.py FOLDER [QWEN_TIKTOKEN]

FOLDER holds the code that comes with the original checkpoint (configuration_qwen.py, modeling_qwen.py, visual.py,
qwen_generation_utils.py, tokenization_qwen.py), QWEN_TIKTOKEN is its vocabulary. Needs what that code needs:
transformers 4.37.2 (tokenizers 0.15.2, huggingface_hub 0.20.3), transformers_stream_generator, einops, tiktoken,
matplotlib. None of the original code is here; the test imports this file for the sizes, weights and inputs.

The files in tests/models/ports/golden/qwen_vl were made from the code in GitHub x1ngzai/Qwen-VL-Chat-Int4 at
1cd721a27dd000fc4cf688c6ad58e614da1d600d (21 October 2023), a copy of the Hugging Face repository Qwen/Qwen-VL-Chat-
Int4; its model code does not depend on the quantisation. It writes "Picture 1:" without a blank before the image, the
later Qwen-VL-Chat with one (as in GitHub yellow-binary-tree/Pfram at 14be738), which is what the conversations here
have.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import types
import unicodedata
import zlib
from base64 import b64encode
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

OUT = Path(__file__).parents[1] / "tests" / "models" / "ports" / "golden" / "qwen_vl"
START, WORDS = 300, 256  # id of <img>; ordinary tokens are below
SHOWN = (slice(None), slice(-32, None), slice(None, None, 8))  # of logits [B, T, vocabulary]
TOWER = {"width": 48, "layers": 2, "heads": 3, "mlp_ratio": 4.9231, "image_size": 28, "patch_size": 7, "n_queries": 16,
         "output_dim": 128, "image_start_id": START}  # fmt: skip
SIZES = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "kv_channels": 32, "seq_length": 512, "visual": TOWER,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "short": SIZES,
    "long": {**SIZES, "seq_length": 24},
    "plain": {**SIZES, "seq_length": 24, "use_dynamic_ntk": False, "use_logn_attn": False, "no_bias": False},
    # as many patches and queries as the real one, two heads of the resampler
    "grid": {
        **SIZES, "hidden_size": 256, "kv_channels": 64, "visual": {
            **TOWER, "width": 32, "heads": 2, "image_size": 64, "patch_size": 2, "n_queries": 256, "output_dim": 256,
        },
    },
}  # fmt: skip
# case -> lengths of the texts after each image; a batch has several prompts, a prompt starts with text
CASES: dict[str, dict[str, list[list[int]]]] = {
    "short": {
        "text": [[20]],
        "image": [[6, 9]],
        "images": [[3, 4, 8]],
        "batch": [[5, 20], [4, 9]],
        "texts": [[9], [23]],
    },
    "long": {
        "text": [[70]],
        "image": [[9, 30]],
        "images": [[3, 4, 8]],
        "batch": [[12, 40], [4, 9]],
        "crossing": [[21]],
    },
    "plain": {"text": [[70]], "batch": [[12, 40], [4, 9]]},
    "grid": {"image": [[5, 12]]},
}
STEPS = 6  # of continuations, all but the first from the cache


def fill(model: nn.Module, seed: int = 0) -> None:
    """Weights that depend on their name and shape alone; fixed tables of positions stay."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("pos_embed"):
                continue
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode())))
            if p.ndim > 1:
                scale = 1.0 if name.endswith(("wte.weight", "query", "positional_embedding")) else p[0].numel() ** -0.5
                p.copy_(
                    noise * scale * (2 if "c_attn" in name or "in_proj" in name else 0.25 if "lm_head" in name else 1)
                )
            else:
                p.copy_(0.2 * noise + (0 if name.endswith("bias") else 1))


def picture(number: int) -> Image.Image:
    """A picture of noise, wider than high."""
    pixels = np.random.default_rng(number).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((60, 41), Image.Resampling.BILINEAR)


def inputs(config: str, case: str) -> tuple[Tensor, Tensor, int]:
    """Token ids [B, T] with <imgpad> in the places of images, padding on the left; the mask; the number of images."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{config}/{case}".encode()))
    queries = CONFIGS[config]["visual"]["n_queries"]
    rows, images = [], 0
    for lengths in CASES[config][case]:
        row = torch.randint(0, WORDS, (lengths[0],), generator=generator).tolist()
        for length in lengths[1:]:
            row += [START, *[START + 2] * queries, START + 1]
            row += torch.randint(0, WORDS, (length,), generator=generator).tolist()
            images += 1
        rows.append(row)
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask, images


# ------------------------------------------------------------------------------------------------- strings

PIECES = [
    "Hello, world!", "What is in the picture?", "  two  blanks, three   blanks ",
    "I'm sure they'll say we've DON'T", "\t\ttabs", "你好，世界！", "图中有什么？请详细描述一下。",
    "北京是中华人民共和国的首都", "日本語のテキスト、カタカナ", "한국어 문장입니다", "繁體中文「引號」",
    "😀😃😄", "👩‍👩‍👧‍👦 family", "🇨🇳🇺🇸", "❤️‍🔥", "a😀b", "🤷🏽‍♂️ ok", "naïve café",
    "nai\u0308ve cafe\u0301", "A\u030a Å \u212b", "ﬁ ½ ² ③", "1234567890", "3.14159", "1,000,000",
    "2023-10-21T19:42:10", "x=1;y=2", "def f(x):\n    return x**2\n", '{"a": [1, 2]}', "<html><b>x</b></html>",
    "русский текст", "ελληνικά", "العربية نص", "עברית", "हिन्दी पाठ", "ไทย", "Tiếng Việt",
    "\u200bzero\u200bwidth", "\ufeffbom", "e\u0338 >\u0338", "\r\nline\r\n\r\nend", " ", "   ", "\n", "\n\n",
    "\n \n", "a \n b", "!!!", "...?!", "'S 'T 'LL 'Re", "ſ 'ſ", "İstanbul", "STRASSE straße", "ǅ", "a'b'c",
    "''s", "_under_score_", "\u00a0nbsp\u2003em", "\x00\x01\x7f", "\U0010ffff", "<|endoftext|>",
    "<|im_start|>user\n", "<|im_end|>\n", "<|extra_0|>", "<|extra_204|>", "<|extra_205|>", "< |im_end|>",
    "<|IM_END|>", "<ref>the dog</ref><box>(10,20),(300,400)</box>", "<quad>(1,1),(2,2)</quad>", "< img>",
    "<imgpad", "</box><box>", "<<box>>", "<ref>\u0338dog</ref>", "<box>\u0301", "<|im_end|>\u0338",
    "aaaaaaaaaaaaaaaaaaa", "hahahahahahaha", "的的的的的的的", "------------", "You are a helpful assistant.",
    "Picture 1: ", "Antidisestablishmentarianism", "http://example.org/a?b=c&d=%20",
]  # fmt: skip
IMAGES = [
    "<img>a.png</img>", "Picture 1: <img>photos/dog.jpg</img>\nWhat is this?",
    "<img>a.png</img><img>图片.png</img>", "Picture 1: <img>x</img>\nPicture 2: <img>y</img>\n比较",
    "<img>a b.png</img> after", "before<img>/tmp/😀.png</img>",
]  # fmt: skip
CHATS: list[list[tuple[list[str | None], str | None]]] = [  # turns: parts (None: an image) and answer
    [([None, "What is this?"], None)],
    [(["你好"], None)],
    [([None, None, "Compare them."], "They differ.\nA lot."), (["How?"], "In colour."), ([None, "And this?"], None)],
]  # fmt: skip


def strings() -> list[str]:
    """200 texts, of which the last ones have images."""
    draw = np.random.default_rng(0)
    mixed = [
        "".join(PIECES[i] for i in draw.integers(0, len(PIECES), 4)) for _ in range(200 - len(PIECES) - len(IMAGES))
    ]
    return [*PIECES, *mixed, *IMAGES]


def vocabulary(texts: list[str], size: int) -> dict[bytes, int]:
    """A small vocabulary: all bytes, and the pairs that byte-pair encoding finds most often in the words of `texts`."""
    words = [[bytes([b]) for b in word.encode()] for text in texts for word in text.split(" ")]
    ranks = {bytes([b]): i for i, b in enumerate(sorted(range(256), key=lambda b: (not 33 <= b <= 126, b)))}
    while len(ranks) < size:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        first, second = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.setdefault(first + second, len(ranks))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (first, second):
                    word[i : i + 2] = [first + second]
                i += 1
    return ranks


# ---------------------------------------------------------------------------------------------- the original


def original(folder: Path) -> Any:
    """The original modules, as attributes of a package."""
    package = types.ModuleType("original")
    package.__path__ = [str(folder)]
    sys.modules["original"] = package
    for name in ("configuration_qwen", "modeling_qwen", "visual", "tokenization_qwen", "qwen_generation_utils"):
        setattr(package, name, importlib.import_module(f"original.{name}"))
    return package


def with_paths(ids: Tensor) -> Tensor:
    """The same ids with the bytes of an image's path after each <img>: files 0, 1, .. of the working folder."""
    ids = ids.clone()
    for number, (row, column) in enumerate((ids == START).nonzero().tolist()):
        ids[row, column + 1] = ord(str(number))
    return ids


def logits(code: Any, config: str, case: str) -> dict[str, Tensor]:
    """Logits of a prompt and of its greedy continuation, step by step."""
    given = code.configuration_qwen.QWenConfig(**CONFIGS[config], fp32=True)
    model = code.modeling_qwen.QWenLMHeadModel(given).eval()
    fill(model)
    ids, mask, images = inputs(config, case)
    for number in range(images):
        picture(number).save(str(number), "PNG")
    steps, new = [], []
    with torch.no_grad():
        out = model(with_paths(ids), attention_mask=mask, use_cache=True)
        prompt = out.logits
        for _ in range(STEPS):
            new.append(out.logits[:, -1].argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], 1)
            out = model(new[-1], attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
    return {"ids": ids, "mask": inputs(config, case)[1], "logits": prompt[SHOWN].contiguous(), "new": torch.cat(new, 1),
            "steps": torch.cat(steps, 1)[SHOWN].contiguous()}  # fmt: skip


def padded(ids: list[int], start: int) -> list[int]:
    """Token ids with <imgpad> instead of the bytes of paths."""
    inside, result = False, []
    for token in ids:
        inside = token == start or (inside and token != start + 1)
        result.append(start + 2 if inside and token != start else token)
    return result


def encoded(code: Any, file: str) -> dict[str, Any]:
    """Ids of all strings, what decoding gives back, and conversations, with a vocabulary file."""
    tokenizer = code.tokenization_qwen.QWenTokenizer(file)
    start, texts = tokenizer.img_start_id, strings()
    ids = [padded(tokenizer(text)["input_ids"], start) for text in texts]
    plain = ids[: -len(IMAGES)]
    chats = []
    for turns in CHATS:
        said = []
        for parts, answer in turns:
            pictures = [f"Picture {n + 1}: <img>p.png</img>\n" for n in range(parts.count(None))]
            said.append(("".join(pictures) + "".join(p for p in parts if p is not None), answer))
        make = code.qwen_generation_utils.make_context
        _, context = make(tokenizer, said[-1][0], history=said[:-1], system="You are a helpful assistant.")
        chats.append(padded(context, start))
    return {
        "ids": [shortened(row, start + 2) for row in ids],
        "decoded": [tokenizer.decode(row) for row in plain],
        "skipped": [tokenizer.decode(row, skip_special_tokens=True) for row in plain],
        "chats": [shortened(row, start + 2) for row in chats],
    }


def shortened(ids: list[int], pad: int) -> list[int]:
    """Ids with every run of <imgpad> written as minus its length."""
    result: list[int] = []
    for token in ids:
        if token != pad:
            result.append(token)
        elif result and result[-1] < 0:
            result[-1] -= 1
        else:
            result.append(-1)
    return result


def main() -> None:
    """Write the files in OUT."""
    from safetensors.torch import save_file

    code = original(Path(sys.argv[1]).resolve())
    real = Path(sys.argv[2]).resolve() if len(sys.argv) > 2 else None
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        found = {
            f"{config}/{case}/{name}": tensor
            for config, cases in CASES.items()
            for case in cases
            for name, tensor in logits(code, config, case).items()
        }
        for config in CONFIGS:
            size = CONFIGS[config]["visual"]["image_size"]
            tower = code.visual.VisionTransformer(**{**CONFIGS[config]["visual"], "layers": 1})
            found[f"{config}/pixels"] = tower.image_transform(picture(0))[:, :: size // 14, :: size // 14].contiguous()
        save_file(found, OUT / "logits.safetensors")
    ranks = vocabulary([unicodedata.normalize("NFC", text) for text in strings()], 700)
    file = OUT / "qwen.tiktoken"
    file.write_bytes(b"".join(b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items()))
    result = {"strings": strings(), "small": encoded(code, str(file))}
    if real:
        result["real"] = encoded(code, str(real))
    (OUT / "tokens.json").write_text(json.dumps(result, ensure_ascii=True))


if __name__ == "__main__":
    main()
