"""
The report's page in headless Chromium: the one that `CHROMIUM` names, or that is found by its name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sample_reports

from autoround_modifier.report.page import render_page

pytestmark = pytest.mark.browser

WIDTHS = (1280, 360)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

FIGURES = """() => [...document.querySelectorAll("svg")].map(svg => {
    const box = svg.getBoundingClientRect();
    const drawn = [...svg.querySelectorAll("path, use")]
        .filter(x => !x.closest("defs"))
        .map(x => x.getBoundingClientRect());
    const scale = box.width / svg.viewBox.baseVal.width;
    const texts = [...svg.querySelectorAll("text")];
    return {
        width: box.width,
        height: box.height,
        drawn: drawn.filter(x => x.width * x.height > 0).length,
        text: Math.min(...texts.map(x => parseFloat(getComputedStyle(x).fontSize) * scale)),
        beyond: Math.max(...texts.map(x => x.getBoundingClientRect().right - box.right)),
        before: Math.max(...texts.map(x => box.left - x.getBoundingClientRect().left)),
    };
})"""


def chromium() -> str:
    named = os.environ.get("CHROMIUM")
    found = named or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise RuntimeError("no Chromium: `apt-get install chromium`, or set CHROMIUM to its path")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    # Chromium refuses to run as root in its sandbox.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=chromium(), args=arguments)
        yield one
        one.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    evaluation = sample_reports.evaluation()
    texts = {
        "dense": render_page(sample_reports.report(), evaluation),
        "auto_scheme": render_page(sample_reports.auto_scheme_report(), evaluation),
        "mixture": render_page(sample_reports.mixture_report(), None),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text)
    return {name: folder / f"{name}.html" for name in texts}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["dense", "auto_scheme", "mixture"])
def test_the_page_is_drawn(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    errors: list[str] = []
    requests: list[str] = []
    page.on("console", lambda x: errors.append(x.text) if x.type == "error" else None)
    page.on("pageerror", lambda x: errors.append(str(x)))
    page.on("request", lambda x: requests.append(x.url))
    page.goto(pages[name].as_uri())
    figures = page.evaluate(FIGURES)
    assert len(figures) >= 6
    for figure in figures:
        assert figure["width"] > 250
        assert figure["height"] > 50
        assert figure["drawn"] >= 4
        assert figure["text"] >= 10
        assert max(figure["beyond"], figure["before"]) <= 2
    assert page.evaluate("document.documentElement.scrollWidth") == width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 29)")
    assert page.evaluate("document.scripts.length") == 0
    assert not errors
    assert [x for x in requests if not x.startswith("data:")] == [pages[name].as_uri()]
    context.close()


def test_the_page_prints_light(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto(pages["dense"].as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(colour) == "rgb(255, 255, 255)"
    assert page.pdf(format="A4").startswith(b"%PDF-")
    context.close()


def test_the_page_needs_no_script(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["dense"].as_uri())
    table = page.get_by_role("region", name="Loss of each block")
    assert not table.is_visible()
    page.get_by_text("Loss of each block in figures").click()
    assert table.is_visible()
    assert page.get_by_role("img", name="Loss by block before and after tuning").count() == 1
    context.close()
