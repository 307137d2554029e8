"""Documents of benchmarks: pictures are read by svl, wherever a data set keeps them."""

from __future__ import annotations

import io
import random
import zipfile

import pytest
from PIL import Image, ImageFile

from svl.core import SvlError

datasets = pytest.importorskip("datasets")

RED = (200, 10, 20)
PLACES = {
    "column": (lambda image: image, lambda picture: picture),
    "list": (lambda image: datasets.List(image), lambda picture: [picture, picture]),
    "lists of lists": (lambda image: datasets.List(datasets.List(image)), lambda picture: [[picture]]),
    "struct": (lambda image: {"image": image}, lambda picture: {"image": picture}),
    "list of structs": (lambda image: datasets.List({"image": image}), lambda picture: [{"image": picture}]),
}


def encoded(form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), RED).save(file, form)
    return file.getvalue()


def cut() -> bytes:
    """Half of a picture that no compression makes small."""
    file = io.BytesIO()
    Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3)).save(file, "PNG")
    return file.getvalue()[: 64 * 64]


def first_row(place: str, data: bytes | None, path: str | None = None):
    """The value of the first row of a data set whose picture is at that place."""
    from svl.evaluation.documents import with_pictures

    feature, value = PLACES[place]
    features = datasets.Features({"x": feature(datasets.Image())})
    rows = {"x": [value({"bytes": data, "path": path})]}
    return with_pictures(datasets.Dataset.from_dict(rows, features))[0]["x"]


@pytest.fixture(autouse=True)
def cut_pictures_are_filled(monkeypatch):
    """As Pillow does after `import lmms_eval`."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)


@pytest.mark.parametrize("place", PLACES)
def test_pictures_are_read_wherever_they_are(place):
    found = first_row(place, encoded())
    while not isinstance(found, Image.Image):
        found = next(iter(found.values())) if isinstance(found, dict) else found[0]
    assert (found.mode, found.getpixel((3, 3))) == ("RGB", RED)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("data", [cut(), encoded("EPS"), b"none"], ids=["cut", "program", "text"])
def test_what_is_no_whole_picture_is_refused_wherever_it_is(data, place):
    with pytest.raises(SvlError, match="cannot read the picture"):
        first_row(place, data)


def test_pictures_in_archives_are_read_in_the_same_way(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("whole.png", encoded())
        archive.writestr("cut.png", cut())
    address = f"zip://{{}}.png::{tmp_path / 'all.zip'}"
    assert first_row("column", None, address.format("whole")).getpixel((0, 0)) == RED
    for name in ("cut", "missing"):
        with pytest.raises(SvlError, match="cannot read the picture"):
            first_row("column", None, address.format(name))
