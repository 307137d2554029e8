"""Figures change with every part of their data."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from svl.core import Plan, SvlError
from svl.report.figures import curves, direct_labels, layers, style, tokens
from svl.report.figures.curves import Gap, Point, Spectrum


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Fewer pixels, which take most of the time."""
    monkeypatch.setattr(style, "DPI", 60)


def pixels(figure, path):
    """The figure as an image's bytes."""
    with Image.open(style.write_figure(figure, path)) as image:
        assert image.width == style.WIDTH * style.DPI
        return image.tobytes()


def test_accuracy_figure_shows_its_data(tmp_path):
    def draw(last, error=1.0, dense=90.0):
        points = {"a_$b": [Point(0.2, 70.0, 69.0, 71.0), Point(0.4, last, last - error, last + error)], "empty": []}
        return pixels(curves.accuracy_vs_ratio(points, dense), tmp_path / "x.png")

    assert draw(50.0) == draw(50.0)
    assert len({draw(50.0), draw(60.0), draw(50.0, error=4.0), draw(50.0, error=0.0), draw(50.0, dense=None)}) == 5


def test_importance_figure_shows_its_data(tmp_path):
    def draw(*removed, importance=(0.1, 0.2, 0.3)):
        return pixels(layers.importance_bar_charts({"a": {0.3: Plan(3, removed, importance)}}), tmp_path / "x.png")

    assert draw(0) == draw(0)
    assert len({draw(0), draw(1), draw(), draw(0, importance=(0.1, 0.3, 0.2)), draw(0, importance=())}) == 5
    draw(0, importance=(0.001, 0.5, 1.0))  # logarithmic
    with pytest.raises(SvlError, match="plans of one model"):
        layers.importance_bar_charts({"a": {0.1: Plan(3, (0,)), 0.2: Plan(4, (0,))}})


def test_speed_figure_shows_its_data(tmp_path):
    def draw(speed, ratio=0.4, dense=90.0):
        points = {"a": [Point(0.2, 80.0, 79.0, 81.0, 1.1), Point(ratio, 60.0, 60.0, 60.0, speed)], "empty": []}
        return pixels(curves.accuracy_vs_speed(points, dense), tmp_path / "x.png")

    assert len({draw(1.3), draw(1.4), draw(1.3, ratio=0.3), draw(1.3, dense=None)}) == 4


def test_pareto():
    points = [(1.0, 90.0), (1.2, 80.0), (1.1, 79.0), (1.5, 60.0), (1.5, 55.0), (0.9, 90.0), (1.2, 80.0)]
    beaten = {p for p in points for q in points if q != p and q[0] >= p[0] and q[1] >= p[1]}
    assert curves.pareto(points) == sorted(set(points) - beaten)


def test_maps_show_their_data(tmp_path):
    def ranks(*removed, importance=(0.1, 0.2, 0.3)):
        plans = {"a": [Plan(3, removed, importance)], "b" * 60: [Plan(3, (1,), (3, 2, 1))]}
        return pixels(layers.importance_rank_heatmap(plans), tmp_path / "x.png")

    assert ranks(0) == ranks(0, importance=(1, 2, 30))  # scales have no common unit
    assert len({ranks(0), ranks(1), ranks(), ranks(0, importance=(0.1, 0.3, 0.2))}) == 4

    def gone(*removed, ratio=0.3):
        return pixels(layers.removed_layers({"a": {ratio: [Plan(3, removed)]}}), tmp_path / "x.png")

    assert len({gone(0), gone(1), gone(), gone(0, ratio=0.4)}) == 4
    for draw, plans in (
        (layers.removed_layers, {"a": {0.1: [Plan(3, (0,))], 0.2: [Plan(4, (0,))]}}),
        (layers.importance_rank_heatmap, {}),
    ):
        with pytest.raises(SvlError, match="plans of one model"):
            draw(plans)


