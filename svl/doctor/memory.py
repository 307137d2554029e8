"""How much memory the stages of a run need, by formula: the terms that grow with model and samples.

Lower bounds: libraries, allocators and temporary results of single operations come on top.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """What memory depends on.

    Attributes:
        parameters: of the whole model, tied ones counted once.
        bytes_each: of a parameter in the dtype that is loaded.
        layers: L, of the decoder.
        hidden: d, width of its residual stream.
        mlp_width: what the writer of an MLP reads.
        cache_width: numbers that attention keeps of a token and layer: keys and values of all their heads.
        vocabulary: number of tokens that are told apart.
    """

    parameters: int
    bytes_each: int
    layers: int
    hidden: int
    mlp_width: int
    cache_width: int
    vocabulary: int

    @property
    def weights(self) -> int:
        """Bytes of the weights."""
        return self.parameters * self.bytes_each


@dataclass(frozen=True)
class Load:
    """How much a run does: samples, tokens of the longest one, samples and questions at once, tokens of an answer."""

    samples: int
    tokens: int
    calibration_batch: int
    evaluation_batch: int
    new_tokens: int
    windows: bool


@dataclass(frozen=True)
class Need:
    """What a stage needs: bytes, where, and how they come about."""

    stage: str
    bytes: int
    place: str
    formula: str


def stage_needs(model: ModelShape, load: Load, n_remove: int) -> list[Need]:
    """The stages of a run, in order."""
    tokens = load.calibration_batch * load.tokens
    states = (model.layers + 1) * tokens * model.hidden * model.bytes_each if load.windows else 0
    pairs = (model.layers + 1) * model.layers // 2 * tokens * 4 if load.windows else 0
    activations = tokens * (3 * model.mlp_width + 4 * model.hidden) * model.bytes_each
    logits = load.evaluation_batch * model.vocabulary * 4
    asked = load.evaluation_batch * (load.tokens + load.new_tokens)
    cache = asked * model.layers * model.cache_width * model.bytes_each
    walking = 2 * load.samples * load.tokens * model.hidden * model.bytes_each
    gram = model.mlp_width * (model.mlp_width + model.hidden) * 8
    kept = 1 - n_remove / model.layers
    windows = " + (L + 1) states and L (L + 1) / 2 cosines of a batch" if load.windows else ""
    return [
        Need("load", model.weights, "device", "weights"),
        Need(
            "calibrate",
            model.weights + activations + states + pairs,
            "device",
            f"weights + a layer's activations of a batch{windows}",
        ),
        Need(
            "compensate, by least squares",
            model.weights + walking + 2 * gram,
            "device",
            "weights + two states of every sample + two systems of n (n + d) doubles, n = MLP width",
        ),
        Need("evaluate", model.weights + cache + logits, "device", "weights + keys and values of a batch"),
        Need("export", int(kept * model.weights), "disk", "weights without the removed layers, at least"),
    ]


def in_words(size: float) -> str:
    """Bytes as people read them: 1.2 GB."""
    import humanize

    return str(humanize.naturalsize(size))
