"""What the original code of mPLUG-Owl2 computes, for tests/models/ports/test_mplug_owl2.py.

    python scripts/make_golden_mplug_owl2.py FOLDER

FOLDER is the folder mPLUG-Owl2 of GitHub X-PLUG/mPLUG-Owl (which has the package mplug_owl2). Needs what that code
needs: transformers 4.31.0 (tokenizers 0.13.3, huggingface_hub 0.19.4), PyTorch 2.1.2, NumPy 1.26, sentencepiece,
protobuf, einops, icecream, Pillow. None of the original code is here; the test imports this file for the sizes, weights
and inputs.

The files in tests/models/ports/golden/mplug_owl2 were made from X-PLUG/mPLUG-Owl at
0f3068fdb47b77aedc71fc39f5735cd7aa35e8f9 (2 April 2025).
LLaMA's vocabulary is not free, so `tokenizer.model` is a small one, trained with the settings of LLaMA's.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

OUT = Path(__file__).parents[1] / "tests" / "models" / "ports" / "golden" / "mplug_owl2"
WORDS = 300  # ordinary tokens are below
IMAGE = -200  # what stands for an image in the original's ids
SHOWN = (slice(None), slice(-32, None), slice(None, None, 8))  # of logits [B, T, vocabulary]
TOWER = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3,
         "image_size": 28, "patch_size": 7}  # fmt: skip
ABSTRACTOR = {"hidden_size": 48, "encoder_hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_learnable_queries": 6, "grid_size": 4}  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "rms_norm_eps": 1e-5, "visual_config": {"visual_model": TOWER, "visual_abstractor": ABSTRACTOR},
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "short": SIZES,
    "other": {**SIZES, "rms_norm_eps": 1e-6, "rope_theta": 500.0, "attention_bias": True, "hidden_act": "gelu"},
    # as many patches and queries as the real one
    "grid": {
        **SIZES, "visual_config": {
            "visual_model": {**TOWER, "image_size": 64, "patch_size": 2},
            "visual_abstractor": {**ABSTRACTOR, "num_learnable_queries": 64, "grid_size": 32},
        },
    },
}  # fmt: skip
# case -> lengths of the texts before, between and after images, by row
CASES: dict[str, dict[str, list[list[int]]]] = {
    "short": {
        "text": [[20]],
        "image": [[6, 9]],
        "images": [[3, 4, 8]],
        "adjacent": [[5, 0, 7]],
        "long": [[300]],
        "texts": [[9], [23]],
        "batch": [[5, 20], [4, 9]],
        "right": [[5, 20], [4, 9]],
        "uneven": [[5, 3, 20], [4, 9], [11]],
    },
    "other": {"text": [[70]], "image": [[9, 130]], "batch": [[12, 40], [4, 9]]},
    "grid": {"image": [[5, 12]], "images": [[2, 9, 30]]},
}
RIGHT = ("right",)  # padded on the right, and not continued; all other batches are padded on the left
STEPS = 6  # of continuations, all but the first from the cache


def fill(model: nn.Module, seed: int = 0) -> None:
    """Weights that depend on their name and shape alone."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode())))
            if p.ndim > 1:
                large = name.endswith(("embed_tokens.weight", "query_embeds", "position_embedding", "_token", "_eos"))
                scale = 1.0 if large else p[0].numel() ** -0.5
                uneven = any(part in name for part in ("q_proj", "k_proj", "query", "key"))
                p.copy_(noise * scale * (2 if uneven and not large else 0.25 if "lm_head" in name else 1))
            else:
                p.copy_(0.2 * noise + (0 if name.endswith("bias") else 1))


def picture(number: int) -> Image.Image:
    """A picture of noise, wider than high."""
    pixels = np.random.default_rng(number).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((60, 41), Image.Resampling.BILINEAR)


