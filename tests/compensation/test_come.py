"""Joined layers: against merging written out on a live model, and as they are stored and exported."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers.checkpoints import assert_same_checkpoint, in_memory
from helpers.families import lvlm_of
from helpers.references import close, logits
from helpers.spread_models import map_over, same
from helpers.streams import record
from torch import nn
from torch.nn import functional as F

import svl
from svl.calibration.activations import Activations
from svl.calibration.calibrate import calibrate, select
from svl.calibration.rescoring import ModelRescoring
from svl.checkpoints import export
from svl.checkpoints.pruning_record import changed_writers
from svl.compensation.come import Come
from svl.compensation.linear import Linear
from svl.core import JoinedPart, Patch, Plan, Stats, SvlError
from svl.core.contract import checked_patch
from svl.pruning.patch_file import load_patch, save_patch
from svl.pruning.surgery import apply
from svl.selectors.last import Last
from svl.strategies.iterative import Iterative
from svl.strategies.layer_pairs import LayerPairs


def prepared(lvlm, samples, compensation) -> Stats:
    stats = select(calibrate(lvlm, samples, batch_size=2), Last())
    return replace(stats, rescoring=ModelRescoring(Activations(lvlm, samples, stats, 2), compensation))


# -------------------------------------------------------------------------------------- merging written out


class Merging:
    """A copy of a model, whose layers are merged in place, two at a time, by masks."""

    def __init__(self, lvlm, samples, encode, released: bool):
        model = copy.deepcopy(lvlm.model)
        model.config.get_text_config().use_cache = False  # layers keep their numbers
        self.lvlm, self.samples, self.encode, self.released = replace(lvlm, model=model), samples, encode, released
        self.numbers = list(range(len(lvlm.layers)))
        text = model.config.get_text_config()
        self.n_groups, self.per_group = text.num_key_value_heads, text.num_attention_heads // text.num_key_value_heads

    def reads(self) -> dict[str, torch.Tensor]:
        """What o_proj and down_proj of every layer read, all tokens."""
        found: dict[tuple[int, str], list[torch.Tensor]] = {}
        handles = []

        def keep(key):
            return lambda _, args, out: found.setdefault(key, []).append(args[0][0].double())

        for i, layer in enumerate(self.lvlm.layers):
            for name, module in (("attn", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
                handles.append(module.register_forward_hook(keep((i, name))))
        self.seen = record(
            replace(self.lvlm, anatomy=replace(self.lvlm.anatomy, writers={})), self.samples, self.encode
        )
        for handle in handles:
            handle.remove()
        return {key: torch.cat(parts) for key, parts in found.items()}

    @torch.no_grad()
    def merge(self) -> int:
        """Merge the most similar pair by angle at the last token; the number of the layer that goes."""
        reads = self.reads()
        last = [[s.states[i][-1] for i in range(len(self.lvlm.layers) + 1)] for s in self.seen]
        angles = [
            sum(F.cosine_similarity(h[i], h[i + 2], dim=0).arccos() for h in last) for i in range(len(last[0]) - 2)
        ]
        at = min(range(len(angles)), key=angles.__getitem__)
        pair = [self.lvlm.layers[at], self.lvlm.layers[at + 1]]
        influence = [sum(float((1 - F.cosine_similarity(s.states[i], s.states[i + 1], dim=-1).clamp(0, 1)).sum())
                         for s in self.seen) for i in (at, at + 1)]  # fmt: skip
        shares = [x / sum(influence) for x in influence]
        masks = []
        channels = [
            reads[at + k, "mlp"].abs().mean(0) * pair[k].mlp.down_proj.weight.double().abs().sum(0) for k in (0, 1)
        ]
        heads = [
            reads[at + k, "attn"].abs().mean(0) * pair[k].self_attn.o_proj.weight.double().abs().sum(0) for k in (0, 1)
        ]
        groups = [dims.view(self.n_groups, -1).mean(1) for dims in heads]
        for scores in (channels, groups):
            counts = [int(len(scores[0]) * share) for share in shares]
            counts[shares.index(max(shares))] += len(scores[0]) - sum(counts)
            for one, count in zip(scores, counts, strict=True):
                mask = torch.zeros(len(one), dtype=torch.bool)
                mask[one.argsort(descending=True)[:count]] = True
                masks.append(mask)
        self._join(pair, masks[:2], masks[2:], shares)
        gone = self.numbers.pop(at + 1)
        kept = nn.ModuleList(layer for i, layer in enumerate(self.lvlm.layers) if i != at + 1)
        owner, _, name = self.lvlm.anatomy.layers.rpartition(".")
        setattr(self.lvlm.model.get_submodule(owner), name, kept)
        self.lvlm.model.config.get_text_config().num_hidden_layers = len(kept)
        self.lvlm = replace(self.lvlm, anatomy=replace(self.lvlm.anatomy, n_layers=len(kept)))
        return gone

    def _join(self, pair, channels, groups, shares) -> None:
        size = pair[0].self_attn.head_dim
        of_groups = [mask.repeat_interleave(size) for mask in groups]
        if self.released:
            of_queries = [mask.repeat(self.per_group).repeat_interleave(size) for mask in groups]
        else:
            of_queries = [mask.repeat_interleave(self.per_group * size) for mask in groups]
        rows = {
            "q_proj": of_queries,
            "k_proj": of_groups,
            "v_proj": of_groups,
            "gate_proj": channels,
            "up_proj": channels,
        }
        columns = {"o_proj": of_queries, "down_proj": channels}
        for name, parameter in pair[0].named_parameters():
            both, module = [layer.get_parameter(name) for layer in pair], name.split(".")[-2]
            if module in rows:
                new = torch.cat([p[mask] for p, mask in zip(both, rows[module], strict=True)])
            elif module in columns and parameter.ndim == 2:
                new = torch.cat([p[:, mask] for p, mask in zip(both, columns[module], strict=True)], 1)
            elif module in columns:
                new = shares[0] * both[0] + shares[1] * both[1]
            else:
                new = (both[0] + both[1]) / 2
            parameter.copy_(new)


@pytest.mark.parametrize("heads", ["grouped", "released"])
@pytest.mark.parametrize("n", [1, 2])
def test_pairs_are_merged_as_written_out(n, heads, lm, samples, encode):
    merging = Merging(lm, samples, encode, heads == "released")
    gone = [merging.merge() for _ in range(n)]
    stats = prepared(lm, samples, Come(heads))
    plan = Iterative(LayerPairs()).plan(stats, n)
    assert plan.order == tuple(gone)
    patch = Come(heads).fit(Activations(lm, samples, stats, 2), plan)
    assert len(patch.joins) <= n
    assert [note.split()[1] for note in patch.notes] == [str(i) for i in gone]
    inputs = encode(lm, samples)
    pruned = apply(lm, plan, patch)
    close(logits(pruned.model, inputs), logits(merging.lvlm.model, inputs))
    assert pruned.parameters() == apply(lm, plan).parameters()
    assert (logits(apply(lm, plan).model, inputs) - logits(pruned.model, inputs)).abs().max() > 0.1


def test_query_heads_differ_as_released_where_they_share_keys(llava, qwen, samples):
    def queries(lvlm, heads):
        hidden = Activations(lvlm, samples, select(calibrate(lvlm, samples), Last()), 2)
        patch = Come(heads).fit(hidden, Plan(4, (2,)))
        return [part.queries.tolist() for part in patch.joins[1]]

    assert queries(llava, "grouped") == queries(llava, "released")
    grouped, released = queries(qwen, "grouped"), queries(qwen, "released")
    assert all(part in ([], [0, 1], [2, 3], [0, 1, 2, 3]) for part in grouped)
    assert all(part in ([], [0, 2], [1, 3], [0, 1, 2, 3]) for part in released)
    assert sum(map(len, grouped)) == sum(map(len, released)) == 4


def test_without_an_order_layers_join_from_the_first_up(llama, samples):
    hidden = Activations(llama, samples, select(calibrate(llama, samples), Last()), 2)
    one, other = Come().fit(hidden, Plan(4, (2, 3))), Come().fit(hidden, Plan(4, (2, 3), order=(2, 3)))
    assert one.notes == other.notes
    assert {k: [p.layer for p in parts] for k, parts in one.joins.items()} == {1: [1, 2, 3]}
    weights = [(part.norm, part.share) for part in one.joins[1]]
    assert [norm for norm, _ in weights] == [0.25, 0.25, 0.5]
    assert sum(share for _, share in weights) == pytest.approx(1)
    first = Come().fit(hidden, Plan(4, (0,)))
    assert not first
    assert first.notes == ("layer 0: no layer is before it, so it is not joined",)


def test_pairs_spare_the_first_layer_and_protected_ones(llama, samples):
    stats = select(calibrate(llama, samples), Last())
    plan = LayerPairs().plan(stats, 3)
    assert plan.removed == (1, 2, 3)
    with pytest.raises(SvlError, match="at most 3 may go"):
        LayerPairs().plan(stats, 4)
    assert LayerPairs().plan(stats.without((2, 3)), 1).removed == (1,)


# ------------------------------------------------------------------------------------ stored and refused


def parts_of(lvlm, samples, plan: Plan) -> Patch:
    return Come().fit(Activations(lvlm, samples, select(calibrate(lvlm, samples), Last()), 2), plan)


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_exports_are_what_memory_has_bit_for_bit(kind, checkpoint, samples, tmp_path):
    lvlm, plan = svl.load(checkpoint(kind), device="cpu"), Plan(4, (1, 2))
    patch = parts_of(lvlm, samples, plan)
    save_patch(patch, tmp_path / "patch.safetensors")
    again = load_patch(tmp_path / "patch.safetensors")
    assert changed_writers(again) == ["0.*"]
    ours = export.save(checkpoint(kind), plan, tmp_path / "out", again)
    assert_same_checkpoint(ours, in_memory(lvlm, plan, patch, tmp_path / "memory"))


def indices(n: int) -> torch.Tensor:
    return torch.arange(n)


@pytest.mark.parametrize(
    ("joins", "says"),
    [
        ({1: (JoinedPart(0, 1, 1, indices(48), indices(4), indices(2)),)}, "joins layer 1, which the pruned"),
        ({0: ()}, r"joins layer 0 of layers \[\]"),
        ({0: (JoinedPart(0, 1, 1, indices(47), indices(4), indices(2)),)}, "joins 47 channels in 'mlp.gate_proj"),
        ({0: (JoinedPart(0, 1, 1, indices(48) + 1, indices(4), indices(2)),)}, "joins channels in .* there are 48"),
        ({0: (JoinedPart(0, float("nan"), 1, indices(48), indices(4), indices(2)),)}, "not finite numbers"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(joins, says, llama):
    with pytest.raises(SvlError, match=says):
        apply(llama, Plan(4, (1,)), Patch(joins=joins))


def test_a_compensation_that_joins_must_say_so():
    joins = {0: (JoinedPart(0, 1, 1, indices(48), indices(4), indices(2)),)}
    with pytest.raises(SvlError, match=r"Linear joins layers, so its class must say joins = True"):
        checked_patch(Linear(), Patch(joins=joins), Plan(4, (1,)))
    assert checked_patch(Come(), Patch(joins=joins), Plan(4, (1,)))


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("aria", r"'mlp\.router\.weight' is a tensor of which it is not known how layers are joined"),
        ("phi4_multimodal", r"'self_attn\.qkv_proj\.weight' is a tensor of which it is not known"),
        ("llama4", "their weights differ in names or shapes"),
    ],
)
def test_layers_of_other_parts_are_refused(family, says):
    lvlm, _ = lvlm_of(family)
    n = lvlm.anatomy.n_layers
    both = [JoinedPart(i, 0.5, 0.5, indices(24), indices(2), indices(1)) for i in (2, 3)]
    with pytest.raises(SvlError, match=says):
        apply(lvlm, Plan(n, (3,)), Patch(joins={2: tuple(both)}))


def test_layers_on_disk_are_joined_as_in_memory(checkpoint, samples):
    one = svl.load(checkpoint("llama"), device="cpu")
    spread = svl.load(checkpoint("llama"), device_map=map_over(one, ["cpu", "disk"]))
    plan, found = Plan(4, (1, 3)), []
    for lvlm in (one, spread):
        stats = select(calibrate(lvlm, samples, batch_size=2), Last())
        found.append(Come().fit(Activations(lvlm, samples, stats, 2), plan))
    same(found[1].joins, found[0].joins)
    assert found[1].notes == found[0].notes
