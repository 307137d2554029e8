"""The pictures of a row, however the row holds them."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from helpers.sample_pictures import BASE64, COLORS, PICTURES, picture
from helpers.video_standins import write_video
from PIL import Image

from svl.core import SvlError
from svl.data.picture_fields import encoded_frames, encoded_pictures

NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def color(content: bytes):
    return Image.open(io.BytesIO(content)).convert("RGB").getpixel((0, 0))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURES[0])
    return tmp_path


FORMS = {
    "bytes": PICTURES[0],
    "path": "a.png",
    "struct of bytes": {"bytes": PICTURES[0], "path": None},
    "struct of a path": {"bytes": None, "path": "a.png"},
    "list": [{"bytes": PICTURES[0], "path": "x.png"}],
    "base64": base64.b64encode(PICTURES[0] + b"\0" * 60).decode(),
    "wrapped base64": "\n".join([BASE64[0][:76], BASE64[0][76:], ""]),
    "data address": f"data:image/png;base64,{BASE64[0]}",
    "open picture": Image.new("RGB", (4, 4), COLORS[0]),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_picture(form, folder):
    (found,) = encoded_pictures(FORMS[form], folder, "row 3")
    assert color(found) == COLORS[0]


def test_jpeg_in_base64_is_no_path(folder):
    content = base64.b64encode(picture(COLORS[1], kind="jpeg")).decode()
    assert content.startswith("/9j/")
    (found,) = encoded_pictures(content, folder, "row 3")
    assert Image.open(io.BytesIO(found)).format == "JPEG"


def test_several_pictures_and_none(folder):
    found = encoded_pictures([PICTURES[1], None, "a.png", {"bytes": None, "path": None}], folder, "row 3")
    assert [color(content) for content in found] == [COLORS[1], COLORS[0]]
    assert encoded_pictures(None, folder, "row 3") == encoded_pictures([], folder, "row 3") == ()


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("https://example.org/cat.png", "it is an address; download the pictures"),
        ("data:image/svg+xml,%3Csvg/%3E", "its data: address is not in base64"),
        ("data:image/png;base64,@@@@", "it is no base64"),
        (base64.b64encode(b"no picture at all" * 99).decode(), "it is none of PNG, JPEG"),
        (BASE64[0][:-40] * 30, "cannot read the picture of row 3"),
        ("000.png", r"No such file .*\(calibration.images names the folder that paths start from\)"),
        ("/nowhere/000.png", r"No such file or directory$"),
        ("folder/" * 40 + "x.png", "No such file|File name too long"),
    ],
)
def test_what_is_no_picture_is_one_short_line(field, message, folder):
    with pytest.raises(SvlError, match=message) as caught:
        encoded_pictures(field, folder, "row 3")
    assert str(caught.value).startswith("cannot read the picture")
    assert "row 3" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_an_encoded_picture_is_never_shown(folder):
    content = base64.b64encode(NOISE.tobytes()).decode()
    for field in (content, f"data:image/png;base64,{content}", NOISE.tobytes(), {"bytes": NOISE.tobytes()}):
        with pytest.raises(SvlError) as caught:
            encoded_pictures(field, folder, "row 3")
        assert len(str(caught.value)) < 200
        assert content[:40] not in str(caught.value)


# ------------------------------------------------------------------------------------------------------ videos


def greys(frames):
    return [round(float(np.asarray(Image.open(io.BytesIO(frame))).mean()) / 10) for frame in frames]


@pytest.mark.parametrize(("n", "wanted"), [(1, [0]), (2, [0, 20]), (5, [0, 5, 10, 15, 20]), (99, list(range(21)))])
def test_frames_of_a_file_are_evenly_spaced(n, wanted, tmp_path):
    write_video(tmp_path / "v.mp4", 21)
    assert greys(encoded_frames("v.mp4", tmp_path, "row 3", n)) == wanted
    assert greys(encoded_frames(["v.mp4"], tmp_path, "row 3", n)) == wanted
    content = (tmp_path / "v.mp4").read_bytes()
    assert greys(encoded_frames({"bytes": content, "path": "v.mp4"}, tmp_path, "row 3", n)) == wanted


def test_a_list_of_frames_is_shown_whole(folder):
    assert [color(f) for f in encoded_frames([PICTURES[2], "a.png"], folder, "row 3", 1)] == [COLORS[2], COLORS[0]]
    assert encoded_frames(None, folder, "row 3", 8) == ()


@pytest.mark.parametrize(
    ("field", "message"),
    [("none.mp4", "no regular file"), ("a.png.mp4", "Invalid data"), (5, "it is neither")],
)
def test_what_is_no_video_is_named(field, message, folder):
    (folder / "a.png.mp4").write_bytes(b"no video")
    with pytest.raises(SvlError, match=rf"cannot read the video.* of row 3: .*{message}"):
        encoded_frames(field, folder, "row 3", 8)