def rows(config: str, case: str) -> list[list[int]]:
    """Token ids of each prompt, with IMAGE in the places of images."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{config}/{case}".encode()))
    result = []
    for first, *others in CASES[config][case]:
        row = torch.randint(3, WORDS, (first,), generator=generator).tolist()
        for length in others:
            row += [IMAGE, *torch.randint(3, WORDS, (length,), generator=generator).tolist()]
        result.append(row)
    return result


def inputs(config: str, case: str) -> tuple[Tensor, Tensor, int]:
    """Token ids [B, T] with `vocab_size` in the places of visual tokens, padded; the mask; the number of images."""
    sizes = CONFIGS[config]
    visual = [sizes["vocab_size"]] * (sizes["visual_config"]["visual_abstractor"]["num_learnable_queries"] + 1)
    wide = [[j for i in row for j in (visual if i == IMAGE else [i])] for row in rows(config, case)]
    width, images = max(map(len, wide)), sum(row.count(IMAGE) for row in rows(config, case))
    ids = [padded(row, [0] * (width - len(row)), case) for row in wide]
    mask = [padded([1] * len(row), [0] * (width - len(row)), case) for row in wide]
    return torch.tensor(ids), torch.tensor(mask), images


def padded(row: Any, padding: Any, case: str) -> Any:
    """A row with its padding, on the side where the case has it."""
    return row + padding if case in RIGHT else padding + row


# ------------------------------------------------------------------------------------------------- strings

PIECES = [
    "Hello, world!", "What is in the picture?", "  two  blanks, three   blanks ", " one", "end ",
    "I'm sure they'll say we've DON'T", "\t\ttabs", "你好，世界！", "图中有什么？请详细描述一下。",
    "北京是中华人民共和国的首都", "日本語のテキスト、カタカナ", "한국어 문장입니다", "繁體中文「引號」",
    "😀😃😄", "👩‍👩‍👧‍👦 family", "🇨🇳🇺🇸", "❤️‍🔥", "a😀b", "🤷🏽‍♂️ ok", "naïve café",
    "nai\u0308ve cafe\u0301", "A\u030a Å \u212b", "ﬁ ½ ² ③", "1234567890", "3.14159", "1,000,000",
    "2023-10-21T19:42:10", "x=1;y=2", "def f(x):\n    return x**2\n", '{"a": [1, 2]}', "<html><b>x</b></html>",
    "русский текст", "ελληνικά", "العربية نص", "עברית", "हिन्दी पाठ", "ไทย", "Tiếng Việt",
    "\u200bzero\u200bwidth", "\ufeffbom", "\r\nline\r\n\r\nend", " ", "   ", "\n", "\n\n", "\n \n", "a \n b",
    "!!!", "...?!", "ſ 'ſ", "İstanbul", "STRASSE straße", "ǅ", "a'b'c", "_under_score_",
    "\u00a0nbsp\u2003em", "\x01\x7f", "\U0010ffff", "▁", "▁▁", " ▁ ", "a▁b", "▁start", "end▁",
    "<s>", "</s>", "<unk>", "<s>hm", "a</s>", "a </s> b", "a</s>b</s>", "<s><s>x", "</s> x", "< s>", "<S>", "<pad>",
    "<0x0A>", "<0xE4><0xBD>", "[INST] hm [/INST]", "<<SYS>>\nhm\n<</SYS>>\n\n", "<image>", "<|image", "|image|>",
    "<|Image|>", "< |image|>", "aaaaaaaaaaaaaaaaaaa", "hahahahahahaha", "的的的的的的的", "------------",
    "USER: ", "ASSISTANT:", "USER: hm ASSISTANT: hm</s>USER: hm ASSISTANT:", "http://example.org/a?b=c&d=%20",
]  # fmt: skip
IMAGES = [
    "USER: <|image|>What is this? ASSISTANT:", "USER: <|image|>图中有什么？ ASSISTANT: ", "<|image|>", "<|image|>hm",
    "<|image|> hm", "hm<|image|>", "hm <|image|>", "a<|image|><|image|>b", "<|image|>a<|image|>b", "<|image|><|image|>",
    "a<|image|> <|image|>b", "USER: <|image|>a<|image|> b ASSISTANT: c</s>USER: d ASSISTANT:", "😀<|image|>😀",
    "</s><|image|></s>", "<<|image|>>", "\n<|image|>\n",
]  # fmt: skip
CHATS: list[list[tuple[list[str | None], str | None]]] = [  # turns: parts (None: an image) and answer
    [([None, "What is this?"], None)],
    [(["你好"], None)],
    [([None, None, "Compare them."], "They differ.\nA lot."), (["How?"], "In colour."), ([None, "And this?"], None)],
    [([None, "Is it red? "], "Yes")],
]  # fmt: skip


def strings() -> list[str]:
    """200 texts, of which the last ones have images."""
    draw = np.random.default_rng(0)
    count = 200 - len(PIECES) - len(IMAGES)
    return [*PIECES, *("".join(PIECES[i] for i in draw.integers(0, len(PIECES), 4)) for _ in range(count)), *IMAGES]


def vocabulary(size: int = 700) -> bytes:
    """A small SentencePiece model like LLaMA's: byte-pair encoding, bytes for what is rare, text left as it is."""
    import sentencepiece

    model = io.BytesIO()
    prose = [line for text in PIECES for line in text.splitlines() if line.strip() and "<" not in line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prose * 20), model_writer=model, model_type="bpe", vocab_size=size, byte_fallback=True,
        character_coverage=0.98, split_digits=True, add_dummy_prefix=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


