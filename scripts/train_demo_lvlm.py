"""Train the bundled LVLM (a LLaVA of 16 decoder layers) from nothing, on two CPU cores, from one seed.

    python scripts/train_demo_lvlm.py --out runs/demo_lvlm

Design decisions:

* The vision tower first learns to name colour, shape and size under every patch. Without that, the language
  model stays at chance for tens of thousands of images; with it the loss falls at once.
* Supervision is dense: all questions of a scene share one image prefix and are packed into one sequence under
  a block mask, so that each is trained exactly as the single-turn conversation that it is evaluated as.
* Matrices of the decoder are trained with Muon, the rest with AdamW; the learning rate is constant after
  warm-up and falls linearly over the last third (a run may thus be resumed with another --steps).
* The batch of step s depends on (seed, s) alone: an interrupted run continues as if it had not stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from svl.demo import scenes

PATCH = 8
# Questions per scene. `list`, `cell` and `place` are asked in training only: their answers speak of the whole image.
GROUND = {"list": 1, "cell": 4, "place": 2, "existence": 1, "attribute": 3}
FIND = {"place": 3, "attribute": 5, "existence": 4}
STEP = {"existence": 1, "attribute": 2, "relation1": 6, "relation2": 1}
CHOOSE = {"existence": 1, "attribute": 3, "relation1": 2, "choice": 6}
MIX = {"cell": 1, "existence": 1, "attribute": 1, "count": 2, "compare": 1, "relation1": 2, "relation2": 3,
       "relation3": 2, "choice": 2}  # fmt: skip
# What is asked until which step. Reading words off places comes first, then finding places by words, then going on from
# there, then naming an option; in one mix with questions that need all of it, each of these takes many times longer.
CURRICULUM = ((700, GROUND), (1200, MIX), (1600, FIND), (2000, STEP), (2400, MIX), (2700, CHOOSE), (10**9, MIX))
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}<|user|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] if item['type'] == 'image' %}<image>{% endfor %}"
    "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}{% endif %}"
    "{% else %}<|assistant|>{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def attention_fp32(module, query, key, value, attention_mask, scaling=None, **_):
    """sdpa in fp32 under bf16 autocast: without bf16 tiles in the processor, the bf16 kernel is the slower one."""
    with torch.autocast("cpu", enabled=False):
        query, key, value = query.float(), key.float(), value.float()
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return out.transpose(1, 2), None


AttentionInterface.register("fp32", attention_fp32)
AttentionMaskInterface.register("fp32", AttentionMaskInterface()["sdpa"])


def build_processor() -> LlavaProcessor:
    """A word-level tokenizer over the generator's language, CLIP image processing at 64 pixels, a chat template."""
    splitter = pre_tokenizers.Whitespace()
    words: set[str] = set()
    stream = scenes.stream(0, "train", dict.fromkeys(scenes.KINDS, 4))
    for _, (_, questions) in zip(range(2000), stream, strict=False):
        for q in questions:
            words.update(piece for piece, _ in splitter.pre_tokenize_str(f"{q.prompt} {q.answer}"))
    vocabulary = {w: i for i, w in enumerate(SPECIAL + sorted(words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = splitter
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>", "<|user|>", "<|assistant|>"], padding_side="left",
        model_max_length=512, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    image_processor = CLIPImageProcessor(
        size={"height": scenes.SIDE, "width": scenes.SIDE}, do_center_crop=False, do_convert_rgb=True,
        image_mean=[0.5] * 3, image_std=[0.25] * 3,
    )  # fmt: skip
    return LlavaProcessor(
        image_processor, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


def build_model(processor: LlavaProcessor, layers: int, width: int) -> LlavaForConditionalGeneration:
    """A randomly initialised LLaVA: CLIP ViT of 3 layers, two-layer projector, Llama decoder."""
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
            image_size=scenes.SIDE, patch_size=PATCH, projection_dim=96, hidden_act="gelu",
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=352 * width // 128,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False, initializer_range=0.05,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(scenes.SIDE // PATCH) ** 2, vision_feature_layer=-1, vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="fp32")
    with torch.no_grad():  # the residual stream starts with the embeddings, not with 2 L random updates
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.mul_((2 * layers) ** -0.5)
            layer.mlp.down_proj.weight.mul_((2 * layers) ** -0.5)
        model.model.language_model.embed_tokens.weight.normal_(0, 0.5)
        for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
            linear.weight.normal_(0, linear.in_features**-0.5)  # visual tokens as large as words from the start
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def pixels(images: list[np.ndarray]) -> torch.Tensor:
    """What the image processor gives for `images` (64-pixel uint8 RGB), in one step: [N, 3, 64, 64]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.25)


def encode_questions(tokenizer, questions: list[scenes.Question]) -> list[list[int]]:
    """Token ids of each question as `prompt <|assistant|> answer </s>`."""
    texts = [f"{q.prompt}<|assistant|>{q.answer}</s>" for q in questions]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def pack(tokenizer, samples: list[tuple[scenes.Scene, list[scenes.Question]]]) -> dict[str, torch.Tensor]:
    """One training batch: every scene's questions behind one shared image prefix.

    `input_ids`, `position_ids`, `labels` [B, T] (labels: the token that follows, -100 where nothing is asked),
    `block` [B, T] (0 prefix, k > 0 question k, -1 padding), `kind` [B, T] (index of the question's kind at the position
    that predicts its answer, else -1), `pixel_values`.
    """
    image, assistant = tokenizer.convert_tokens_to_ids(["<image>", "<|assistant|>"])
    prefix = [tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")] + [image] * (
        scenes.SIDE // PATCH
    ) ** 2
    kinds = list(scenes.KINDS)
    rows = []
    for _, questions in samples:
        ids, position, block = list(prefix), list(range(len(prefix))), [0] * len(prefix)
        labels, kind = [-100] * len(prefix), [-1] * len(prefix)
        for k, (question, tokens) in enumerate(zip(questions, encode_questions(tokenizer, questions), strict=True), 1):
            n, asked = len(tokens), tokens.index(assistant)
            ids += tokens
            position += range(len(prefix), len(prefix) + n)
            block += [k] * n
            labels += [-100] * asked + tokens[asked + 1 :] + [-100]
            kind += [-1] * asked + [kinds.index(question.kind)] + [-1] * (n - asked - 1)
        rows.append((ids, position, block, labels, kind))
    length = max(len(row[0]) for row in rows)
    fill = (tokenizer.pad_token_id, 0, -1, -100, -1)
    columns = [torch.tensor([row[c] + [fill[c]] * (length - len(row[c])) for row in rows]) for c in range(len(fill))]
    batch = dict(zip(("input_ids", "position_ids", "block", "labels", "kind"), columns, strict=True))
    batch["pixel_values"] = pixels([scenes.render(scene) for scene, _ in samples])
    return batch


def block_mask(block: torch.Tensor) -> torch.Tensor:
    """Bool [B, 1, T, T]: causal, and only within the own question or to the image prefix."""
    t = block.shape[1]
    own = (block[:, None, :] == block[:, :, None]) | (block[:, None, :] == 0)
    return (own & torch.ones(t, t, dtype=torch.bool).tril())[:, None]


def answers(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, vocabulary] at all labelled positions and their labels [n]."""
    hidden = model.model(
        input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], position_ids=batch["position_ids"],
        attention_mask=block_mask(batch["block"]), use_cache=False,
    ).last_hidden_state  # fmt: skip
    asked = batch["labels"] != -100
    return model.lm_head(hidden[asked]).float(), batch["labels"][asked]


class Batches(torch.utils.data.IterableDataset):
    """Training batches of steps `first`.. `last`, each a function of (seed, step) alone."""

    def __init__(self, tokenizer, seed: int, first: int, last: int, size: int):
        self.tokenizer, self.seed, self.first, self.last, self.size = tokenizer, seed, first, last, size

    def __iter__(self):
        for step in range(self.first, self.last):
            stream = scenes.stream(
                f"{self.seed}/{step}", "train", next(mix for until, mix in CURRICULUM if step < until)
            )
            yield pack(self.tokenizer, [sample for _, sample in zip(range(self.size), stream, strict=False)])


def pretrain_vision(model, seed: int, steps: int, size: int, log) -> None:
    """Teach the vision tower to name colour, shape, size, row and column of every patch (heads are thrown away)."""
    tower = model.model.vision_tower
    side = scenes.SIDE // PATCH
    classes = (1 + len(scenes.COLORS), 1 + len(scenes.SHAPES), 1 + len(scenes.SIZES), side, side)
    heads = torch.nn.ModuleList(torch.nn.Linear(96, n) for n in classes)
    where = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).reshape(1, -1, 2)
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    rng = random.Random(f"{seed}/vision")
    began = time.time()
    for step in range(steps):
        batch = [scenes.draw_scene(rng, "train") for _ in range(size)]
        labels = torch.from_numpy(np.stack([scenes.patch_labels(s, PATCH) for s in batch])).reshape(size, -1, 3)
        labels = torch.cat([labels, where.expand(size, -1, -1)], -1)
        with torch.autocast("cpu", torch.bfloat16):
            features = tower(pixels([scenes.render(s) for s in batch])).last_hidden_state[:, 1:]
        logits = [head(features.float()) for head in heads]
        loss = sum(F.cross_entropy(z.flatten(0, 1), labels[..., i].flatten()) for i, z in enumerate(logits))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            seen = labels[..., 0] > 0
            right = [float((z.argmax(-1) == labels[..., i])[seen].float().mean()) for i, z in enumerate(logits)]
            log(stage="vision", step=step, loss=float(loss.detach()), patch_accuracy=right, seconds=time.time() - began)
    # The features' common offset is many times their differences: start the projector from whitened features.
    mean, spread = features.float().detach().flatten(0, 1).mean(0), features.float().detach().flatten(0, 1).std(0)
    first = model.model.multi_modal_projector.linear_1
    with torch.no_grad():
        first.weight.div_(spread)
        first.bias.copy_(-first.weight @ mean)


@torch.no_grad()
def validate(model, batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Accuracy per kind of question (the answer word, greedy), and their mean as `all`."""
    kinds = list(scenes.KINDS)
    right, total = torch.zeros(len(kinds)), torch.zeros(len(kinds))
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            logits, labels = answers(model, batch)
        kind = batch["kind"][batch["labels"] != -100]
        first = kind >= 0
        total.index_add_(0, kind[first], torch.ones(int(first.sum())))
        right.index_add_(0, kind[first], (logits.argmax(-1) == labels)[first].float())
    result = {k: float(r / t) for k, r, t in zip(kinds, right, total, strict=True) if t}
    return {**result, "all": float(right.sum() / total.sum())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint, the log and the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vision-steps", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--every", type=int, default=200, help="steps between validations and checkpoints")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    def log(**row) -> None:
        print(json.dumps(row), flush=True)
        with open(args.out / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    processor = build_processor()
    model = build_model(processor, args.layers, args.width)
    model.model.vision_tower.requires_grad_(False)  # its features are good; noise would only wash them out
    hidden = [p for p in model.model.language_model.layers.parameters() if p.ndim == 2]
    other = [p for p in model.parameters() if p.requires_grad and all(p is not h for h in hidden)]
    optimizers = [
        torch.optim.Muon(hidden, lr=args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(other, lr=args.lr, weight_decay=0.01, betas=(0.9, 0.98)),
    ]

    checkpoint = args.out / "checkpoint.pt"
    start, best = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start, best = state["step"], state["best"]
    else:
        pretrain_vision(model, args.seed, args.vision_steps, 32, log)

    held_out = [
        pack(processor.tokenizer, [s for _, s in zip(range(32), scenes.stream(i, "validation", MIX), strict=False)])
        for i in range(4)
    ]
    batches = torch.utils.data.DataLoader(
        Batches(processor.tokenizer, args.seed, start, args.steps, args.batch),
        batch_size=None, num_workers=1, prefetch_factor=4, persistent_workers=False,
    )  # fmt: skip
    began, losses = time.time(), []
    for step, batch in enumerate(batches, start + 1):
        rate = min(1.0, step / 200, (args.steps - step + 1) / (args.steps / 3))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate
        with torch.autocast("cpu", torch.bfloat16):
            logits, labels = answers(model, batch)
        loss = F.cross_entropy(logits, labels)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss.detach()))
        if step % 20 == 0:
            speed = args.batch * (step - start) / (time.time() - began)
            log(stage="train", step=step, loss=sum(losses) / len(losses), images_per_second=round(speed, 1))
            losses = []
        if step % args.every == 0 or step == args.steps:
            accuracy = validate(model.eval(), held_out)
            model.train()
            log(
                stage="validation",
                step=step,
                seconds=round(time.time() - began),
                **{k: round(v, 4) for k, v in accuracy.items()},
            )
            if accuracy["all"] >= best:
                best = accuracy["all"]
                model.save_pretrained(args.out / "model")
                processor.save_pretrained(args.out / "model")
            state = {
                "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step,
                "best": best,
            }  # fmt: skip
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)


if __name__ == "__main__":
    main()
