"""Pictures are read as people see them, whatever the file; what is none, or too large, is one line."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from transformers.image_utils import load_image

from svl.core import SvlError
from svl.data.pictures import FORMATS, LIMIT, open_picture

ORIENTATION = 0x0112


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


# ------------------------------------------------------------------------------------------------- orientation

# what each EXIF orientation does to rows and columns that were stored
TURNED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda p: np.rot90(p),
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", TURNED)
def test_pictures_stand_upright(orientation, kind, tmp_path):
    """As transformers' own reader turns them, which follows the same tag."""
    stored = noise(9, 14)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    lossless = {"lossless": True} if kind == "WEBP" else {}
    file = tmp_path / f"picture.{kind.lower()}"
    file.write_bytes(encoded(Image.fromarray(stored), kind, exif=exif, **lossless))
    found = open_picture(file)
    assert np.array_equal(pixels(found), pixels(load_image(str(file))))
    if kind != "JPEG":
        assert np.array_equal(pixels(found), TURNED[orientation](stored))
    assert np.array_equal(pixels(open_picture(Image.open(file))), pixels(found))  # open already
    assert np.array_equal(pixels(open_picture(found)), pixels(found))  # turned once, not again


def test_a_damaged_note_about_the_camera_hides_no_picture():
    """Viewers show such files. The resolution, written as text where a number belongs, cannot be written again."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[0x011A] = 72.0
    stored = Image.fromarray(noise(8, 16))
    data = encoded(stored, "JPEG", exif=exif)
    entry = data.index(struct.pack(">HHI", 0x011A, 5, 1))
    damaged = data[:entry] + struct.pack(">HHI", 0x011A, 2, 4) + data[entry + 8 :]
    assert np.array_equal(pixels(open_picture(damaged)), pixels(open_picture(data)))


# ------------------------------------------------------------------------------------------------------ depths


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), top=st.integers(1, 65535))
def test_deep_greys_are_scaled(kind, seed, top):
    """16 bits to 8: value / 65535 * 255, however bright the picture is."""
    deep = np.random.default_rng(seed).integers(0, top + 1, (5, 6), dtype=np.uint16)
    found = pixels(open_picture(encoded(Image.fromarray(deep), kind)))
    expected = np.rint(deep.astype(np.float64) * 255 / 65535)
    assert np.array_equal(found, np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize(("top", "scale"), [(1.0, 255.0), (0.5, 255.0), (255.0, 1.0), (60000.0, 255 / 65535)])
def test_fractions_are_scaled_by_the_range_that_they_fill(top, scale):
    values = np.random.default_rng(0).uniform(0, top, (5, 6)).astype(np.float32)
    values[0, 0] = top
    found = pixels(open_picture(encoded(Image.fromarray(values), "TIFF")))
    assert np.array_equal(found[..., 0], np.rint(values.astype(np.float64) * scale))


@pytest.mark.parametrize(
    "values", [[[-1.0, 2.0]], [[float("nan"), 1.0]], [[float("inf"), 1.0]], [[70000.0, 1.0]]], ids=str
)
def test_numbers_without_a_range_are_refused(values):
    data = encoded(Image.fromarray(np.array(values, dtype=np.float32)), "TIFF")
    with pytest.raises(SvlError, match="cannot read row 3: its greys are not"):
        open_picture(data, "row 3")


def test_integers_of_32_bits_are_shown():
    deep = Image.fromarray(np.array([[0, 100, 255]], dtype=np.int32))
    assert pixels(open_picture(encoded(deep, "TIFF")))[0, :, 0].tolist() == [0, 100, 255]


# -------------------------------------------------------------------------------------------------------- alpha


@settings(max_examples=40, deadline=None)
@given(mode=st.sampled_from(["RGBA", "LA"]), kind=st.sampled_from(["PNG", "WEBP", "TIFF"]), seed=st.integers(0, 2**20))
def test_transparent_pictures_lie_on_white(mode, kind, seed):
    """c a + 255 (1 - a), to a level of rounding; colour under full transparency never shows."""
    stored = noise(4, 5, 4 if mode == "RGBA" else 2, seed)
    stored[0, 0, -1], stored[1, 1, -1] = 0, 255
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    found = pixels(open_picture(encoded(Image.fromarray(stored, mode), kind, **options))).astype(float)
    alpha = stored[..., -1:].astype(float) / 255
    colour = stored[..., :-1].astype(float)
    expected = colour * alpha + 255 * (1 - alpha)
    assert np.abs(found - expected).max() <= 1
    assert found[0, 0].tolist() == [255, 255, 255]
    assert np.array_equal(found[1, 1], np.broadcast_to(colour[1, 1], 3))


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_is_white(mode):
    """A palette entry, a grey or a colour that the file says is not there."""
    colour = Image.new("RGB", (3, 1), (10, 200, 30))
    colour.putpixel((1, 0), (90, 90, 90))
    image = colour.convert(mode) if mode != "P" else colour.quantize(4)
    gone = image.getpixel((1, 0))
    found = pixels(open_picture(encoded(image, "PNG", transparency=gone)))
    assert found[0, 1].tolist() == [255, 255, 255]
    assert found[0, 0].tolist() == pixels(image.convert("RGB"))[0, 0].tolist()


# --------------------------------------------------------------------------------------------- frames, formats


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_counts(kind):
    frames = [Image.new("RGB", (6, 4), c) for c in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.array_equal(pixels(open_picture(data)), pixels(frames[0]))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "RGBA", "LA", "I;16"])
def test_every_common_mode_becomes_rgb_of_the_same_size(mode):
    kind = {"CMYK": "TIFF"}.get(mode, "PNG")
    image = Image.new(mode, (7, 5))
    assert open_picture(encoded(image, kind)).size == (7, 5)


@pytest.mark.parametrize("kind", FORMATS)
def test_allowed_formats_are_read(kind):
    image = Image.fromarray(noise(16, 16))
    assert open_picture(encoded(image, kind)).size == (16, 16)


@pytest.mark.parametrize("kind", ["EPS", "ICO", "TGA", "PCX", "SGI", "ICNS"])
def test_other_formats_are_not_even_tried(kind, tmp_path, monkeypatch):
    """Pillow would start Ghostscript for an EPS."""
    data = encoded(Image.fromarray(noise(16, 16)), kind)
    monkeypatch.setattr("subprocess.Popen", None)
    with pytest.raises(SvlError, match="cannot read row 3: it is none of PNG, JPEG, WEBP"):
        open_picture(data, "row 3")


# ------------------------------------------------------------------------------------------------ what is none


def png_of_zeros(width: int, height: int) -> bytes:
    """A PNG of 1-bit greys: a few kilobytes, whatever its size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    body = b"".join(rows.compress(row) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_small_files_of_huge_pictures_are_refused_before_they_are_decoded(monkeypatch):
    data = png_of_zeros(13000, 13000)
    assert len(data) < 50_000
    assert open_picture(png_of_zeros(4000, 3000)).size == (4000, 3000)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(SvlError, match=r"cannot read row 3: 13000 x 13000 pixels take 644 MiB"):
        open_picture(data, "row 3")
    with pytest.raises(SvlError, match="cannot read row 3: "):
        open_picture(png_of_zeros(40000, 20000), "row 3")  # beyond Pillow's own limit


def test_pipes_devices_and_folders_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero", tmp_path):
        with pytest.raises(SvlError, match=f"cannot read row 3: '{path}' is no regular file"):
            open_picture(path, "row 3")
    with pytest.raises(SvlError, match=r"cannot read row 3: '.*nowhere.png': No such file"):
        open_picture(tmp_path / "nowhere.png", "row 3")


def test_files_larger_than_any_picture_are_refused(tmp_path):
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(LIMIT + 1)
    with pytest.raises(SvlError, match=r"cannot read row 3: '.*sparse.png' has 512 MiB"):
        open_picture(tmp_path / "sparse.png", "row 3")


DAMAGED = {kind: encoded(Image.fromarray(noise(24, 24)), kind) for kind in FORMATS}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_pictures_are_one_line_or_a_picture(data):
    """Cut anywhere, or with a few bytes changed."""
    content = bytearray(DAMAGED[data.draw(st.sampled_from(FORMATS))])
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        image = open_picture(bytes(content), "row 3")
    except SvlError as error:
        message = str(error)
    else:
        assert image.mode == "RGB"
        return
    assert message.startswith("cannot read row 3: ")
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_cut_picture_is_refused_not_half_grey(kind, lenient, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)  # lmms-eval sets it on import, for all
    data = DAMAGED[kind]
    with pytest.raises(SvlError, match="cannot read row 3"):
        open_picture(data[: len(data) * 3 // 4], "row 3")
