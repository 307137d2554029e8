"""The site: complete, whole, and without any request to a server."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers.paths import ROOT
from omegaconf import OmegaConf

import svl
from svl import config, config_methods
from svl.config_schema import Svl, Task

pytest.importorskip("material")


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "scripts" / "docs_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(page: str) -> dict[str, list[str]]:
    """Rows of tables by their first cell, or by the first two where a choice is followed by a setting."""
    found = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in re.findall(r"\| ((?:`[^`]*`|\\\||[^|`])*)(?= \||$)", line)]
        if line.startswith("| `"):
            found[cells[0].strip("`")] = cells[1:]
            found[" ".join(cell.strip("`") for cell in cells[:2])] = cells[2:]
    return found


def test_the_configuration_reference_has_every_setting_with_its_default(hook):
    found = rows(hook.configuration_page())
    for group in dataclasses.fields(Svl):
        schema = Svl.__dataclass_fields__[group.name].default_factory
        if not (isinstance(schema, type) and dataclasses.is_dataclass(schema)):
            assert group.name in found or group.name in config_methods.METHODS, group.name
            continue
        defaults = OmegaConf.structured(schema)
        for field in dataclasses.fields(schema):
            _, default, meaning = found[f"{group.name}.{field.name}"]
            assert meaning, field.name
            if not OmegaConf.is_missing(defaults, field.name):
                value = OmegaConf.create({"x": OmegaConf.create(f"x: {default.strip('`')}").x}).x
                assert value == defaults[field.name], field.name
    assert {field.name for field in dataclasses.fields(Task)} <= found.keys()


@pytest.mark.parametrize("group", config_methods.METHODS)
def test_the_configuration_reference_has_every_choice_and_its_settings(hook, group):
    found = rows(hook.configuration_page())
    for file in (config.CONF / group).glob("*.yaml"):
        assert file.stem in found
        module, _, name = OmegaConf.load(file)["_target_"].rpartition(".")
        for field in dataclasses.fields(getattr(importlib.import_module(module), name)):
            if field.init:
                kind, _, meaning = found[f"{file.stem} {field.name}"]
                assert kind.strip("`") == field.type
                assert meaning


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built as `make docs` does: any warning, such as a broken link, is an error."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        patch.chdir(ROOT)
        patch.setattr(sys, "path", list(sys.path))
        build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return folder


def test_pages_load_nothing_from_a_server(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]* src=\"?([^\" >]+)", text)
        loaded += re.findall(r"<link[^>]* rel=\"?(?:stylesheet|icon|preload|preconnect)[^>]* href=\"?([^\" >]+)", text)
        outside = [address for address in loaded if re.match(r"(https?:)?//", address)]
        assert outside == [], page
        for address in loaded:
            file = re.split("[?#]", address)[0].lstrip("/")
            assert address.startswith("data:") or (page.parent / file).is_file(), address
    assert not re.search(r"url\(['\"]?https?:", "".join(file.read_text() for file in site.rglob("*.css")))


def test_every_page_of_the_folder_can_be_reached(site):
    start = (site / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f'href="{page.stem}.html"' in start or f"href={page.stem}.html" in start or page.stem == "index", page


def test_the_python_api_is_whole(site):
    text = (site / "api.html").read_text(encoding="utf-8")
    assert all(f"svl.{name}" in text for name in svl.__all__)


def test_links_into_the_repository_are_text_and_the_rest_stays(hook):
    from types import SimpleNamespace

    files = SimpleNamespace(get_file_from_path={"methods.md", "experiments/demo/README.md"}.__contains__)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="calibration.md"))

    def shown(text: str) -> str:
        return hook.on_page_markdown(text, page, None, files)

    assert shown("[a](methods.md#which)") == "[a](methods.md#which)"
    assert shown("[demo](../experiments/demo/README.md)") == "[demo](experiments/demo/README.md)"
    assert shown("[the code](../svl/cli.py)") == "the code (`svl/cli.py`)"
    assert shown("a block [s, e) of it, [see](methods.md)") == "a block [s, e) of it, [see](methods.md)"
    assert shown("[paper](https://arxiv.org) ![p](p.png)") == "[paper](https://arxiv.org) ![p](p.png)"
    assert shown("[gone](nowhere.md)") == "[gone](nowhere.md)"  # MkDocs warns, which ends a strict build
