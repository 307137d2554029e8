"""Every family of helpers.families on its own processor: several pictures, none, videos, in batches and one by one.

Checkpoints have files with the keys of the real ones (tests/helpers/family_files.py), and are read by `svl.load`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import png
from helpers.families import MAPLESS
from helpers.family_files import FILES, write
from helpers.references import assert_answers_are_unseen, close, logits, rebuilt_losses
from torch.nn import functional as F

import svl
from svl.calibration.activations import Activations
from svl.calibration.calibrate import calibrate, select
from svl.calibration.removal_probe import ModelProbe
from svl.compensation.refit import Refit
from svl.core import Plan, SvlError, fitted_patch
from svl.data.samples import Sample, Samples
from svl.models.lvlm import Lvlm
from svl.models.prompts import with_prompt_style
from svl.selectors.all_tokens import All

every = pytest.mark.parametrize("family", sorted(FILES))
ONE_IMAGE = ("blip2", "fuyu", "instructblip", "kosmos2_5")
VIDEOS = [name for name, files in FILES.items() if files.video]
IMAGES_OR_VIDEOS = ("glm4v", "molmo2")
TAIL = "does more between its decoder layers and its logits than is known here"
NO_LOSS = {
    "aya_vision": TAIL, "cohere2_vision": TAIL, "kosmos2_5": TAIL, "lfm2_vl": TAIL,
    "mllama": "reads images by cross-attention, so strategies that try removals out cannot be used",
}  # fmt: skip
QUESTION, WORDS = "what colour is the shape", ("", " red", " red green blue")


@pytest.fixture(scope="module")
def family_model(tmp_path_factory):
    """A family's model, as `svl.load` reads it, in float32."""
    kept: dict[str, Lvlm] = {}

    def of(name: str) -> Lvlm:
        if name not in kept:
            folder = write(tmp_path_factory.mktemp("families") / name, name)
            loaded = svl.load(folder, device="cpu", dtype="float32", name=name)
            kept[name] = with_prompt_style(loaded, FILES[name].style)
            if name == "kosmos2_5":  # 4,096 patches of every picture take time
                kept[name].processor.images_kwargs = {"max_patches": 64}
        return kept[name]

    return of


def pictures(*counts: int) -> list[list[bytes]]:
    """So many for each prompt, of different sizes.

    No square ones: of a batch without padding in any picture, Phi-4's tower in transformers looks back only.
    """
    return [[png(5 * i + k, 24 - 4 * k, 12 + 4 * i) for k in range(n)] for i, n in enumerate(counts)]


def mixed(lvlm: Lvlm, fewest: int = 0) -> Samples:
    """Three samples with no, two pictures and one, or with one each where the model takes nothing else."""
    shown = pictures(*(1, 1, 1) if lvlm.name in ONE_IMAGE else (fewest, 2, 1))
    rows = (Sample(i, QUESTION + WORDS[i], tuple(images), "blue") for i, images in enumerate(shown))
    return Samples("random", tuple(rows))


def assert_as_alone(lvlm, texts, images, videos=None) -> None:
    """A batch's tokens and logits are those of its prompts alone, and so is the loss of predicting each."""
    videos = videos or [None] * len(texts)
    together = lvlm.encode(texts, images, videos)
    scores, present = logits(lvlm.model, together), together["attention_mask"].bool()
    for i, text in enumerate(texts):
        alone = lvlm.encode([text], [images[i]] if any(images) else None, [videos[i]])
        ids, expected = alone["input_ids"][0], logits(lvlm.model, alone)[0]
        assert torch.equal(together["input_ids"][i][present[i]], ids)
        assert bool(lvlm.is_visual(ids).any()) == bool(images[i] or videos[i])
        close(scores[i][present[i]], expected)
        loss = F.cross_entropy(scores[i][present[i]][:-1], ids[1:])
        assert torch.isfinite(loss)
        assert float(loss) == pytest.approx(float(F.cross_entropy(expected[:-1], ids[1:])), rel=1e-4)


@every
@pytest.mark.column("several_images")
def test_prompts_with_several_images_and_none_are_what_they_are_alone(family, family_model, verdict):
    lvlm = family_model(family)

    def asked(*counts: int):
        return [lvlm.prompt(QUESTION + WORDS[i], n) for i, n in enumerate(counts)], pictures(*counts)

    if family in ONE_IMAGE:
        for counts in ((0, 2, 1), (0, 0), (2, 2)):
            with pytest.raises(
                SvlError, match=rf"'{family}' takes one image before every prompt; these have "
            ) as error:
                lvlm.encode(*asked(*counts))
        verdict("refused", note=str(error.value))
        assert_as_alone(lvlm, *asked(1, 1, 1))
    elif family == "mllama":
        with pytest.raises(SvlError, match="prompts of one batch must show equally many; these have ") as error:
            lvlm.encode(*asked(0, 2, 1))
        verdict("refused", note=str(error.value))
        for counts in ((2, 2, 2), (1, 1, 1), (0, 0)):
            assert_as_alone(lvlm, *asked(*counts))
    else:
        assert_as_alone(lvlm, *asked(0, 2, 1))
        assert_as_alone(lvlm, *asked(0, 0))


