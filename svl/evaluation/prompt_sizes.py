"""How long prompts will be with what they show, before their images are processed: what batches are ordered by.

Processors of many models make more tokens of larger images; how many is found out on blank images, size by size.
"""

from __future__ import annotations

from PIL import Image

from svl.models.lvlm import Lvlm

LETTERS = 4  # of a token of text, roughly
STEP = 32  # pixels: sizes of images are rounded up to it
UNLIKE = ((320, 320), (1280, 320), (960, 1280))  # a model that makes as many tokens of all these does so of every size


class PromptSizes:
    """Sizes of prompts of one model, in tokens."""

    def __init__(self, lvlm: Lvlm):
        self.lvlm = lvlm
        self._known: dict[tuple[int, int], int] = {}

    def depend_on_images(self) -> bool:
        """Whether the model makes more tokens of some images than of others."""
        return self.lvlm.takes_images and len({self.visual(size) for size in UNLIKE}) > 1

    def of(self, letters: int, images: list[tuple[int, int]]) -> float:
        """Of a prompt with a text of so many letters and images of these widths and heights."""
        return letters / LETTERS + sum(map(self.visual, images))

    def visual(self, size: tuple[int, int]) -> int:
        """Tokens of an image of this width and height."""
        width, height = (-(-side // STEP) * STEP for side in size)
        if (width, height) not in self._known:
            inputs = self.lvlm.encode([self.lvlm.prompt("", images=1)], [[Image.new("RGB", (width, height))]])
            self._known[width, height] = int(self.lvlm.is_visual(inputs["input_ids"]).sum())
        return self._known[width, height]
