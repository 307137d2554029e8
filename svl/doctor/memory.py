"""How much memory the stages of a run need, by formula: the terms that grow with model and samples.

Lower bounds: libraries, allocators and temporary results of single operations come on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from svl.calibration.calibrate import CHUNK
from svl.calibration.removal_probe import MEMORY

GUESSED_TOKENS = 1024  # of a sample with one picture, where none is here to be counted
GUESSED_ANSWER = 32  # tokens, where the benchmark does not say
LOGITS = 3  # of them at once in fp32: those of answers, their log-softmax, its gradient


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
    """How much a run does.

    Attributes:
        samples: of the calibration set.
        tokens: of the longest of them.
        calibration_batch, evaluation_batch: samples and questions at once.
        new_tokens: of an answer.
        windows: whether cosines between all pairs of layers are measured.
        probes: whether the strategy tries removals out.
        gradients: whether it asks for gradients.
    """

    samples: int
    tokens: int
    calibration_batch: int
    evaluation_batch: int
    new_tokens: int
    windows: bool
    probes: bool = False
    gradients: bool = False


@dataclass(frozen=True)
class Training:
    """What recovery does.

    Attributes:
        parameters: that are trained.
        batch: samples in a pass.
        tokens: of the longest sample.
        answer_tokens: of the longest answer; of plain text, every token.
        states: that are compared with the dense model's; 0 without.
        checkpointing: whether activations are computed again in the backward pass.
    """

    parameters: int
    batch: int
    tokens: int
    answer_tokens: int
    states: int = 0
    checkpointing: bool = False


@dataclass(frozen=True)
class Need:
    """What a stage needs: bytes, where ("device", "host": the CPU's memory, or "disk"), and how they come about."""

    stage: str
    bytes: int
    place: str
    formula: str


def stage_needs(model: ModelShape, load: Load, n_remove: int, training: Training | None = None) -> list[Need]:
    """The stages of a run, in order."""
    kept = 1 - n_remove / model.layers
    return [
        Need("load", model.weights, "device", "weights"),
        _calibration(model, load),
        *([_probing(model, load)] if load.probes else []),
        *([_gradients(model, load)] if load.gradients else []),
        *_least_squares(model, load, round(kept * model.layers)),
        *([_recovery(model, training, round(kept * model.layers))] if training else []),
        _evaluation(model, load),
        Need("export", int(kept * model.weights), "disk", "weights without the removed layers, at least"),
    ]


def _activations(model: ModelShape, tokens: int) -> int:
    """What one layer makes of so many tokens: three numbers per MLP unit, four states."""
    return tokens * (3 * model.mlp_width + 4 * model.hidden) * model.bytes_each


def _calibration(model: ModelShape, load: Load) -> Need:
    tokens = load.calibration_batch * load.tokens
    forward = _activations(model, tokens) + 2 * tokens * model.hidden * 4
    formula = "weights + a layer's activations and two fp32 states of a batch"
    if not load.windows:
        return Need("calibrate", model.weights + forward, "device", formula)
    depth = model.layers + 1
    states = depth * tokens * model.hidden * model.bytes_each
    pairs = depth * model.layers // 2 * tokens * 4
    compared = 2 * min(tokens, CHUNK) * depth * model.hidden * 4
    formula = f"{formula}, or two fp32 copies of {CHUNK} tokens' states; + L + 1 states, L (L + 1) / 2 cosines"
    return Need("calibrate", model.weights + states + pairs + max(forward, compared), "device", formula)


def _probing(model: ModelShape, load: Load) -> Need:
    state = load.samples * load.tokens * model.hidden * model.bytes_each
    kept = min(MEMORY, state * model.layers * (model.layers + 1) // 2)
    batch = _activations(model, model.layers * load.tokens)
    formula = "weights + a layer's activations of L rows of a sample + states kept between the steps"
    return Need("plan, by trying removals out", model.weights + batch + kept, "device", formula)


def _gradients(model: ModelShape, load: Load) -> Need:
    states = 2 * math.sqrt(model.layers) * load.samples * load.tokens * model.hidden * model.bytes_each
    layer = model.hidden * (3 * model.mlp_width + 2 * model.hidden + model.cache_width)
    one = layer * (4 + model.bytes_each) + 2 * _activations(model, load.tokens)
    formula = "weights + 2 sqrt(L) states of every sample + a layer's gradients, and their sums in fp32"
    return Need("plan, by gradients", int(model.weights + states + one), "device", formula)


def _least_squares(model: ModelShape, load: Load, kept: int) -> list[Need]:
    n, d = model.mlp_width, model.hidden
    walking = 2 * load.samples * load.tokens * d * model.bytes_each
    systems = (2 * n * (n + d) + 2 * n * n) * 8
    return [
        Need(
            "compensate, by least squares",
            model.weights + walking + systems,
            "device",
            "weights + two states of every sample + 2 n (n + d) + 2 n^2 doubles, n = MLP width",
        ),
        Need(
            "keep the patch of a refit",
            kept * d * (n + d) * model.bytes_each,
            "host",
            "d (n + d) numbers per kept layer",
        ),
    ]


def _recovery(model: ModelShape, training: Training, kept: int) -> Need:
    """What is trained is held in fp32, with its gradient and AdamW's two moments; all else is the dense model's."""
    tokens = training.batch * training.tokens
    layer = tokens * (8 * model.hidden + model.cache_width + 4 * model.mlp_width) * model.bytes_each
    inputs = tokens * model.hidden * model.bytes_each
    activations = kept * inputs + layer if training.checkpointing else kept * layer
    compared = training.states * tokens * model.hidden * (model.bytes_each + 4)
    logits = LOGITS * training.batch * training.answer_tokens * model.vocabulary * 4
    formula = "weights, shared with the teacher + 16 bytes for each of {:.3g} M trained numbers + {} + {}".format(
        training.parameters / 1e6,
        "a state of each kept layer and one layer's activations"
        if training.checkpointing
        else "kept layers' activations",
        "logits of a batch's answers" + (", compared states" if training.states else ""),
    )
    return Need(
        "recover", model.weights + 16 * training.parameters + activations + compared + logits, "device", formula
    )


def _evaluation(model: ModelShape, load: Load) -> Need:
    asked = load.evaluation_batch * (load.tokens + load.new_tokens)
    cache = asked * model.layers * model.cache_width * model.bytes_each
    logits = load.evaluation_batch * model.vocabulary * 4
    prompt = _activations(model, load.evaluation_batch * load.tokens)
    formula = "weights + keys and values, and a layer's activations, of a batch"
    return Need("evaluate", model.weights + cache + logits + prompt, "device", formula)


def in_words(size: float) -> str:
    """Bytes as people read them: 1.2 GB."""
    import humanize

    return str(humanize.naturalsize(size))