@every
@pytest.mark.column("several_images")
def test_calibration_in_batches_measures_what_it_does_one_by_one(family, family_model):
    lvlm = family_model(family)
    samples = mixed(lvlm)
    statistics = ("cosine", "windows", *(() if family in MAPLESS else ("attention",)))
    together, alone = (calibrate(lvlm, samples, statistics=statistics, batch_size=n) for n in (3, 1))
    for ours, theirs in zip(together.traces, alone.traces, strict=True):
        assert torch.equal(ours.visual, theirs.visual)
        assert bool(ours.visual.any()) == bool(samples.samples[ours.index].images)
        for field in ("cosine", "windows", "received", "emitted", "queries", "keys"):
            if (measured := getattr(theirs, field)) is not None:
                assert torch.isfinite(measured).all()
                pair = torch.broadcast_tensors(
                    getattr(ours, field), measured
                )  # counts that all layers share are kept once
                torch.testing.assert_close(*pair, atol=1e-3, rtol=0)


@every
@pytest.mark.column("several_images")
def test_losses_of_samples_with_several_images_and_none(family, family_model):
    lvlm = family_model(family)
    samples = mixed(lvlm)
    if family in NO_LOSS:
        with pytest.raises(SvlError, match=NO_LOSS[family]):
            ModelProbe(lvlm, samples).losses((), ())
        return
    layer = lvlm.anatomy.removable[0]
    loss, without = ModelProbe(lvlm, samples).losses((), (layer,))
    assert [loss, without[layer]] == pytest.approx(rebuilt_losses(lvlm, samples, [(), (layer,)]), rel=1e-4)


@every
def test_no_token_of_an_answer_is_seen_by_those_before_it(family, family_model):
    lvlm = family_model(family)
    pictured = [replace(sample, answer="blue red green") for sample in mixed(lvlm, fewest=int(family == "mllama"))]
    texts = [] if family in ONE_IMAGE else [Sample(3, "the shape is red", plain=True)]
    if family == "mllama":
        pictured[1] = replace(pictured[1], images=pictured[1].images[:1])
    assert_answers_are_unseen(lvlm, Samples("random", (*pictured, *texts)))


def test_a_refit_leaves_what_mllama_adds_for_some_tokens_only(family_model):
    """MLPs of its cross-attention layers add nothing before the picture: these stay, all others are refitted."""
    lvlm = family_model("mllama")
    samples = Samples("random", tuple(replace(s, images=s.images[:1]) for s in mixed(lvlm, fewest=1)))
    hidden = Activations(lvlm, samples, select(calibrate(lvlm, samples, statistics=()), All()))
    first = next(i for i in lvlm.anatomy.removable if i)
    patch = fitted_patch(Refit(), hidden, Plan(lvlm.anatomy.n_layers, (first,)))
    left = [note.split(":")[0] for note in patch.notes if "not all that it writes is added" in note]
    cross = [i for i in range(first - 1, lvlm.anatomy.n_layers) if hasattr(lvlm.layers[i], "cross_attn")]
    assert left == [f"layer {i} mlp" for i in cross if i != first]
    assert left
    assert {layer for layer, _ in patch.updates} == set(range(first - 1, lvlm.anatomy.n_layers)) - {first}


@pytest.mark.parametrize("family", VIDEOS)
@pytest.mark.column("video")
def test_videos_beside_images_and_neither_are_what_they_are_alone(family, family_model):
    lvlm, frames = family_model(family), [[png(10 * v + i, 20, 16) for i in range(4)] for v in range(2)]
    texts = [lvlm.prompt(QUESTION, 0), *(lvlm.prompt(QUESTION + more, 0, video=True) for more in ("", " red"))]
    images, videos = [[], [], []], [None, *frames]
    pictured = [lvlm.prompt("red", 1), *texts], [pictures(1)[0], *images], [None, *videos]
    if family in IMAGES_OR_VIDEOS:
        with pytest.raises(SvlError, match=f"'{family}' takes no images beside videos in one batch"):
            lvlm.encode(*pictured)
        assert_as_alone(lvlm, texts, images, videos)
    else:
        assert_as_alone(lvlm, *pictured)
    forwards, backwards = (
        logits(lvlm.model, lvlm.encode(texts[1:2], None, [f]))[0, -1] for f in (frames[0], frames[0][::-1])
    )
    assert (forwards - backwards).abs().max() > 1e-3 * forwards.abs().max()


@pytest.mark.parametrize("family", sorted(set(FILES) - set(VIDEOS)))
@pytest.mark.column("video")
def test_a_family_without_videos_says_so(family, family_model, verdict):
    lvlm = family_model(family)
    assert not lvlm.takes_videos
    with pytest.raises(SvlError, match=f"'{family}' takes no videos: its processor has no part for them"):
        lvlm.encode([lvlm.prompt(QUESTION, 0)], None, [[png(0)]])
    verdict("none")


@pytest.mark.parametrize("family", ["aya_vision", "ovis2", "llama4", "molmo2"])
def test_a_text_with_the_processors_mark_of_an_image_is_refused(family, family_model):
    """It is another than the placeholder that features replace."""
    lvlm = family_model(family)
    mark = FILES[family].mark
    assert mark != lvlm.tokenizer.convert_ids_to_tokens(lvlm.anatomy.image_token_id)
    with pytest.raises(SvlError, match="leave it out: the template places the image"):
        lvlm.prompt(f"what is {mark}", 1)