# ---------------------------------------------------------------------------------------------- the original


def original(folder: Path) -> Any:
    """The original package."""
    sys.path.insert(0, str(folder))
    import mplug_owl2.conversation
    import mplug_owl2.mm_utils
    import mplug_owl2.model.modeling_mplug_owl2

    return mplug_owl2


def pixels(code: Any, config: str, images: int) -> Tensor | None:
    """Pixels of the first pictures, as the original makes them."""
    from transformers import CLIPImageProcessor

    size = CONFIGS[config]["visual_config"]["visual_model"]["image_size"]
    processor = CLIPImageProcessor(size=size, crop_size=size)
    return code.mm_utils.process_images([picture(i) for i in range(images)], processor) if images else None


def full_config(code: Any, config: str) -> Any:
    """The original's config; its own defaults complete the visual parts."""
    names = code.model.configuration_mplug_owl2
    kinds = {"visual_model": names.MplugOwlVisionConfig, "visual_abstractor": names.MplugOwlVisualAbstractorConfig}
    parts = CONFIGS[config]["visual_config"]
    visual = {name: kind(**parts[name]).to_dict() for name, kind in kinds.items()}
    return names.MPLUGOwl2Config(**{**CONFIGS[config], "visual_config": visual})


@torch.no_grad()
def logits(code: Any, config: str, case: str) -> dict[str, Tensor]:
    """Logits of prompts and of their greedy continuation, step by step."""
    model = code.model.modeling_mplug_owl2.MPLUGOwl2LlamaForCausalLM(full_config(code, config)).eval()
    fill(model)
    texts, (ids, mask, images) = rows(config, case), inputs(config, case)
    given = pixels(code, config, images)
    found = {"ids": ids, "mask": mask}
    if case in RIGHT:
        width = max(map(len, texts))
        given_ids = torch.tensor([row + [0] * (width - len(row)) for row in texts])
        given_mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in texts])
        found["logits"] = model(given_ids, attention_mask=given_mask, images=given).logits
        found["logits"] = found["logits"][SHOWN].contiguous()
        return found
    alone = len(texts) == 1
    forward = one(model, torch.tensor(texts), given) if alone else several(model, texts, given, mask)
    prompt, past = forward(None, None)
    steps, new, last = [], [], prompt
    for _ in range(STEPS):
        new.append(last[:, -1].argmax(-1, keepdim=True))
        last, past = forward(new[-1], past)
        steps.append(last)
    if alone:  # the original's own generation agrees
        options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": -1}
        whole = model.generate(torch.tensor(texts), images=given, **options)
        if not torch.equal(whole[:, len(texts[0]) :], torch.cat(new, 1)):
            raise RuntimeError(f"{config}/{case}: generation is not that of the steps")
    return {**found, "logits": prompt[SHOWN].contiguous(), "new": torch.cat(new, 1),
            "steps": torch.cat(steps, 1)[SHOWN].contiguous()}  # fmt: skip


