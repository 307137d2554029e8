"""Rows as people have them: conversations, captions, questions under other names, one picture or several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.sample_pictures import COLORS, PICTURES, colors

from svl.core import SvlError
from svl.data.row_formats import RowOptions
from svl.data.sample_files import read_samples

RED, GREEN, BLUE, _ = COLORS
IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def text(words):
    return {"type": "text", "text": words}


@pytest.fixture
def folder(tmp_path):
    """Pictures a.png (red), b.png (green) and c.png (blue) in `pictures/`."""
    (tmp_path / "pictures").mkdir()
    for name, content in zip("abc", PICTURES, strict=False):
        (tmp_path / "pictures" / f"{name}.png").write_bytes(content)
    return tmp_path


@pytest.fixture
def read(folder):
    """The samples of rows that are written as a JSON array, as LLaVA's own data are."""

    def samples_of(*rows, **options):
        (folder / "data.json").write_text(json.dumps(rows))
        return read_samples(folder / "data.json", options=RowOptions(images=folder / "pictures", **options)).samples

    return samples_of


def said(*turns):
    return [{"from": role, "value": value} for role, value in turns]


# ------------------------------------------------------------------------------------------------- conversations


def test_a_conversation_of_llava(read):
    turns = said(("human", "<image>\nWhat is it?"), ("gpt", "A square."), ("human", "Which colour?"), ("gpt", "Red."))
    (whole,) = read({"id": "1", "image": "a.png", "conversations": turns})
    assert colors(whole) == [RED]
    assert (whole.earlier, whole.prompt, whole.answer) == (
        (("user", "What is it?"), ("assistant", "A square.")),
        "Which colour?",
        "Red.",
    )
    assert [turn["content"] for turn in whole.conversation(answered=True)] == [
        [IMAGE, text("What is it?")],
        [text("A square.")],
        [text("Which colour?")],
        [text("Red.")],
    ]
    (first,) = read({"id": "1", "image": "a.png", "conversations": turns}, turns="first")
    assert (first.earlier, first.prompt, first.answer, colors(first)) == ((), "What is it?", "A square.", [RED])


@pytest.mark.parametrize("words", ["<image>\nWhat?", "What?\n<image>", "What? <image>", "What?"])
def test_one_picture_stands_before_the_text_wherever_its_mark_is(words, read):
    (sample,) = read({"image": "a.png", "conversations": said(("human", words), ("gpt", "x"))})
    assert sample.conversation() == [{"role": "user", "content": [IMAGE, text("What?")]}]


def test_several_pictures_stand_where_their_marks_are(read):
    turns = said(
        ("human", "Here <image> and\n<image>, then:"), ("gpt", "ok"), ("human", "<image>\nSame?"), ("gpt", "no")
    )
    (sample,) = read({"image": ["c.png", "a.png", "b.png"], "conversations": turns})
    assert colors(sample) == [BLUE, RED, GREEN]
    assert [turn["content"] for turn in sample.conversation()] == [
        [text("Here"), IMAGE, text("and"), IMAGE, text(", then:")],
        [text("ok")],
        [IMAGE, text("Same?")],
    ]
    assert [turn["content"] for turn in sample.conversation(pictured=False)] == [
        [text("Here"), text("and"), text(", then:")],
        [text("ok")],
        [text("Same?")],
    ]
    (first,) = read({"image": ["c.png", "a.png", "b.png"], "conversations": turns}, turns="first")
    assert colors(first) == [BLUE, RED]


def test_pictures_without_marks_come_first(read):
    (sample,) = read({"images": ["a.png", "b.png"], "prompt": "Which is red?"})
    assert sample.conversation() == [{"role": "user", "content": [IMAGE, IMAGE, text("Which is red?")]}]


