"""Tiny random models and samples that the tests share.

Models are saved once per session and read back by `svl.load`, as a user's would be. Their weights are large enough
that attention is far from uniform and layers differ. Libraries are imported on first use: tests that need no model
start at once.
"""

from __future__ import annotations

import atexit
import gc
import io
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models are tiny: threads would only wait for each other
# Settings and caches of the machine's owner must not matter, nor the network: set before any library is imported.
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit all this
    for name in [name for name in os.environ if name.startswith(("SVL_", "HYDRA_", "WANDB_", "HF_"))]:
        del os.environ[name]
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="svl-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

WORDS = "what which where how many is are there the a of in on left right above below red green blue gray round square"
MARKS = {"llava": "<image>", "qwen": "<|vision_start|><|image_pad|><|vision_end|>", "llama": ""}
MARKS["internvl"] = "<|image_pad|>"  # its processor puts the other two around it
SPECIAL = [
    "<pad>",
    "<unk>",
    "<s>",
    "</s>",
    "<image>",
    "<|vision_start|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_end|>",
]
TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}user {% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}MARK{% else %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} assistant{% endif %}"
)


# --------------------------------------------------------------------------------- results of families as a table


def pytest_addoption(parser):
    parser.addoption("--families", metavar="FILE", help="write results of tests marked `column` to this JSON file")


def pytest_configure(config):
    config.addinivalue_line("markers", "column(*names): the test's result, by its `family`, fills these of the table")
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if config.getoption("--families") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Table(Path(config.getoption("--families"))))


def pytest_collection_modifyitems(items):
    for item in items:
        if mark := item.get_closest_marker("column"):
            from helpers.hub_mimics import FAMILIES

            parameters = item.callspec.params
            name = parameters.get("family") or parameters["name"]
            if family := FAMILIES.get(name, name):
                item.user_properties.append(("column", [family, list(mark.args)]))


def pytest_collection_finish():
    gc.freeze()  # what was imported stays: the collector need not look at it again and again
    gc.set_threshold(20_000)  # nor at every thousandth object that a configuration is made of


@pytest.fixture
def verdict(request):
    """Says what a passing test has shown ("exact", "refused"), and facts for the table."""

    def say(word: str, **facts):
        request.node.user_properties.append(("verdict", [word, facts]))

    return say


class _Table:
    """Collects results by family and column; one failed test fails its cell. Cells that no test filled stay."""

    def __init__(self, file: Path):
        self.file, self.cells, self.facts = file, {}, {}

    def pytest_runtest_logreport(self, report):
        properties = dict(report.user_properties)
        if "column" not in properties or (report.when != "call" and report.passed):
            return
        family, columns = properties["column"]
        word, facts = properties.get("verdict", ["", {}])
        for column in columns:
            self.cells.setdefault((family, column), []).append(word if report.passed else report.outcome)
            self.facts.setdefault(family, {}).update(
                {f"{column}_note" if k == "note" else k: v for k, v in facts.items()}
            )

    def pytest_sessionfinish(self):
        import torch
        import transformers

        table = json.loads(self.file.read_text()) if self.file.exists() else {"families": {}}
        for (family, column), words in self.cells.items():
            row = table["families"].setdefault(family, {})
            bad = [word for word in words if word in ("failed", "skipped")]
            row[column] = bad[0] if bad else next(filter(None, words), "exact")
        for family, facts in self.facts.items():
            table["families"][family].update(facts)
        table["versions"] = {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}
        self.file.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


# ---------------------------------------------------------------------------------------------- tiny checkpoints


def _tokenizer(kind: str):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    bos = "<s>" if kind in ("llava", "llama") else None  # Qwen has none
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, "user", "assistant", *WORDS.split()])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[(bos, SPECIAL.index(bos))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=SPECIAL[4:], chat_template=TEMPLATE.replace("MARK", MARKS[kind]),
    )  # fmt: skip


def _llava(tokenizer):
    """16 pixels in patches of 4: 16 visual tokens; a vision tower as deep and wide as the decoder."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor
    from transformers import LlavaForConditionalGeneration as Model

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=16,
            patch_size=4, projection_dim=16,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4,
            num_attention_heads=4, pad_token_id=0, bos_token_id=2, eos_token_id=3,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=16,
    )  # fmt: skip
    images = CLIPImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False)
    processor = LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )  # fmt: skip
    return Model(config), processor


def _qwen(tokenizer):
    """Grouped-query attention, three-dimensional positions, as many visual tokens as the image is large."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
    from transformers import Qwen2_5_VLForConditionalGeneration as Model

    patches = {"patch_size": 4, "temporal_patch_size": 2}
    mark = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{word}|>")
        for name, word in (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
                           ("vision_end", "vision_end"))
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 4, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
            "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1, 3], **patches,
        },
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
            "bos_token_id": None, "eos_token_id": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
        **mark,
    )  # fmt: skip
    size = {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
    images = Qwen2VLImageProcessor(size=size, merge_size=2, **patches)
    videos = Qwen2VLVideoProcessor(size=size, merge_size=2, **patches)
    return Model(config), Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=tokenizer.chat_template)


