"""BlockPruner against a search that rebuilds the model for every block it tries."""

from __future__ import annotations

import pytest
from helpers.references import rebuilt_loss

from svl.calibration.removal_probe import ModelProbe
from svl.core import Plan, Stats, SvlError
from svl.strategies.block_pruner import BlockPruner


@pytest.mark.parametrize("targets", [("attn", "mlp"), ("mlp",)])
def test_search_is_the_slow_one(llava, samples, targets):
    removed = []
    for _ in range(2):
        rest = [(i, role) for role in targets for i in (1, 2, 3) if (i, role) not in removed]
        removed.append(min(rest, key=lambda block: rebuilt_loss(llava, samples, (*removed, block))))
    attn, mlp = (tuple(i for i, found in removed if found == role) for role in ("attn", "mlp"))
    stats = Stats(4, (1, 2, 3), probe=ModelProbe(llava, samples))
    assert BlockPruner(targets).plan(stats, 1) == Plan(4, (), removed_attn=attn, removed_mlp=mlp)


def test_there_must_be_enough_blocks(llava, samples):
    stats = Stats(4, (1, 2, 3), probe=ModelProbe(llava, samples))
    with pytest.raises(SvlError, match="cannot remove 4 blocks: only 3"):
        BlockPruner(("mlp",)).plan(stats, 2)


def test_of_equals_the_first_attention_goes():
    class Indifferent:
        def with_samples(self, n):
            return self

        def sublayer_losses(self, removed, candidates):
            return 1.0, dict.fromkeys(candidates, 1.0)

    assert BlockPruner().plan(Stats(3, (0, 1, 2), probe=Indifferent()), 1) == Plan(3, (), removed_attn=(0, 1))
    assert BlockPruner().plan(Stats(3, (0, 1, 2), probe=Indifferent()), 0) == Plan(3, ())


def test_settings_are_checked():
    with pytest.raises(SvlError, match=r"strategy\.targets is 'ffn', but must be one of: attn, mlp"):
        BlockPruner(("ffn",))
    with pytest.raises(SvlError, match=r"strategy\.targets is empty"):
        BlockPruner(())