def test_a_conversation_without_pictures(read):
    pictured, bare = read(
        {"image": "a.png", "conversations": said(("human", "<image>\nWhat?"), ("gpt", "x"))},
        {"conversations": said(("system", "Be brief."), ("human", "Hello"), ("gpt", "Hi"))},
    )
    assert len(pictured.images) == 1
    assert (bare.images, bare.earlier, bare.prompt, bare.answer) == ((), (("system", "Be brief."),), "Hello", "Hi")


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "x"}],
        [{"role": "user", "content": [text("What?"), IMAGE]}, {"role": "assistant", "content": [text("x")]}],
        [{"from": "human", "value": "What?"}, {"from": "chatgpt", "value": "x"}],
        [{"role": "user", "content": [{**IMAGE, "text": None}, {**text("What?"), "index": 0}]},
         {"role": "assistant", "content": [{"type": "text", "text": "x", "image": None}]}],
    ],
)  # fmt: skip
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_every_way_to_write_a_turn(turns, column, read):
    (sample,) = read({"images": ["b.png"], column: turns})
    assert (sample.prompt, sample.answer, colors(sample)) == ("What?", "x", [GREEN])


@pytest.mark.parametrize(
    "part", [{"type": "image", "image": "b.png"}, {"type": "image_url", "image_url": {"url": "b.png"}}]
)
def test_pictures_that_stand_in_the_turns(part, read):
    turns = [{"role": "user", "content": [part, text("What?")]}, {"role": "assistant", "content": "x"}]
    (sample,) = read({"messages": turns})
    assert (colors(sample), sample.prompt) == ([GREEN], "What?")


def test_a_question_that_no_one_answered(read):
    (sample,) = read({"messages": [{"role": "user", "content": "What?"}]})
    assert (sample.prompt, sample.answer) == ("What?", "")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (said(("human", "a"), ("human", "b")), "turns are by user, user, but user and assistant must take turns"),
        (said(("gpt", "a")), "turns are by assistant"),
        (said(("system", "a")), "turns are by system"),
        ([], "turns are by no one"),
        (said(("tool", "a")), "by 'tool', but must be by one of: user, human, assistant"),
        (
            said(("human", "<image> <image>"), ("gpt", "x")),
            "<image> stands 2 times in its texts, but it has 1 pictures",
        ),
        ([{"role": "user", "content": [{"type": "audio"}]}], "of type 'audio', but must be text, image or video"),
        ([{"value": "x"}], "no column 'from'"),
        ("hello", "its turns are not a list of objects"),
    ],
)
def test_conversations_that_are_none_are_named(turns, message, read):
    good = {"image": "a.png", "conversations": said(("human", "What?"), ("gpt", "x"))}
    with pytest.raises(SvlError, match=rf"row 1 of '.*data\.json' cannot be read: .*{message}"):
        read(good, {"image": "a.png", "conversations": turns})


# ---------------------------------------------------------------------------------------- other names of columns


def test_columns_of_other_names(read):
    row = {"picture": "a.png", "query": "What?", "label": "red", "prompt": 7}
    (sample,) = read(row, columns={"image": "picture", "prompt": "query", "answer": "label"})
    assert (sample.prompt, sample.answer, colors(sample)) == ("What?", "red", [RED])


@pytest.mark.parametrize(
    ("answers", "answer"),
    [
        (["red", "blue", "blue"], "blue"),
        (["red", "blue"], "red"),
        ([{"answer": "x"}, {"answer": "y"}, {"answer": "y"}], "y"),
        ("red", "red"),
        ([3], "3"),
        ([], ""),
        ([None, "", "red"], "red"),
        (None, ""),
        (float("nan"), ""),
        ("  \n", ""),
        ({"value": "x"}, None),
        ([["x"]], None),
        ([{"value": "x"}], None),
        ([{"answer": {}}], None),
    ],
)
def test_of_several_answers_the_one_that_most_gave(answers, answer, read):
    row = {"image": "a.png", "question": "What?"}
    asked = {"prompt": "question"}
    for found, options in (
        ({"answers": answers}, {"format": "question"}),
        ({"answers": answers}, {"columns": asked}),
        ({"answers": answers}, {"columns": {**asked, "answer": "answers"}}),
        ({"answer": answers}, {"columns": asked}),
    ):
        if answer is None:  # what a mapping means is not guessed
            with pytest.raises(SvlError, match=r"answers? holds a (dict|list), but must be a text or number"):
                read({**row, **found}, **options)
        else:
            (sample,) = read({**row, **found}, **options)
            assert sample.answer == answer


