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

from svl.evaluation.score_statistics import compare_answers
from svl.report import main, page, pictures, table_writers
from svl.report.experiment_report import Report
from svl.report.results import stored_scores


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
            assert (attributes.get(name) or "data:").startswith(("data:", "#")), (tag, attributes)
        assert tag not in ("link", "iframe", "object", "base")
    assert not re.search(r"https?://|@import|url\(", text)
    policy = next(a["content"] for t, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    drawn = [a["src"] for t, a in found.tags if t == "img" and "src" in a]
    assert len(drawn) == len(list(Path("out").glob("*.png"))) == 2
    for name, source in zip(("removed_layers", "accuracy_vs_ratio"), drawn, strict=True):  # the cover first
        assert base64.b64decode(source.partition(",")[2]) == Path(f"out/{name}.png").read_bytes()

    images = json.loads(next(script for script in found.scripts if script.startswith("{")))
    shown = {a["data-image"] for t, a in found.tags if t == "img" and "data-image" in a}
    assert shown == set(images)
    first_lost = {*range(4), *range(6, 14), *range(8)}  # by each of the three, 8 at most
    assert shown == {f"t@b/{i}" for i in first_lost | {16, 17}}  # the last two are gained
    cells = [float(a["data-value"]) for t, a in found.tags if t == "td" and a.get("class") == "measured"]
    values = [cell.value for line in report.tables[0].lines for cell in line.cells[3:]]
    assert cells == pytest.approx(values)
    assert "t: 4 lost, 2 gained" in text
    assert "t: 10 lost, 0 gained" in text
    assert "… and 2 more lost." in text
    assert "&lt;/script&gt;&lt;b&gt;no 0" in text  # text stays text
    assert "layer 7: removed" in text
    assert text.count('class="gone"') == 2 + 3 + 2
    check_names(found.tags)


def check_names(tags):
    """Everything that can be reached has a name of its own, and nothing has the address of another."""
    for tag, attributes in tags:
        if tag == "img":
            assert attributes.get("alt"), attributes
        if tag == "input":
            assert attributes.get("aria-label"), attributes
        if attributes.get("tabindex"):
            assert attributes.get("aria-label"), attributes
    for name in ("id", "aria-label"):
        values = [attributes[name] for _, attributes in tags if attributes.get(name)]
        assert len(values) == len(set(values)), name
    ids = {attributes["id"] for _, attributes in tags if "id" in attributes}
    assert {a[name] for _, a in tags for name in ("aria-controls", "aria-labelledby") if name in a} <= ids


def test_page_without_scores(store, no_figures):
    store.add(result(keys={"evaluate": ["gone"], "dense": ["gone"]}))
    assert main(["experiment=demo", "out=out"]) == 0
    assert "None are stored." in Path("out/report.html").read_text()


@pytest.fixture(scope="module")
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
    assert tab.locator(".count").inner_text() == "1 of 3 rows"
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
    row.locator("button.open").press("Enter")
    assert not detail.is_visible()
    assert not noise
    assert set(requests) <= {"file", "data"}


def written_page(store, live=None):
    """The page of the store's runs with a figure, as a file's address; the report."""
    report = Report.read(store, "demo")
    Image.new("RGB", (40, 30), "teal").save("figure.png")
    drawn = [[pictures.Picture(Path("figure.png"), "A figure.")]] * len(report.sections)
    text = page.render_page("demo", report.sections, report.tables, drawn, store, live)
    Path("report.html").write_text(text, encoding="utf-8")
    return Path("report.html").absolute().as_uri(), report


def open_rows(tab):
    return [row.locator("td").first.inner_text() for row in tab.locator("tr.row.opened:visible").all()]


@pytest.mark.parametrize(("width", "mobile"), [(1280, False), (390, True)], ids=["desktop", "phone"])
def test_two_rows_are_compared(store, chromium, width, mobile):
    """Layers, settings, questions with their images, and the same p-value as in `svl-report compare`."""
    scored(store)
    address, report = written_page(store)
    context = chromium.new_context(viewport={"width": width, "height": 800}, is_mobile=mobile, has_touch=mobile)
    tab, noise = context.new_page(), []
    tab.on("console", lambda message: noise.append(message.text))
    tab.on("pageerror", lambda error: noise.append(str(error)))
    tab.goto(address)
    panel = tab.locator(".compare")
    for name in ("short_lvlm", "tail"):
        assert not tab.locator(".compare h3").is_visible()
        tab.get_by_label(f"compare {name} 25 %").check()
    assert panel.locator("h3").inner_text() == "A: short_lvlm 25 %, B: tail 25 %"
    assert panel.locator(".plan").first.locator(".gone").count() == 2
    assert panel.locator(".plan").last.locator(".gone").count() == 3
    assert "by A only: none; by B only: 5; by both: 6, 7." in panel.inner_text()
    runs = {run.result["strategy"]: stored_scores(store, run)["t"] for run in report.runs}
    change = compare_answers(runs["short_lvlm"], runs["tail"])
    assert change is not None
    test = panel.locator("table", has_text="McNemar").locator("td").all_inner_texts()
    assert test == ["t", "70.0 %", "30.0 %", "12", "4", "12 / 4", f"{change['p']:.2g}"]
    assert (change["units_gained"], change["units_lost"]) == (12, 4)
    assert panel.locator(".cards").first.locator("li").count() == 8
    assert panel.locator(".cards").last.locator("li").count() == 4
    assert "The first 8 of 12." in panel.inner_text()
    first = panel.locator(".cards li").first
    assert first.inner_text().split("\n\n") == ["Is 6 < 3?", "expected yes", "A yes", "B </script><b>no 6"]
    assert panel.locator("img").evaluate_all("all => all.map(image => image.naturalWidth)") == [32] * 12
    assert tab.evaluate("document.documentElement.scrollWidth") <= width

    another = context.new_page()
    another.goto(tab.url)  # what is shown can be passed on
    assert another.locator(".compare h3").inner_text() == "A: short_lvlm 25 %, B: tail 25 %"
    tab.get_by_label("compare sleb 25 %").check()  # the oldest goes
    assert panel.locator("h3").inner_text() == "A: tail 25 %, B: sleb 25 %"
    tab.keyboard.press("Escape")
    assert not panel.is_visible()
    assert not noise


def test_the_page_is_used_by_keyboard_linked_to_filtered_and_downloaded(store, chromium):
    n = {"t": {"metric": "accuracy", "n": 20, "metrics": {"accuracy": {"value": 0.5, "stderr": 0.1, "dense": 0.8}}}}
    scored(store)
    store.add(result("tail", 0.125, scores=n, settings=result()["settings"] | {"selector": {"p": 0.75}}))
    address, report = written_page(store)
    tab = chromium.new_page()
    tab.goto(address)
    tab.locator("summary", has_text="other settings").click()
    tab.locator('select[data-setting="ratio"]').select_option("25 %")
    assert tab.locator(".count").inner_text() == "3 of 4 rows"
    tab.locator('select[data-setting="selector.p"]').select_option("0.75")
    assert tab.locator(".count").inner_text() == "0 of 4 rows"
    tab.locator('select[data-setting="ratio"]').select_option("all")
    assert tab.locator("tr.row:visible td").nth(1).inner_text() == "12.5 %"

    tab.goto(f"{address}#open={tab.locator('tr.row').nth(2).get_attribute('id')}")
    assert open_rows(tab) == [tab.locator("tr.row td:first-child").nth(2).inner_text()]
    tab.locator("tr.detail:visible .permalink").click()
    assert len(open_rows(tab)) == 1

    tab.goto("about:blank")
    tab.goto(address)
    for _ in range(40):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.className") == "open":
            break
    tab.keyboard.press("Space")
    assert len(open_rows(tab)) == 1

    files = {}
    for name in ("CSV", "LaTeX", "PNG"):
        with tab.expect_download() as waiting:
            tab.get_by_role("button", name=name).first.click()
        files[waiting.value.suggested_filename] = Path(waiting.value.path()).read_bytes()
    assert files == {
        "table-1.csv": table_writers.as_csv(report.tables[0]).encode(),
        "table-1.tex": table_writers.as_latex(report.tables).encode(),
        "figure.png": Path("figure.png").read_bytes(),
    }
    lightness = []
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        look = tab.evaluate("(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))")
        lightness.append([sum(map(int, re.findall(r"\d+", color)[:3])) for color in look])
    assert lightness[0][0] < 200 < 600 < lightness[0][1]
    assert lightness[1][1] < 200 < 600 < lightness[1][0]


def test_a_layer_without_its_attention_is_neither_kept_nor_removed(store, chromium):
    parts = result("block_pruner", n_remove=0)
    parts["plan"] = {**parts["plan"], "removed": [7], "removed_attn": [2], "removed_mlp": [3]}
    store.add(result("tail"), parts)
    address, _ = written_page(store)
    tab = chromium.new_page()
    tab.goto(address)
    assert tab.locator("tr.row td", has_text="1 / 8 + 2 sub-layers").count() == 1
    for name in ("tail", "block_pruner"):
        tab.get_by_label(f"compare {name} 25 %").check()
    strips = tab.locator(".compare .plan")
    titles = [strips.nth(i).locator(".part, .gone").evaluate_all("all => all.map(x => x.title)") for i in range(2)]
    assert sorted(titles) == [
        ["layer 2: without its attn", "layer 3: without its mlp", "layer 7: removed"],
        ["layer 6: removed", "layer 7: removed"],
    ]


def test_a_page_that_is_read_again_shows_what_was_chosen(store, chromium):
    scored(store)
    address, _ = written_page(store, page.Live(1000, "3 runs have finished."))
    tab = chromium.new_page()
    tab.clock.install()  # the page's seconds pass when the test says so, however slow the machine is
    tab.goto(address)
    assert tab.locator("[role=status]").first.inner_text() == "Live: 3 runs have finished."
    tab.locator(".chip", has_text="tail").click()
    tab.locator("tr.row:visible button.open").click()
    for _ in range(2):
        with tab.expect_event("load"):
            tab.clock.run_for(1_000_500)
        assert open_rows(tab) == ["tail"]
        assert tab.locator(".count").inner_text() == "1 of 3 rows"


def test_intervals_of_the_page_stay_within_percentages(store, no_figures):
    scores = {
        "t": {"metric": "accuracy", "n": 9, "metrics": {"accuracy": {"value": 0.99, "stderr": 0.02, "dense": 1.0}}}
    }
    store.add(result(scores=scores))
    scores["t"]["metrics"]["accuracy"] |= {"low": 0.8, "high": 0.995}
    store.add(result("tail", scores=scores))
    assert main(["experiment=demo", "out=out"]) == 0
    text = Path("out/report.html").read_text(encoding="utf-8")
    assert "<td>2.0</td><td>–</td><td>95.1 to 100.0</td>" in text
    assert "<td>80.0 to 99.5</td>" in text
