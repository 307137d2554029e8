"""The page over a running sweep: written when runs finish, whole at any time."""

from pathlib import Path

import pytest
from helpers.results import result

from svl.core import SvlError
from svl.report import dashboard, main

OUT = Path("out")


def page():
    return (OUT / "report.html").read_text(encoding="utf-8")


def test_the_page_follows_the_store(store, no_figures):
    """Three looks at the store: nothing yet; a run and one of another experiment; no news; another run."""

    def ticks():
        yield
        assert "no run has finished yet" in page()
        store.add(result(), result(name="other"))
        yield
        assert "1 run has finished" in page()
        assert 'http-equiv="refresh" content="7"' in page()
        (OUT / "report.html").write_text("untouched")
        yield
        assert page() == "untouched"  # no news, no work
        store.add(result("tail", 0.125, 0.5))
        yield

    assert list(dashboard.follow(store, "demo", OUT, 7, ticks())) == [0, 1, 2]
    assert 'http-equiv="refresh"' not in page()  # it has ended
    assert "2 runs." in page()
    assert (OUT / "table.tex").is_file()
    assert not [path for path in OUT.iterdir() if "incomplete" in path.name]


def test_stopped_by_the_user_the_page_stays_and_no_longer_asks_to_be_read(store, no_figures, monkeypatch, capsys):
    store.add(result())

    def stop(seconds):
        assert seconds == 9
        assert "Live: 1 run has finished" in page()
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", stop)
    assert main(["dashboard", "out=out", "every=9"]) == 0
    assert "Live:" not in page()
    assert "ended" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [(["every=0"], "every is 0, but must be at least 1 second"), ([], "which experiment? Give experiment=NAME; ")],
)
def test_mistakes_are_one_line(store, capsys, words, line):
    store.add(result(), result(name="other"))
    assert main(["dashboard", *words]) == 1
    assert line in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(store):
    Path("file").touch()
    with pytest.raises(SvlError, match="cannot write the report to file"):
        list(dashboard.follow(store, "demo", Path("file/there"), 5, [None]))
