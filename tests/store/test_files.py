"""Files are hashed and written whole."""

import pytest
from helpers.races import race

from svl.store.files import whole_file, write_text_whole


def test_two_processes_write_one_file_whole(tmp_path):
    """In 20 rounds: what is there is one of the two texts, whatever is read meanwhile, and no scratch is left."""
    texts = ["first " * 100_000, "second " * 100_000]

    def write(number: int, process: int) -> bool:
        file = tmp_path / f"report-{number}.md"
        write_text_whole(file, texts[process])
        return file.read_text() in texts

    assert race(write) == [[True, True]] * 20
    assert {path.name for path in tmp_path.iterdir()} == {f"report-{number}.md" for number in range(20)}


def test_a_file_that_fails_stays_as_it_was(tmp_path):
    file = write_text_whole(tmp_path / "report.md", "ä whole")

    def fail() -> None:
        with whole_file(file) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert file.read_text(encoding="utf-8") == "ä whole"
    assert list(tmp_path.iterdir()) == [file]