def test_gap_and_spectrum_show_their_data(tmp_path):
    def gap(after, before=0.3):
        return pixels(curves.feature_gap({"25 %": {"a": Gap([3, 4], [0.2, before], [0.1, after])}}), tmp_path / "x.png")

    assert len({gap(0.1), gap(0.2), gap(0.1, before=0.4), gap(0.001)}) == 4

    def spectrum(values=(4.0, 2.0, 1.0), squares=21.0, rank=1, panels=1):
        body = {"layer 3": Spectrum(values, squares, rank)}
        return pixels(curves.spectrum({f"a {i}": body for i in range(panels)}), tmp_path / "x.png")

    variants = [spectrum(), spectrum((4.0, 2.0, 1.5)), spectrum(squares=30.0), spectrum(rank=2), spectrum(panels=3)]
    assert len(set(variants)) == 5


def test_token_figure_shows_its_data(tmp_path):
    image = Image.new("RGB", (20, 10), "white")

    def draw(**other):
        text = [["<s>", 0.5, 1.0], ["▁dog", 0.1, 0.0], ["日本", 0.2, 0.5]] * 40  # more than fit
        body = {"grid": [1, 2], "visual": [0.1, 0.2], "visual_selected": [1, 0], "text": text}
        return pixels(tokens.token_importance(image, body | other), tmp_path / "x.png")

    assert draw() == draw()
    variants = [
        draw(),
        draw(visual=[0.2, 0.1]),
        draw(visual_selected=[0, 1]),
        draw(text=[["a", 0.1, 1.0]]),
        draw(text=[]),
    ]
    assert len(set(variants)) == 5
    with pytest.raises(SvlError, match="1 values of 'visual' for a grid of 1 x 2"):
        draw(visual=[0.1])


# ------------------------------------------------------------------------------------------------- colours

# What people with no, red, green or blue blindness see of linear RGB (Machado, Oliveira and Fernandes 2009)
SEEN = (
    np.eye(3),
    np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
)
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def lab(color, seen):
    """A colour as somebody sees it, in CIE L*a*b*."""
    values = np.array(to_rgb(color))
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    ratio = XYZ @ np.clip(seen @ linear, 0, 1) / XYZ.sum(1)
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_fourteen_methods_have_colours_and_marks_of_their_own():
    looks = style.looks([f"method {i}" for i in range(14)]).values()
    colors = [look.color for look in looks] + ["black"]  # the dense model
    assert len({look.marker for look in looks}) == 14
    for seen in SEEN:
        points = [lab(color, seen) for color in colors]
        distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(points, 2)]
        assert min(distances) > 15  # 2.3 is the least that people notice side by side
    assert all(lab(color, np.eye(3))[0] < 80 for color in colors)  # stands out from the white page


def test_marks_of_many_methods_stand_beside_each_other():
    points = {f"m{i}": [Point(ratio, 50.0, 45.0, 55.0) for ratio in (0.1, 0.2)] for i in range(12)}
    figure = curves.accuracy_vs_ratio(points, 90.0)
    marks = sorted(line.get_xdata()[-2] for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 3)
    assert len(marks) == 12
    assert min(b - a for a, b in itertools.pairwise(marks)) > 0
    assert max(abs(x - 10) for x in marks) < 5  # nearer to their ratio than to any other


def test_seeds_are_all_in_the_figures_of_layers(tmp_path):
    def gone(*plans):
        found = [Plan(3, (i,), tuple(float(j != i) for j in range(3))) for i in plans]
        return (
            pixels(layers.removed_layers({"a": {0.3: found}}), tmp_path / "x.png"),
            pixels(layers.importance_rank_heatmap({"a": found}), tmp_path / "y.png"),
        )

    first, second, both = gone(0), gone(1), gone(0, 1)
    assert len({first[0], second[0], both[0]}) == len({first[1], second[1], both[1]}) == 3


