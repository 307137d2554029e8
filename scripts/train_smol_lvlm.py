"""Train `smol_lvlm`: a LLaVA on SmolLM2-135M-Instruct, on two CPU cores, from one seed.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 scripts/train_smol_lvlm.py --out runs/smol_lvlm

(One process per core; `python scripts/train_smol_lvlm.py` does the same in one process.)

LLaVA's recipe, with what makes it learn from thousands of images instead of millions:

* A small ViT first learns to name what each cell of the grid holds, from every patch of it.
* *Stage 1 without the language model*: the projector learns to say patches in the language model's own words, i.e. its
  output is regressed onto the sum of the (centred) word embeddings of size, colour, shape, row and column.
* *Stage 2*: projector and LoRA on all linear layers of the frozen decoder (bfloat16). All questions of a scene share
  one image prefix and are packed into one sequence under a block mask, so that each is trained exactly as the
  conversation it is evaluated as, or as one turn of two. Listing, describing and locating come first: their answers
  speak of the whole image; letters of options last, also asked without need of the image.
* *Language is kept*: texts that the language model wrote itself before training are in the mix, and on them the
  adapted model is held to the original's next-token distribution.
* The learning rate is constant after warm-up and falls linearly over the last third, so a run may be resumed with
  another --steps. The batch of step s depends on (seed, s) alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
)

from svl.demo import scenes, smol
from svl.demo.bundled import UNUSED_TOKEN, resolve_bundled
from svl.store.artifacts import Store

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
PATCH, SIDE = 8, smol.GRID * scenes.CELL
N = SIDE // PATCH  # patches along each side
LORA_RANK, SCALE = 16, 2.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Questions per scene, until which step.
GROUND = {"list": 1, "describe": 3, "cell": 3, "place": 3, "attribute": 2}
FIND = {"list": 1, "describe": 1, "place": 2, "attribute": 3, "existence": 3, "count": 1, "relation1": 1}
MIX = {"describe": 1, "cell": 1, "place": 1, "existence": 3, "attribute": 2, "count": 2, "compare": 1, "relation1": 2,
       "relation2": 1, "choice": 1}  # fmt: skip
REASON = {"describe": 1, "cell": 1, "existence": 2, "attribute": 1, "count": 3, "compare": 2, "relation1": 1,
          "relation2": 2, "choice": 2, "letter": 2}  # fmt: skip
CURRICULUM = ((60, GROUND), (160, FIND), (420, MIX), (10**9, REASON))
TURNS_EVERY = 3  # from REASON on, the questions of every third batch are asked in conversations of two turns
TEXTS, TEXT_LENGTH, TEXT_EVERY, TEXT_BATCH = 256, 128, 4, 4


class Gather(torch.autograd.Function):
    """Rows `forth` of x [n, H, D]; `back` says where each row of x went, if `live`: backward is a gather, too."""

    @staticmethod
    def forward(ctx, x, forth, back, live):
        ctx.save_for_backward(back, live)
        return x[forth]

    @staticmethod
    def backward(ctx, grad):
        back, live = ctx.saved_tensors
        return grad[back] * live[:, None, None], None, None, None


@dataclass(frozen=True)
class Blocks:
    """Where the questions of packed rows [B, T] are: `forth` [B * Q * L] gathers them, padded, from B * (T - prefix)
    tokens, `back` [B * (T - prefix)] is its inverse; `used` and `there` tell tokens and places that are no padding;
    `mask` [L, prefix + L] says what a question may attend to: the image, and what came before."""

    prefix: int
    questions: int
    forth: Tensor
    back: Tensor
    used: Tensor
    there: Tensor
    mask: Tensor

    @classmethod
    def of(cls, block: Tensor) -> Blocks:
        """From the block numbers [B, T] of `pack`."""
        prefix = int((block[0] == 0).sum())
        rest = block[:, prefix:]
        rows, length = rest.shape
        questions = int(rest.max())
        sizes = (rest[:, :, None] == torch.arange(1, questions + 1)).sum(1)  # [B, Q]
        longest = int(sizes.max())
        within = torch.arange(longest)
        there = within < sizes[..., None]  # [B, Q, L]
        first = sizes.cumsum(1) - sizes + length * torch.arange(rows)[:, None]
        forth = ((first[..., None] + within) * there).flatten()
        back = torch.zeros(rows * length, dtype=torch.long)
        back[forth[there.flatten()]] = torch.arange(len(forth))[there.flatten()]
        own = torch.ones(longest, longest, dtype=torch.bool).tril()
        mask = torch.cat([torch.ones(longest, prefix, dtype=torch.bool), own], 1)
        return cls(prefix, questions, forth, back, (rest > 0).flatten(), there.flatten(), mask)


LAYOUT: list[Blocks | None] = [None]  # of the batch that is being computed; None: plain causal rows


def fp32_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention in float32 (in bfloat16 it is slower on CPUs): causal within a question, and to the image prefix."""
    dtype, layout, groups = query.dtype, LAYOUT[0], module.num_key_value_groups
    query, key, value = query.float(), key.float(), value.float()

    def attend(q, k, v, **mask):
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return F.scaled_dot_product_attention(q, k, v, scale=scaling, **mask).transpose(1, 2)

    if layout is None:
        return attend(query, key, value, is_causal=True).to(dtype), None
    p, rows = layout.prefix, len(query)

    def own(x):  # [B, H, T, D] -> [B * Q, H, L, D]
        flat = x[:, :, p:].transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])
        gathered = Gather.apply(flat, layout.forth, layout.back, layout.used)
        return gathered.view(rows * layout.questions, -1, *flat.shape[1:]).transpose(1, 2)

    def with_prefix(x):
        shared = x[:, None, :, :p].expand(-1, layout.questions, -1, -1, -1).flatten(0, 1)
        return torch.cat([shared, own(x)], 2)

    start = attend(query[:, :, :p], key[:, :, :p], value[:, :, :p], is_causal=True)
    rest = attend(own(query), with_prefix(key), with_prefix(value), attn_mask=layout.mask)
    rest = Gather.apply(rest.flatten(0, 1), layout.back, layout.forth, layout.there).view(rows, -1, *rest.shape[2:])
    return torch.cat([start, rest], 1).to(dtype), None


