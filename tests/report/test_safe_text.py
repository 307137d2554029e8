"""Text from outside, whatever it is, is only ever read: in the terminal, the page, Markdown and tables."""

import csv
import html.parser
import io
import json
import tempfile
import unicodedata
from pathlib import Path
from unittest.mock import patch

from helpers.results import result
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from svl.report import pictures, run_comparison
from svl.report.experiment_report import Report
from svl.report.figures import layers, style
from svl.store.artifacts import Store

NASTY = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "{{ 7 * 7 }}{% raw %}",
    "![x](http://evil.example/x.png)",
    "[x](javascript:alert(1)) <http://evil.example> www.evil.example",
    "a | b\n| --- |\n# heading\n```\n<!-- x",
    "=cmd|' /C calc'!A0",
    "\t@SUM(1)",
    "-2+3+cmd|' /C calc'!A0",
    "\x1b[31mred\x1b]8;;http://evil.example\x07\r\x00\x9b",
    "\u202egnp.exe \u2028 \ud800",
    "&amp; &#60;b&#62; \\<b>\\_",
)
TEXT = st.one_of(st.sampled_from(NASTY), st.text(min_size=1), st.text("`*_[]()<>!|\\#=+-@~&;:\n\r\t\x1b", min_size=1))


def store_with(folder: Path, text: str) -> Store:
    """A store with two runs of one experiment in which everything that can be text holds `text`."""
    store, task, dense_task = Store(folder), f"t{text}", f"t{text}"
    answer = {"question": text, "target": text, "doc_id": text}
    keys = {}
    for name, right in (("dense", 1.0), ("evaluate", 0.0)):

        def build(place: Path, name=name, right=right) -> dict:
            line = {**answer, "prediction": f"{name}{text}", "score": right}
            (place / "samples.jsonl").write_text(json.dumps(line) + "\n")
            (place / "thumbnails.json").write_text(json.dumps({text: f"data:image/webp;base64,{text}"}))
            return {"task": dense_task, "metric": text, "n": 1, "limit": None}

        keys[name] = [store.make("score", {"which": name}, build).key]
    metric = {"value": 0.5, "stderr": 0.1, "dense": 0.8}
    body = result(
        name=f"n{text}",
        model=f"m{text}",
        scores={task: {"metric": text, "n": 1, "metrics": {text: metric}}},
        versions={text: text},
        keys=keys,
    )
    for number in (1, 2):
        parts = {"strategy": f"s{text}", "selector": f"l{text}", "compensation": f"c{number}{text}"}
        methods = {group: {"_target_": text, text: f"{number}{text}"} for group in parts}
        run = store.make("run", {"number": number}, lambda _, made=body | parts | {"settings": methods}: made)
        store.make("track", {"run": run.key}, lambda _, key=run.key: {"run": key, "location": f"{folder}{text}"})
    return store


def written(text: str) -> dict[str, str]:
    """All files of the report of such a store, a comparison of its runs, and what is printed."""
    with tempfile.TemporaryDirectory() as folder, patch.object(pictures, "draw_figures", lambda *_: []):
        store = store_with(Path(folder) / "store", text)
        report = Report.read(store, f"n{text}")
        report.write(Path(folder) / "out")
        files = {file.name: file.read_text(encoding="utf-8") for file in (Path(folder) / "out").iterdir()}
        first, second = (run_comparison.find_run(store, run.key) for run in report.runs)
        files["comparison.md"] = run_comparison.compare_runs(first, second)
        printed = Console(file=io.StringIO(), width=200)
        report.show(printed)
        files["terminal.txt"] = printed.file.getvalue()  # type: ignore[attr-defined]
        return files


class Structure(html.parser.HTMLParser):
    """The tags of a page with the names of their attributes, and its comments."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[object] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, *(name for name, _ in attrs)))

    def handle_endtag(self, tag):
        self.found.append(f"/{tag}")

    def handle_comment(self, data):
        self.found.append("comment")


def blocks(page: str) -> list[str]:
    """Kinds of a Markdown page's blocks."""
    return [token.type for token in MarkdownIt("commonmark").enable("table").parse(page)]


def spans(page: str) -> set[str]:
    """Kinds of what stands within a Markdown page's blocks."""
    tokens = MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(page)
    return {child.type for token in tokens for child in token.children or ()}


PLAIN = written("x")


@settings(max_examples=40, deadline=None)
@given(TEXT)
def test_text_from_outside_is_only_read(text):
    files = written(text)
    assert Structure(files["report.html"]).found == Structure(PLAIN["report.html"]).found
    for name in ("report.md", "table.md", "comparison.md"):
        assert blocks(files[name]) == blocks(PLAIN[name]), name
        assert spans(files[name]) <= {"text", "strong_open", "strong_close", "text_special", "softbreak"}, name
    for name in ("results.csv", "table.csv"):
        lines = list(csv.reader(io.StringIO(files[name])))
        assert [len(line) for line in lines] == [len(line) for line in csv.reader(io.StringIO(PLAIN[name]))]
        for cell in (cell for line in lines for cell in line):
            assert is_number(cell) or not cell.lstrip().startswith(("=", "+", "-", "@")), cell
    for name, content in files.items():
        controls = {letter for letter in content if unicodedata.category(letter) in ("Cc", "Cs")}
        assert controls <= {"\n", "\t"}, name


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def test_any_text_can_stand_in_a_figure(tmp_path):
    from svl.core import Plan

    for text in NASTY:
        figure = layers.importance_bar_charts({text: {0.3: Plan(3, (0,), (1.0, 2.0, 3.0))}}, title=text)
        assert style.write_figure(figure, tmp_path / "x.png").stat().st_size > 1000
