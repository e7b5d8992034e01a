"""The page in a real browser: offline, silent, deaf to hostile names, no wider than a phone, dark where asked."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuplan.record.run import Run
from gpuplan.record.summary import summarize
from gpuplan.report import page

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync",
                 f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def opened(browser: Any, text: str, folder: Path, *, width: int = 1100, dark: bool = False) -> Any:
    import json

    (folder / "report.html").write_text(text, encoding="utf-8")
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get((folder / "report.html").as_uri())
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert all(url.startswith(("file:", "data:")) for url in asked), asked
    return browser


@pytest.mark.parametrize("width", [360, 1100])
@pytest.mark.parametrize("case", ["quickstart", "50 classes", "zero requests", "all errors", "interrupted"])
def test_no_page_is_wider_than_its_window(
    browser: Any,
    case: str,
    width: int,
    tmp_path: Path,
    make_run: Callable[[str], Run],
    make_plan: Callable[..., dict[str, Any]],
) -> None:
    run = make_run(case)
    tab = opened(browser, page.render(run, summarize(run), make_plan(run)), tmp_path, width=width)
    assert tab.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert tab.execute_script("return window.innerWidth") == width


@pytest.mark.parametrize("width", [360, 1100])
def test_hostile_names_stay_text(
    browser: Any,
    width: int,
    tmp_path: Path,
    hostile_run: tuple[Run, dict[str, Any], dict[str, Any]],
    hostile_names: dict[str, str],
) -> None:
    tab = opened(browser, page.render(*hostile_run), tmp_path, width=width)  # an alert would make the next call fail
    assert tab.execute_script("return document.querySelectorAll('script, img, iframe, b').length") == 0
    text = tab.execute_script("return document.body.textContent")
    assert hostile_names["assistant"] in text and "$x$" in text
    assert tab.title.startswith(hostile_names["quickstart"])
    assert tab.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_dark_mode_recolours_page_and_drawings(
    browser: Any, tmp_path: Path, quickstart: Run, make_plan: Callable[..., dict[str, Any]]
) -> None:
    text = page.render(quickstart, summarize(quickstart), make_plan(quickstart))
    seen = []
    for dark in (False, True):
        tab = opened(browser, text, tmp_path, dark=dark)
        seen.append(
            tab.execute_script("""
                const style = (selector) => getComputedStyle(document.querySelector(selector));
                return [style('body').backgroundColor, style('.chart svg text').fill,
                        style('.chart svg path[style*="--series-1"]').stroke];""")
        )
    (light_ground, light_ink, light_line), (dark_ground, dark_ink, dark_line) = seen
    assert light_ground == "rgb(255, 255, 255)"
    assert len({light_ground, dark_ground}) == len({light_ink, dark_ink}) == len({light_line, dark_line}) == 2


def test_the_layout_is_drawn_to_scale(
    browser: Any, tmp_path: Path, quickstart: Run, make_plan: Callable[..., dict[str, Any]]
) -> None:
    tab = opened(browser, page.render(quickstart, summarize(quickstart), make_plan(quickstart)), tmp_path)
    heights = tab.execute_script("return [...document.querySelectorAll('.card li')].map(e => e.offsetHeight)")
    assert len(heights) == 3  # a slice of 2 cells, 2 cells without a slice, a slice of 4
    assert heights[2] / heights[0] == pytest.approx(2, rel=0.02)
    assert heights[1] == pytest.approx(heights[0], abs=2)
