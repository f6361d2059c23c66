"""Both pages in a real browser: Chromium without a screen, driven by Playwright."""

import shutil

import pytest
from apply.conftest import AWKWARD

import abe_jax
from abe_jax import report
from abe_jax.apply import images, search

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    assert path, f"no browser: install one of {', '.join(names)}"
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(workdir, evaluation, photos):
    model = abe_jax.load(workdir)
    folder = workdir.parent / "awkward"
    folder.mkdir()
    for name, source in zip(AWKWARD, sorted(photos.rglob("*.png"))[::9], strict=False):
        shutil.copy(source, folder / name.decode("utf-8", "surrogateescape"))
    index = model.index(folder)
    results = model.search(folder, index)
    path = workdir / "search.html"
    search.write_page(
        path, "found", images.find(folder), index, results, "all learners"
    )
    return {"report": report.write(workdir, evaluation), "search": path}


@pytest.mark.parametrize("name", ["report", "search"])
def test_the_page_in_a_browser(browser, pages, name):
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    told, asked = [], []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [
        pages[name].as_uri()
    ]
    assert page.evaluate("document.images.length") > 10
    broken = "[...document.images].filter((image) => !image.naturalWidth).length"
    assert page.evaluate(broken) == 0
    assert page.evaluate("document.body.scrollWidth") <= 1000
    colours = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        style = "getComputedStyle(document.body).backgroundColor"
        colours.append(page.evaluate(style))
    assert colours[0] == "rgb(255, 255, 255)" and colours[1] != colours[0]
    assert told == []
    page.close()


@pytest.mark.parametrize("name", ["report", "search"])
def test_keys_move_through_the_gallery(browser, pages, name):
    page = browser.new_page()
    page.goto(pages[name].as_uri())

    def place() -> list[int]:
        return page.evaluate(
            """() => {
              const rows = [...document.querySelectorAll(".row")];
              const here = document.activeElement;
              const y = rows.findIndex((row) => row.contains(here));
              return [y, y < 0 ? -1 : [...rows[y].children].indexOf(here)];
            }"""
        )

    for _ in range(30):
        page.keyboard.press("Tab")
        if place() == [0, 0]:
            break
    seen = [place()]
    for key in (
        "ArrowRight",
        "ArrowRight",
        "ArrowDown",
        "Home",
        "ArrowUp",
        "ArrowLeft",
    ):
        page.keyboard.press(key)
        seen.append(place())
    assert seen == [[0, 0], [0, 1], [0, 2], [1, 2], [1, 0], [0, 0], [0, 0]]
    page.close()
