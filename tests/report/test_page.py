"""The page: nothing is fetched, text stays text, and it works in a browser."""

import base64
import html.parser
import io
import json
import re
import shutil
from pathlib import Path

import pytest
from helpers.results import result, scored
from PIL import Image

from svl.report import main, page
from svl.report.experiment_report import Report


class Elements(html.parser.HTMLParser):
    """All start tags of a page with their attributes, and the text of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script"

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts.append(data)


def test_page_holds_everything(store):
    scored(store)
    assert main(["experiment=demo", "out=out"]) == 0
    text = Path("out/report.html").read_text(encoding="utf-8")
    report = Report.read(store, "demo")
    found = Elements(text)
    for tag, attributes in found.tags:  # nothing is fetched
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
        assert tag not in ("link", "iframe", "object", "base")
    assert not re.search(r"https?://|@import|url\(", text)
    policy = next(a["content"] for t, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    drawn = [a["src"] for t, a in found.tags if t == "img" and "src" in a]
    assert len(drawn) == len(list(Path("out").glob("*.png"))) == 2
    assert base64.b64decode(drawn[0].partition(",")[2]) == Path("out/accuracy_vs_ratio.png").read_bytes()

    images = json.loads(next(script for script in found.scripts if script.startswith("{")))
    shown = {a["data-image"] for t, a in found.tags if t == "img" and "data-image" in a}
    assert shown == set(images)
    dense = report.runs[0].result["keys"]["dense"][0]
    first_lost = {*range(4), *range(6, 14), *range(8)}  # by each of the three, 8 at most
    assert shown == {f"{dense}/{i}" for i in first_lost | {16, 17}}  # the last two are gained
    cells = [float(a["data-value"]) for t, a in found.tags if t == "td" and a.get("class") == "measured"]
    values = [cell.value for line in report.tables[0].lines for cell in line.cells[3:]]
    assert cells == pytest.approx(values)
    assert "t: 4 lost, 2 gained" in text
    assert "t: 10 lost, 0 gained" in text
    assert "… and 2 more lost." in text
    assert "&lt;/script&gt;&lt;b&gt;no 0" in text  # text stays text
    assert "layer 7: removed" in text
    assert text.count('class="gone"') == 2 + 3 + 2


def test_page_without_scores(store, no_figures):
    store.add(result(keys={"evaluate": ["gone"], "dense": ["gone"]}))
    assert main(["experiment=demo", "out=out"]) == 0
    assert "None are stored." in Path("out/report.html").read_text()


@pytest.fixture
def chromium():
    """A headless browser."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: chromium)")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "mobile"), [(1280, False), (390, True)], ids=["desktop", "phone"])
def test_page_in_a_browser(store, chromium, width, mobile):
    scored(store)
    report = Report.read(store, "demo")
    Path("report.html").write_text(
        page.render_page("demo", report.sections, report.tables, [[]], store), encoding="utf-8"
    )
    context = chromium.new_context(viewport={"width": width, "height": 800}, is_mobile=mobile, has_touch=mobile)
    tab = context.new_page()
    noise, requests = [], []
    tab.on("console", lambda message: noise.append(message.text))
    tab.on("pageerror", lambda error: noise.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url.partition(":")[0]))
    tab.goto(Path("report.html").absolute().as_uri())

    def names():
        return [row.locator("td").first.inner_text() for row in tab.locator("tr.row:visible").all()]

    assert names() == ["short_lvlm", "sleb", "tail"]
    head = tab.locator("thead button", has_text="average")
    for order in (["short_lvlm", "tail", "sleb"], ["sleb", "tail", "short_lvlm"], ["short_lvlm", "sleb", "tail"]):
        head.click()
        assert names() == order
    tab.locator(".chip", has_text="tail").click()
    assert names() == ["tail"]
    assert tab.locator(".tools span").inner_text() == "1 of 3 rows"
    tab.locator(".chip", has_text="all").click()

    before = tab.screenshot(full_page=True)
    row, detail = tab.locator("tr.row").first, tab.locator("tr.detail").first
    assert not detail.is_visible()
    row.click()
    assert detail.is_visible()
    assert detail.locator(".plan li.gone").count() == 2
    images = detail.locator("img")
    assert images.count() == 6
    assert images.evaluate_all("all => all.map(image => image.naturalWidth)") == [32] * 6
    assert detail.locator(".cards li").first.bounding_box()["width"] < width
    assert detail.locator(":scope > td > div").bounding_box()["width"] <= width  # beside a table that may be wider
    assert tab.evaluate("document.documentElement.scrollWidth") <= width  # only tables scroll sideways
    after = tab.screenshot(full_page=True)
    with Image.open(io.BytesIO(before)) as short, Image.open(io.BytesIO(after)) as long:
        assert long.height > short.height + 200
    row.press("Enter")
    assert not detail.is_visible()
    assert not noise
    assert set(requests) <= {"file", "data"}


def test_intervals_of_the_page_stay_within_percentages(store, no_figures):
    scores = {
        "t": {"metric": "accuracy", "n": 9, "metrics": {"accuracy": {"value": 0.99, "stderr": 0.02, "dense": 1.0}}}
    }
    store.add(result(scores=scores))
    scores["t"]["metrics"]["accuracy"] |= {"low": 0.8, "high": 0.995}
    store.add(result("tail", scores=scores))
    assert main(["experiment=demo", "out=out"]) == 0
    text = Path("out/report.html").read_text(encoding="utf-8")
    assert "<td>95.1 to 100.0</td>" in text
    assert "<td>80.0 to 99.5</td>" in text