AttentionInterface.register("fp32", fp32_attention)
AttentionMaskInterface.register("fp32", lambda *args, **kwargs: None)  # LAYOUT says it all


class Lora(nn.Module):
    """A frozen linear layer plus `SCALE * up @ down`, factors in float32."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(LORA_RANK, base.in_features) * base.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, LORA_RANK))
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        if self.on:
            out = out + (x @ self.down.to(x.dtype).T) @ (SCALE * self.up).to(x.dtype).T
        return out


class Smol(nn.Module):
    """ViT -> projector -> SmolLM2 with LoRA, computed as `LlavaForConditionalGeneration` computes it."""

    def __init__(self, language_model: nn.Module, width: int = 96):
        super().__init__()
        size = language_model.config.hidden_size
        self.vision = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=width, intermediate_size=4 * width, num_hidden_layers=4, num_attention_heads=4,
                image_size=SIDE, patch_size=PATCH, projection_dim=width, hidden_act="gelu",
            )
        )  # fmt: skip
        self.projector = nn.Sequential(nn.Linear(width, size), nn.GELU(), nn.Linear(size, size))
        self.language = language_model.requires_grad_(False)
        for layer in self.language.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name in TARGETS:
                    if hasattr(block, name):
                        setattr(block, name, Lora(getattr(block, name)))

    def loras(self) -> dict[str, Lora]:
        """Adapted layers by the name of their linear layer in the plain language model."""
        return {name: m for name, m in self.language.named_modules() if isinstance(m, Lora)}

    def trained(self) -> dict[str, Tensor]:
        """All that is trained."""
        out = {f"vision.{k}": v for k, v in self.vision.state_dict().items()}
        out |= {f"projector.{k}": v for k, v in self.projector.state_dict().items()}
        for name, lora in self.loras().items():
            out |= {f"{name}.down": lora.down.detach(), f"{name}.up": lora.up.detach()}
        return out

    def load_trained(self, state: dict[str, Tensor]) -> None:
        """The inverse of `trained`."""
        own = dict(self.trained())
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def see(self, pixel_values: Tensor) -> Tensor:
        """Visual tokens [B, N * N, hidden]: without gradient into the vision tower."""
        with torch.no_grad():
            features = self.vision(pixel_values).last_hidden_state[:, 1:]
        return self.projector(features)

    def hidden(self, ids: Tensor, positions: Tensor, visual: Tensor | None = None) -> Tensor:
        """Last hidden states [B, T, hidden]; `visual` replaces what `ids` hold at the image's place."""
        embeds = self.language.model.embed_tokens(ids)
        if visual is not None:
            before, after = embeds[:, :IMAGE_AT], embeds[:, IMAGE_AT + visual.shape[1] :]
            embeds = torch.cat([before, visual.to(embeds.dtype), after], dim=1)
        return self.language.model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state