# ------------------------------------------------------------------------------------------------- direct labels


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.5, 0.52, 0.9], [0.46, 0.56, 0.9]),
        ([0.3, 0.35, 0.42, 0.5], [0.2425, 0.3425, 0.4425, 0.5425]),  # the first three push the fourth
        ([], []),
    ],
)
def test_labels_that_would_touch_are_spread_about_their_middle(places, expected):
    assert direct_labels.spread(places, 0.1) == pytest.approx(expected)


def written(figure):
    """By text, its box on the drawn figure."""
    figure.draw_without_rendering()
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    return {text.get_text(): text.get_window_extent() for text in texts}


def test_every_method_is_named_beside_its_line_and_no_name_covers_another():
    points = {f"method {i}": [Point(0.2, 50.0 + 0.1 * i, 45.0, 55.0)] for i in range(14)}
    boxes = written(curves.accuracy_vs_ratio(points, 90.0))
    assert set(boxes) == {*points, "dense (none removed)"}
    for one, other in itertools.combinations(boxes.values(), 2):
        assert not one.overlaps(other)
    heights = [boxes[label].y0 for label in points]
    assert heights == sorted(heights)  # as the lines end


def test_every_plan_is_named_beside_its_point():
    points = {f"m{i}": [Point(0.2, 50.0 + i, 49.0, 51.0, 1.1 + 0.01 * i), Point(0.4, 40.0, 39, 41, 1.3 + 0.05 * i)]
              for i in range(4)}  # fmt: skip
    boxes = written(curves.accuracy_vs_speed(points, 90.0))
    assert set(boxes) == {*(f"m{i} {ratio}" for i in range(4) for ratio in (20, 40)), "dense"}
    for one, other in itertools.combinations(boxes.values(), 2):
        assert not one.overlaps(other)


def test_single_seeds_are_dots(tmp_path):
    def draw(*seeds):
        return pixels(
            curves.accuracy_vs_ratio({"a": [Point(0.2, 50.0, 45.0, 55.0, seeds=seeds)]}, 90.0), tmp_path / "x.png"
        )

    assert len({draw(), draw(42.0, 58.0), draw(43.0, 57.0)}) == 3


def test_methods_that_choose_layers_together_are_marked(tmp_path):
    plans = {"block": [Plan(3, (1,), (0.1, 0.2, 0.3))]}
    pictures = [
        pixels(layers.importance_rank_heatmap(plans, jointly=marked), tmp_path / "x.png") for marked in ((), ("block",))
    ]
    assert len(set(pictures)) == 2


def test_the_cover_counts_a_part_of_a_layer_as_half_of_it():
    plans = {"a": {0.3: [Plan(3, (0,), removed_attn=(1,))]}, "b": {0.3: [Plan(3, (), removed_mlp=(1,))]}}
    (bars,) = layers.removed_layers(plans).axes[1].containers
    assert [bar.get_height() for bar in bars] == [1.0, 1.0, 0.0]


def test_ratios_that_are_close_have_one_number_below_the_axis():
    """Of 12.5 and 13 %, the one that more methods have; their points stand where they belong."""
    points = {
        "a": [Point(0.125, 0.5, 0.4, 0.6), Point(0.3, 0.4, 0.3, 0.5)],
        "b": [Point(0.125, 0.5, 0.4, 0.6)],
        "c": [Point(0.13, 0.6, 0.5, 0.7)],
    }
    ax = curves.accuracy_vs_ratio(points, 0.9).axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "12.5", "30"]


def test_the_cover_counts_how_many_methods_remove_each_layer():
    plans = {
        "a": {0.3: [Plan(3, (0,)), Plan(3, (1,))]},  # two seeds: half a method each
        "b": {0.3: [Plan(3, (0,))], 0.6: [Plan(3, (0, 2))]},
    }
    counts = layers.removed_layers(plans).axes[1]
    heights = [[bar.get_height() for bar in bars] for bars in counts.containers]
    assert heights == [[1.5, 0.5, 0.0], [1.0, 0.0, 1.0]]
    assert len(layers.removed_layers({"a": plans["a"]}).axes) == 1  # one method needs no count