def one(model: Any, ids: Tensor, given: Tensor | None) -> Any:
    """A pass over a single prompt, or over a word after it: the model's own."""

    def forward(word: Tensor | None, past: Any) -> tuple[Tensor, Any]:
        out = model(ids if word is None else word, images=given, past_key_values=past, use_cache=True)
        return out.logits, out.past_key_values

    return forward


def several(model: Any, texts: list[list[int]], given: Tensor | None, mask: Tensor) -> Any:
    """The same for prompts padded on the left.

    The model's own preparation of such a batch masks wrong tokens if there are images. So it prepares prompt by
    prompt, and its decoder is called with all of them, padded here.
    """
    made, modality, done = [], [], 0
    for row in texts:
        count = row.count(IMAGE)
        part = None if given is None or not count else given[done : done + count]
        ids, indicators, _, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(
            torch.tensor([row]), None, None, None, part
        )
        made.append(model.model.embed_tokens(ids)[0] if embeds is None else embeds[0])
        modality.append(indicators[0])
        done += count
    width = max(map(len, made))
    embeds = torch.stack([torch.cat([x.new_zeros(width - len(x), x.shape[1]), x]) for x in made])
    indicators = torch.stack([torch.cat([x.new_zeros(width - len(x)), x]) for x in modality])

    def forward(word: Tensor | None, past: Any) -> tuple[Tensor, Any]:
        if word is None:
            source = {"inputs_embeds": embeds, "modality_indicators": indicators}
        else:
            source = {"input_ids": word, "modality_indicators": torch.zeros_like(word)}
        later = 0 if past is None else past[0][0].shape[2] + 1 - mask.shape[1]
        whole = torch.cat([mask, mask.new_ones(len(mask), later)], 1)
        out = model.model(**source, attention_mask=whole, past_key_values=past, use_cache=True)
        return model.lm_head(out.last_hidden_state), out.past_key_values

    return forward


def encoded(code: Any, file: Path, legacy: bool) -> dict[str, Any]:
    """Ids of all strings (IMAGE for images), what decoding gives back, and conversations, with a vocabulary."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(file.read_bytes())
        named = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(named))
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False)
    encode = code.mm_utils.tokenizer_image_token
    ids = [encode(text, tokenizer) for text in strings()]
    plain, chats, texts = ids[: -len(IMAGES)], [], []
    for turns in CHATS:
        talk = code.conversation.conv_templates["mplug_owl2"].copy()
        for parts, answer in turns:
            talk.append_message(talk.roles[0], "".join("<|image|>" if p is None else p for p in parts))
            talk.append_message(talk.roles[1], answer)
        texts.append(talk.get_prompt())
        chats.append(encode(texts[-1], tokenizer))
    return {
        "ids": ids,
        "decoded": [tokenizer.decode(row) for row in plain],
        "skipped": [tokenizer.decode(row, skip_special_tokens=True) for row in plain],
        "prompts": texts,
        "chats": chats,
    }


def main() -> None:
    """Write the files in OUT."""
    from safetensors.torch import save_file

    code = original(Path(sys.argv[1]).resolve())
    OUT.mkdir(parents=True, exist_ok=True)
    found = {
        f"{config}/{case}/{name}": tensor
        for config, cases in CASES.items()
        for case in cases
        for name, tensor in logits(code, config, case).items()
    }
    for config in CONFIGS:
        (made,) = pixels(code, config, 1)
        step = made.shape[-1] // 14
        found[f"{config}/pixels"] = made[:, ::step, ::step].contiguous()
    save_file(found, OUT / "logits.safetensors")
    (OUT / "config.json").write_text(json.dumps(full_config(code, "short").to_dict(), indent=1) + "\n")
    weights = code.model.modeling_mplug_owl2.MPLUGOwl2LlamaForCausalLM(full_config(code, "short")).state_dict()
    (OUT / "keys.json").write_text(json.dumps({name: list(tensor.shape) for name, tensor in weights.items()}) + "\n")
    file = OUT / "tokenizer.model"
    file.write_bytes(vocabulary())
    result = {"strings": strings(), "legacy": encoded(code, file, True), "new": encoded(code, file, False)}
    (OUT / "tokens.json").write_text(json.dumps(result, ensure_ascii=True))


if __name__ == "__main__":
    main()