# ------------------------------------------------------------------------------------------------ batches

OPEN, BETWEEN, CLOSE = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
IMAGE_AT = 3  # <|im_start|> user \n


def pixels(images: list[np.ndarray]) -> Tensor:
    """What the image processor gives for uint8 RGB images of the right size: [B, 3, SIDE, SIDE]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.25)


def pack(tokenizer, samples: list[tuple[scenes.Scene, list[scenes.Question]]], turns: int = 1) -> dict[str, Tensor]:
    """One batch: every scene's questions behind one shared image prefix, in conversations of `turns` questions.

    `ids`, `positions`, `labels` [B, T] (labels: the token that follows, -100 where nothing is asked), `block` [B, T]
    (0 prefix, k > 0 conversation k, -1 padding), `kind` [B, T] (index of the question's kind at its labelled
    positions, else -1), `pixels`.
    """
    opening, again = tokenizer([OPEN, f"\n{OPEN}"], add_special_tokens=False)["input_ids"]
    prefix = opening + [0] * (N * N)
    kinds = list(smol.KINDS)
    texts = [f"{q.prompt}{BETWEEN}" for _, questions in samples for q in questions]
    answers = [f"{q.answer}{CLOSE}" for _, questions in samples for q in questions]
    encoded = iter(
        zip(
            tokenizer(texts, add_special_tokens=False)["input_ids"],
            tokenizer(answers, add_special_tokens=False)["input_ids"],
            strict=True,
        )
    )
    rows = []
    for _, questions in samples:
        ids, positions, block = list(prefix), list(range(len(prefix))), [0] * len(prefix)
        labels, kind = [-100] * len(prefix), [-1] * len(prefix)
        for k in range(0, len(questions), turns):
            start, closing = len(ids), []
            for turn, question in enumerate(questions[k : k + turns]):
                asked, answer = next(encoded)
                if turn:  # the answer's end, which no label followed, and the next turn's opening
                    asked = closing + again + asked
                ids += asked + answer[:-1]
                labels += [-100] * (len(asked) - 1) + answer
                kind += [-1] * (len(asked) - 1) + [kinds.index(question.kind)] * len(answer)
                closing = answer[-1:]
            positions += range(len(prefix), len(prefix) + len(ids) - start)
            block += [1 + k // turns] * (len(ids) - start)
        rows.append((ids, positions, block, labels, kind))
    length = max(len(row[0]) for row in rows)
    fill = (tokenizer.pad_token_id, 0, -1, -100, -1)
    columns = [torch.tensor([row[c] + [fill[c]] * (length - len(row[c])) for row in rows]) for c in range(len(fill))]
    batch = dict(zip(("ids", "positions", "block", "labels", "kind"), columns, strict=True))
    batch["pixels"] = pixels([scenes.render(scene) for scene, _ in samples])
    return batch


class Batches(torch.utils.data.IterableDataset):
    """This process's share of the training batches of steps `first`.. `last`: functions of (seed, step) alone."""

    def __init__(self, tokenizer, seed: int, first: int, last: int, size: int):
        self.tokenizer, self.seed, self.first, self.last, self.size = tokenizer, seed, first, last, size

    def __iter__(self):
        for step in range(self.first, self.last):
            mix = next(mix for until, mix in CURRICULUM if step < until)
            stream = smol.plain_questions(f"{self.seed}/{step}", "train", mix)
            samples = [sample for _, sample in zip(range(self.size), stream, strict=False)]
            reasons = mix is REASON and step % TURNS_EVERY == 0
            yield pack(self.tokenizer, samples[RANK::WORLD], turns=2 if reasons else 1)