def _internvl(tokenizer):
    """Four visual tokens for each tile of a picture, three tiles at most and a thumbnail."""
    from transformers import GotOcr2ImageProcessor, InternVLConfig, InternVLProcessor, InternVLVideoProcessor
    from transformers import InternVLForConditionalGeneration as Model

    names = {"start_image_token": "<|vision_start|>", "end_image_token": "<|vision_end|>",
             "context_image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}  # fmt: skip
    tokenizer._set_model_specific_special_tokens(names)
    config = InternVLConfig(
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": [16, 16], "patch_size": [4, 4],
        },
        text_config={
            "model_type": "qwen2", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
            "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 3,
        },
        image_token_id=tokenizer.context_image_token_id, image_seq_length=4,
    )  # fmt: skip
    size = {"height": 16, "width": 16}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, max_patches=3), tokenizer, InternVLVideoProcessor(size=size),
        image_seq_length=4, chat_template=tokenizer.chat_template,
    )  # fmt: skip
    return Model(config), processor


def _llama(tokenizer):
    """Text only, grouped-query attention, biases on every projection."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, mlp_bias=True, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


@pytest.fixture(scope="session")
def randomise():
    """Gives a model large random weights, by seed: attention becomes uneven, every layer another one."""
    import torch

    def fill(model, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                noise = torch.randn(p.shape, generator=generator)
                if p.ndim > 1:
                    scale = 1.0 if "embed" in name else p[0].numel() ** -0.5
                    p.copy_(noise * scale * (2 if "q_proj" in name or "k_proj" in name else 1))
                else:
                    p.copy_(0.2 * noise + (0 if name.endswith("bias") else 1))
        return model.eval()

    return fill


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, randomise):
    """Folder of the checkpoint "llava", "qwen", "internvl" or "llama"."""
    import torch

    torch.set_num_threads(1)  # nothing here is large enough to share
    folders: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in folders:
            builders = {"llava": _llava, "qwen": _qwen, "internvl": _internvl, "llama": _llama}
            model, processor = builders[kind](_tokenizer(kind))
            folders[kind] = tmp_path_factory.mktemp("models") / kind
            randomise(model).save_pretrained(folders[kind])
            processor.save_pretrained(folders[kind])
        return folders[kind]

    return folder


@pytest.fixture(scope="session")
def mimic(tmp_path_factory):
    """Folder of a tiny checkpoint whose files are like those that conf/model/<name>.yaml names on the hub."""
    from helpers.hub_mimics import MIMICS

    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("mimics") / name
            MIMICS[name](folders[name])
        return folders[name]

    return folder


@pytest.fixture(scope="session")
def llava(checkpoint):
    """LLaVA: 4 decoder layers of width 32, 16 visual tokens."""
    import svl

    return svl.load(checkpoint("llava"), device="cpu")


@pytest.fixture(scope="session")
def qwen(checkpoint):
    """Qwen2.5-VL: 4 decoder layers of width 32, 4 to 12 visual tokens."""
    import svl

    return svl.load(checkpoint("qwen"), device="cpu")


@pytest.fixture(scope="session")
def internvl(checkpoint):
    """InternVL: 4 decoder layers of width 32, 8 to 16 visual tokens."""
    import svl

    return svl.load(checkpoint("internvl"), device="cpu")


@pytest.fixture(scope="session")
def llama(checkpoint):
    """A text-only Llama: 4 decoder layers of width 32."""
    import svl

    return svl.load(checkpoint("llama"), device="cpu")


@pytest.fixture(params=["llava", "qwen"])
def vlm(request):
    """Both vision-language models in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["llava", "qwen", "llama"])
def lm(request):
    """All three models in turn."""
    return request.getfixturevalue(request.param)


def png(seed: int, width: int = 16, height: int = 16) -> bytes:
    """A picture of random blocks."""
    import numpy as np
    from PIL import Image

    blocks = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks.repeat(4, 0).repeat(4, 1)).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="session")
def make_samples():
    """Samples of the given numbers of words, each with a picture of its own (or none)."""
    from svl.data.samples import Sample, Samples

    def make(lengths, image: bool = True, seed: int = 0):
        chance = random.Random(seed)
        return Samples(
            "random",
            tuple(
                Sample(
                    row,
                    " ".join(chance.choices(WORDS.split(), k=length)),
                    (png(seed + row, 16 + 8 * (row % 2), 16 + 8 * (row % 3)),) if image else (),
                    WORDS.split()[row % 5],
                )
                for row, length in enumerate(lengths)
            ),
        )

    return make


@pytest.fixture(scope="session")
def samples(make_samples):
    """Five samples whose prompts and pictures differ in length and size, so that batches are padded."""
    return make_samples([3, 9, 1, 6, 12])


@pytest.fixture(scope="session")
def encode():
    """Model inputs of samples, in one batch."""

    def encoded(lvlm, examples):
        images = [e.pictures for e in examples] if lvlm.takes_images else []
        texts = [lvlm.prompt(e.prompt, images=lvlm.takes_images and bool(e.images)) for e in examples]
        return lvlm.encode(texts, images)

    return encoded


@pytest.fixture(scope="session")
def generate():
    """Greedy generation of exactly `n` words: the output with its cache and the logits of every step."""
    import torch

    def run(model, inputs, n: int = 6, use_cache: bool = True):
        with torch.inference_mode():
            return model.generate(
                **inputs, max_new_tokens=n, do_sample=False, use_cache=use_cache, output_logits=True,
                return_dict_in_generate=True, suppress_tokens=[*range(len(SPECIAL))],
            )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory):
    """Starts real processes that run `svl`."""
    from helpers.fork_server import ForkServer

    pytest.importorskip("lmms_eval")
    server = ForkServer(tmp_path_factory.mktemp("fork_server"))
    yield server
    server.close()