def test_a_table_of_whole_numbers_has_them_as_integers_though_some_are_missing(tmp_path):
    """3.0 is what a table makes of 3 where another row has no number; beside 2.5 it is what it says."""
    import pyarrow
    import pyarrow.parquet

    for numbers, answers in (
        ([3.0, float("nan"), 4.0], ["3", "", "4"]),
        ([3.0, None, 4.0], ["3", "", "4"]),
        ([3.0, None, 2.5], ["3.0", "", "2.5"]),
        ([3, None, 4], ["3", "", "4"]),
    ):
        table = pyarrow.table({"prompt": ["How many?"] * 3, "answer": pyarrow.array(numbers)})
        pyarrow.parquet.write_table(table, tmp_path / "counts.parquet")
        samples = read_samples(tmp_path / "counts.parquet", options=RowOptions(columns={"image": None}))
        assert [sample.answer for sample in samples] == answers
        with pytest.raises(SvlError, match="a loss needs answers, but 1 samples have none, row 1 of"):
            samples.check_answered("a loss")


def test_columns_that_are_not_there_are_named(read):
    row = {"image": "a.png", "question": "What?", "answers": ["x"]}
    with pytest.raises(SvlError, match=r"no column 'prompt'; there are: image, question, answers; .*columns=\{prompt:"):
        read(row)
    with pytest.raises(SvlError, match=r"columns names 'quest', but there is no such column \(did you mean 'question'"):
        read(row, columns={"prompt": "quest"})
    with pytest.raises(SvlError, match=r"a key of calibration.columns is 'prompts', .*did you mean 'prompt'"):
        read(row, columns={"prompts": "question"})
    with pytest.raises(SvlError, match=r"calibration.turns is 'last', but must be one of: all, first"):
        read(row, turns="last")
    with pytest.raises(SvlError, match=r"calibration.images: there is no folder 'nowhere'"):
        RowOptions(images=Path("nowhere"))


def test_text_alone_must_be_said(read):
    row = {"prompt": "Who?", "answer": "me"}
    with pytest.raises(SvlError, match=r"no column 'image'.* \{image: null\} says that there are no pictures"):
        read(row)
    (sample,) = read(row, columns={"image": None})
    assert (sample.prompt, sample.answer, sample.images) == ("Who?", "me", ())


def test_captions(read):
    for column in ("caption", "text"):
        (sample,) = read({"image": "c.png", column: "A blue square."})
        assert (sample.prompt, sample.answer, colors(sample)) == ("Describe this image.", "A blue square.", [BLUE])
    (sample,) = read({"image": "c.png", "caption": ["one", "two"]}, prompt="Say it.")
    assert (sample.prompt, sample.answer) == ("Say it.", "one")


# ---------------------------------------------------------------------------------------------------------- video


def test_frames_are_a_video(read):
    (sample,) = read({"video": ["a.png", "b.png"], "prompt": "What happens?"})
    assert [frame.getpixel((0, 0)) for frame in sample.video] == [RED, GREEN]
    assert (sample.images, sample.conversation()[0]["content"]) == ((), [VIDEO, text("What happens?")])


@pytest.mark.parametrize("mark", ["<image>", "<video>"])
def test_a_video_in_a_conversation_of_llava(mark, read):
    turns = said(("human", f"{mark}\nWhat happens?"), ("gpt", "It moves."))
    (sample,) = read({"video": ["a.png", "b.png", "c.png"], "conversations": turns})
    assert len(sample.frames) == 3
    assert sample.conversation()[0]["content"] == [VIDEO, text("What happens?")]