def answers(model: Smol, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits [n, vocabulary] at all labelled positions and their labels [n]."""
    visual = model.see(batch["pixels"])
    LAYOUT[0] = Blocks.of(batch["block"])
    hidden = model.hidden(batch["ids"], batch["positions"], visual)
    asked = batch["labels"] != -100
    return model.language.lm_head(hidden[asked]).float(), batch["labels"][asked]


@torch.no_grad()
def validate(model: Smol, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """Exact match of the greedy answer per kind of question, and over all as `all`.

    Greedy decoding gives the answer if and only if every token of it, its end included, is the most likely one after
    those before it: one pass over the given answers decides.
    """
    right: dict[str, list[bool]] = {}
    for batch in batches[RANK::WORLD]:
        logits, labels = answers(model, batch)
        hit = torch.zeros_like(batch["labels"], dtype=torch.bool)
        hit[batch["labels"] != -100] = logits.argmax(-1) == labels
        for row in range(len(hit)):
            for block in range(1, int(batch["block"][row].max()) + 1):
                place = (batch["block"][row] == block) & (batch["labels"][row] != -100)
                kind = list(smol.KINDS)[int(batch["kind"][row][place][0])]
                right.setdefault(kind, []).append(bool(hit[row][place].all()))
    shares: list = [right] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(shares, right)
    right = {kind: [r for share in shares for r in share.get(kind, [])] for kind in sorted(set().union(*shares))}
    every = [r for kind in smol.ASKED for r in right.get(kind, [])]
    return {k: sum(v) / len(v) for k, v in right.items()} | {"all": sum(every) / len(every)}


# ------------------------------------------------------------------------------- vision tower and stage 1


def cell_labels(scene: scenes.Scene) -> np.ndarray:
    """What the cell of every patch holds, int64 [N * N, 5]: colour, shape, size (0: nothing), row, column."""
    held = np.zeros((smol.GRID, smol.GRID, 5), dtype=np.int64)
    held[..., 3], held[..., 4] = np.mgrid[0 : smol.GRID, 0 : smol.GRID]
    for t in scene.things:
        held[t.y, t.x, :3] = (
            1 + list(scenes.COLORS).index(t.color), 1 + scenes.SHAPES.index(t.shape),
            1 + list(scenes.SIZES).index(t.size),
        )  # fmt: skip
    per = N // smol.GRID
    return held.repeat(per, axis=0).repeat(per, axis=1).reshape(-1, 5)


def drawn(rng: random.Random, size: int) -> tuple[Tensor, Tensor]:
    """Pixels and cell labels of random training scenes."""
    batch = [smol.draw(rng, "train") for _ in range(size)]
    return pixels([scenes.render(s) for s in batch]), torch.from_numpy(np.stack([cell_labels(s) for s in batch]))


def pretrain_vision(model: Smol, seed: str, steps: int, size: int, log) -> None:
    """Teach the vision tower to say from every patch what its cell holds (the heads are thrown away)."""
    tower = model.vision
    classes = (1 + len(scenes.COLORS), 1 + len(scenes.SHAPES), 1 + len(scenes.SIZES), smol.GRID, smol.GRID)
    heads = nn.ModuleList(nn.Linear(tower.config.hidden_size, n) for n in classes)
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    rng, began = random.Random(f"{seed}/vision"), time.time()
    for step in range(steps):
        images, labels = drawn(rng, size)
        with torch.autocast("cpu", torch.bfloat16):
            features = tower(images).last_hidden_state[:, 1:]
        logits = [head(features.float()) for head in heads]
        loss = sum(F.cross_entropy(z.flatten(0, 1), labels[..., i].flatten()) for i, z in enumerate(logits))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            seen = labels[..., 0] > 0
            right = [
                round(float((z.argmax(-1) == labels[..., i])[seen].float().mean()), 4) for i, z in enumerate(logits)
            ]
            log(stage="vision", step=step, loss=float(loss.detach()), patch_accuracy=right,
                seconds=round(time.time() - began))  # fmt: skip
    tower.requires_grad_(False)
    # The features' common offset is many times their differences: start the projector from whitened features.
    flat, first = features.detach().float().flatten(0, 1), model.projector[0]
    with torch.no_grad():
        first.weight.div_(flat.std(0))
        first.bias.copy_(-first.weight @ flat.mean(0))


def align_projector(model: Smol, tokenizer, seed: int, steps: int, size: int, log) -> None:
    """Stage 1: visual tokens become sums of the language model's embeddings of the words for what is there."""
    table = model.language.model.embed_tokens.weight.float()
    mean = table.mean(0)

    def embed(words) -> Tensor:
        ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
        return F.normalize(torch.stack([(table[i] - mean).mean(0) for i in ids]), dim=-1)

    empty = embed([smol.EMPTY]) / math.sqrt(3)
    books = [torch.cat([empty, embed(words)]) for words in (scenes.COLORS, scenes.SHAPES, scenes.SIZES)]
    books += [embed(smol.ROWS), embed(smol.COLUMNS)]
    scale = float((table - mean).norm(dim=1).mean())
    optimizer = torch.optim.AdamW(model.projector.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.1)
    rng, began = random.Random(f"{seed}/align"), time.time()
    for step in range(steps):
        images, labels = drawn(rng, size)
        target = sum(book[labels[..., i]] for i, book in enumerate(books)) * scale + mean
        said = model.see(images)
        loss = ((said - target) ** 2).sum(-1).mean() / scale**2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            log(stage="align", step=step, loss=float(loss.detach()), seconds=round(time.time() - began))


# -------------------------------------------------------------------------------------- language is kept


@torch.no_grad()
def write_texts(model: Smol, tokenizer, seed: int, log) -> Tensor:
    """Ids [TEXTS, TEXT_LENGTH] of texts sampled from the untrained language model: half plain, half conversations."""
    torch.manual_seed(seed)
    model.language.set_attn_implementation("sdpa")
    began, texts = time.time(), []
    for start in ("<|endoftext|>", "<|im_start|>user\n"):
        ids = tokenizer([start] * (TEXTS // 2), add_special_tokens=False, return_tensors="pt")["input_ids"]
        out = model.language.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TEXT_LENGTH - ids.shape[1],
            min_new_tokens=TEXT_LENGTH - ids.shape[1], do_sample=True, temperature=0.9, top_k=0,
        )  # fmt: skip
        texts.append(out)
        log(stage="texts", seconds=round(time.time() - began), sample=tokenizer.decode(out[0])[:300])
    model.language.set_attn_implementation("fp32")
    return torch.cat(texts)


def drift(model: Smol, ids: Tensor) -> Tensor:
    """KL divergence (nats per token) of the adapted from the original language model on texts [B, T]."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    LAYOUT[0] = None
    loras = model.loras().values()
    with torch.no_grad():
        for lora in loras:
            lora.on = False
        original = model.language.lm_head(model.hidden(ids, positions)).float().log_softmax(-1)
        for lora in loras:
            lora.on = True
    adapted = model.language.lm_head(model.hidden(ids, positions)).float().log_softmax(-1)
    return F.kl_div(adapted.flatten(0, 1), original.flatten(0, 1), reduction="batchmean", log_target=True)


# ------------------------------------------------------------------------------------------------ result

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] if item['type'] == 'image' %}<image>{% endfor %}"
    "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def ship(model: Smol, tokenizer, folder: Path) -> None:
    """Write what `svl.bundled` assembles the checkpoint from: all that was trained, in bfloat16, and its configs."""
    tensors = {f"model.vision_tower.{k}": v for k, v in model.vision.state_dict().items()}
    for k, v in model.projector.state_dict().items():
        layer, leaf = k.split(".")
        tensors[f"model.multi_modal_projector.linear_{1 if layer == '0' else 2}.{leaf}"] = v
    for name, lora in model.loras().items():
        tensors |= {f"{name}.weight.up": SCALE * lora.up.detach(), f"{name}.weight.down": lora.down.detach()}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.to(torch.bfloat16).contiguous() if v.is_floating_point() else v for k, v in tensors.items()}
    save_file(tensors, folder / "trained.safetensors", {"format": "pt"})
    language = {k: v for k, v in model.language.config.to_dict().items() if not k.endswith("name_or_path")}
    LlavaConfig(
        vision_config=model.vision.config.to_dict(), text_config=language,
        image_token_index=tokenizer.convert_tokens_to_ids(UNUSED_TOKEN), image_seq_length=N * N,
        tie_word_embeddings=True,
        vision_feature_layer=-1, vision_feature_select_strategy="default", dtype=torch.bfloat16,
    ).save_pretrained(folder)  # fmt: skip
    CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, do_convert_rgb=True,
        image_mean=[0.5] * 3, image_std=[0.25] * 3,
    ).save_pretrained(folder)  # fmt: skip
    (folder / "chat_template.jinja").write_text(TEMPLATE)


# -------------------------------------------------------------------------------------------------- main


def average(parameters: list[nn.Parameter]) -> None:
    """Replace gradients by their mean over the processes."""
    if WORLD > 1:
        flat = torch.cat([p.grad.flatten() for p in parameters])
        torch.distributed.all_reduce(flat)
        for p, grad in zip(parameters, flat.div_(WORLD).split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(grad.view_as(p))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint and the log")
    parser.add_argument("--store", type=Path, default=Path("outputs/store"), help="where SmolLM2 is assembled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--vision-steps", type=int, default=2400)
    parser.add_argument("--vision-cycles", type=int, default=2, help="learning rate cycles of so many steps")
    parser.add_argument("--align-steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--keep", type=float, default=1.0, help="weight of the drift from the original on texts")
    parser.add_argument("--every", type=int, default=100, help="steps between validations and checkpoints")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    if WORLD > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(hours=2))

    def log(**row) -> None:
        if RANK:
            return
        print(json.dumps(row), flush=True)
        with open(args.out / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    base = resolve_bundled("svl:smollm2_135m", Store(args.store))
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = Smol(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, attn_implementation="fp32"))
    model.vision.requires_grad_(False)

    def saved(name: str, make) -> dict:
        """What `make()` returns, kept on disk."""
        path = args.out / f"{name}.pt"
        if not path.exists() and RANK == 0:
            keep(path, make())
        if WORLD > 1:
            torch.distributed.barrier()
        return torch.load(path, weights_only=True)

    def keep(path: Path, value: dict) -> None:
        torch.save(value, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def start() -> dict:
        model.vision.requires_grad_(True)
        for cycle in range(args.vision_cycles):
            pretrain_vision(model, f"{args.seed}/{cycle}", args.vision_steps, 32, log)
        align_projector(model, tokenizer, args.seed, args.align_steps, 32, log)
        return model.trained()

    model.load_trained(saved("aligned", start))
    texts = saved("texts", lambda: {"ids": write_texts(model, tokenizer, args.seed, log)})["ids"]

    factors = list(model.loras().values())
    groups = [
        {"params": [f.down for f in factors], "rate": 1.0},
        {"params": [f.up for f in factors], "rate": 2.0},  # starts at zero, and may move faster
        {"params": list(model.projector.parameters()), "rate": 0.5},
    ]
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.0, betas=(0.9, 0.98))
    checkpoint, first = args.out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_trained(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    held_out = [
        pack(tokenizer, [s for _, s in zip(range(12), smol.plain_questions(i, "validation", REASON), strict=False)])
        for i in range(4)
    ]
    batches = torch.utils.data.DataLoader(
        Batches(tokenizer, args.seed, first, args.steps, args.batch), batch_size=None, num_workers=1, prefetch_factor=4
    )
    began, losses, drifts = time.time(), [], []
    for step, batch in enumerate(batches, first + 1):
        rate = min(1.0, step / 50, (args.steps - step + 1) / (args.steps / 3))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * group["rate"] * rate
        logits, labels = answers(model, batch)
        loss = F.cross_entropy(logits, labels)
        losses.append(float(loss.detach()))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if step % TEXT_EVERY == 0:
            rows = random.Random(f"{args.seed}/{step}").sample(range(TEXTS), TEXT_BATCH)
            away = drift(model, texts[rows[RANK::WORLD]])
            (args.keep * away).backward()
            drifts.append(float(away.detach()))
        average(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 10 == 0:
            speed = args.batch * (step - first) / (time.time() - began)
            log(stage="train", step=step, loss=round(sum(losses) / len(losses), 4),
                drift=round(sum(drifts) / max(1, len(drifts)), 4), images_per_second=round(speed, 2),
                seconds=round(time.time() - began))  # fmt: skip
            losses, drifts = [], []
        if step % args.every == 0 or step == args.steps:
            accuracy = validate(model, held_out)
            log(stage="validation", step=step, **{k: round(v, 4) for k, v in accuracy.items()})
            if RANK == 0:
                keep(checkpoint, {"model": model.trained(), "optimizer": optimizer.state_dict(), "step": step})
    if RANK == 0:
        ship(model, tokenizer, args.out / "smol_lvlm")


if __name__ == "__main__":
    main()
