"""The page in a real browser: choose, draw, compare, save, restore, go wrong, cancel; nothing comes from elsewhere.

Without a Chromium it is skipped; with REQUIRE_BROWSER=1, as .ci/run has it, it fails.
"""

import json
import os
import re
import shutil
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

if os.environ.get("REQUIRE_BROWSER") != "1":
    pytest.importorskip("fastapi", reason="make test-serve installs it")
    pytest.importorskip("playwright", reason="make test-serve installs it")

import tiny_models
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from serving.servers import CONFIGS, Held, answering, make_pipeline, serving, write_adapter, write_adapters

from onelora_diffusion.serving import library as library_module
from onelora_diffusion.serving.drawing import Drawing

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHOTS = os.environ.get("SCREENSHOTS")  # a folder for pictures of the page
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(pipeline, folder) of some adapters, one of which is damaged."""
    pipeline = make_pipeline()
    return pipeline, write_adapters(tmp_path_factory.mktemp("adapters"), pipeline.transformer, broken=True)


@pytest.fixture(scope="module")
def address(served):
    with serving(*served) as batcher, answering(batcher, served[1]) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        end = pytest.fail if os.environ.get("REQUIRE_BROWSER") == "1" else pytest.skip
        end("no Chromium on this machine: make browser installs one")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Opens a page; at the end, it has asked nobody but its server, and said nothing is wrong."""
    context, asked, wrong = browser.new_context(accept_downloads=True), set(), []
    context.set_default_timeout(10_000)

    def open_at(address: str, size: dict = WIDE):
        page = context.new_page()
        page.set_viewport_size(size)
        page.on("request", lambda request: asked.add(urlsplit(request.url).hostname))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        expect(page.locator("#base")).not_to_have_text("…", timeout=20_000)
        return page

    yield open_at
    context.close()
    assert asked <= {"127.0.0.1", None, ""}
    assert wrong == []


def choose(page, names: dict[str, float]) -> None:
    """Choose these adapters and their weights, and no others."""
    for _ in range(page.locator("#adapters li").count()):
        page.get_by_role("button", name="Remove this adapter").first.click()
    for number, (name, weight) in enumerate(names.items()):
        page.get_by_role("button", name="Add an adapter").click()
        item = page.locator("#adapters li").nth(number)
        item.locator("select").select_option(name)
        item.locator("input[type=number]").fill(str(weight))


def draw(page, number: int = 1) -> None:
    page.locator("#draw").click()
    expect(page.locator("#status")).to_contain_text(f"{number} drawn in", timeout=30_000)
    expect(page.locator("#results img")).to_have_count(number)


def save(page, folder: Path) -> Path:
    """The first picture as its link saves it."""
    with page.expect_download() as download:
        page.locator("#results").get_by_text("Save").first.click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def captions(page) -> list[str]:
    return page.locator("#results figcaption > div").all_inner_texts()


def shot(page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS, f"{name}.png"), full_page=True)


def test_a_picture_is_drawn_as_it_is_asked_for_saved_and_restored(opened, address, tmp_path):
    page = opened(address)
    choose(page, {"plain": -0.5, "birds": 0.4, "food": 0.6})
    page.locator("#class").select_option("soup")  # the classes are those of the last one that brought some
    page.locator("#guidance").select_option("domain")
    page.locator("#scale").fill("3")
    page.locator("#sampler").select_option("dpm-solver++")
    page.locator("#steps").fill("4")
    page.locator("#seed").fill(str(2**60 + 1))  # more than a number of JavaScript holds
    page.locator("#lock").check()
    draw(page)
    shot(page, "one")
    saved = save(page, tmp_path)
    assert saved.name == f"soup_plain--0.5-+-birds-0.4-+-food-0.6_{2**60 + 1}.png"
    assert page.locator("#results img").get_attribute("alt").startswith("soup, drawn by plain -0.5 + birds 0.4 + food")
    settings = json.loads(Image.open(saved).info["onelora"])
    assert settings["base"] == "toy" and settings["request"] == {
        "subject": 2, "negative_prompt": None, "adapters": {"plain": -0.5, "birds": 0.4, "food": 0.6},
        "guidance": "domain", "guidance_scale": 3, "sampler": "dpm-solver++", "num_inference_steps": 4,
        "seed": 2**60 + 1, "size": 16,
    }  # fmt: skip
    where = page.url
    draw(page)
    assert save(page, tmp_path / "again").read_bytes() == saved.read_bytes()  # its seed is kept

    other = opened(where)  # the settings are in the address, the pictures in the browser
    expect(other.locator("#history img")).to_have_count(2)
    draw(other)
    assert save(other, tmp_path / "other").read_bytes() == saved.read_bytes()

    fresh = opened(address)
    fresh.locator("#restore").set_input_files(saved)
    expect(fresh.locator("#status")).to_have_text("the settings are those of the picture")
    expect(fresh.locator("#class option:checked")).to_have_text("soup")
    draw(fresh)
    assert save(fresh, tmp_path / "fresh").read_bytes() == saved.read_bytes()
    fresh.get_by_role("button", name="Delete them").click()
    expect(fresh.locator("#history img")).to_have_count(0)


def test_pictures_stand_side_by_side_in_a_strip_in_a_grid_and_by_seeds(opened, address):
    page = opened(address)
    page.locator("#steps").fill("3")
    choose(page, {"birds": 1, "plain": 1})
    page.locator("#class").select_option("wren")
    page.locator("#layout").select_option("beside")
    draw(page, 4)
    assert captions(page) == ["base: 1", "birds", "plain: 1", "all"]
    shot(page, "side-by-side")
    page.locator("#layout").select_option("strip")
    draw(page, 5)
    assert captions(page) == ["plain 0.00", "plain 0.25", "plain 0.50", "plain 0.75", "plain 1.00: 1"]
    page.locator("#layout").select_option("grid")
    draw(page, 4)
    assert captions(page) == ["birds", "food: sushi", "lora: 1", "plain: 1"]
    shot(page, "grid")
    page.locator("#layout").select_option("one")
    page.locator("#seed").fill("7")
    page.locator("#lock").check()
    page.locator("#count").fill("3")
    draw(page, 3)
    assert captions(page) == ["seed 7", "seed 8", "seed 9"]
    page.locator("#lock").uncheck()
    page.keyboard.press("Enter")
    expect(page.locator("#seed")).not_to_have_value("7")


def test_on_a_phone_the_button_and_the_picture_come_first(opened, address):
    page = opened(address, NARROW)
    page.locator("#steps").fill("2")
    draw(page)
    page.evaluate("window.scrollTo(0, 0)")
    bottom = {name: page.locator(name).bounding_box() for name in ("#draw", "#results img")}
    assert bottom["#draw"]["y"] + bottom["#draw"]["height"] < 300
    assert bottom["#results img"]["y"] + bottom["#results img"]["height"] < NARROW["height"]
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
    shot(page, "phone")
    unnamed = page.locator("input, select, textarea, button, img").evaluate_all(
        "all => all.filter((e) => !(e.labels?.length || e.ariaLabel || e.alt || e.textContent.trim())).length"
    )
    assert unnamed == 0


def test_what_is_wrong_is_one_line_that_is_read_aloud(opened, address, served, tmp_path, monkeypatch):
    monkeypatch.setattr(library_module, "RESCAN_S", 0.0)
    pipeline, folder = served
    page = opened(address)
    status = page.locator("#status[aria-live=polite]")
    (tmp_path / "no.png").write_text("no picture")
    page.locator("#restore").set_input_files(tmp_path / "no.png")
    expect(status).to_contain_text("no.png has no settings of a picture in it")
    page.locator("#layout").select_option("strip")
    page.locator("#draw").click()
    expect(status).to_have_text("a strip leads from one adapter to another: choose two")
    write_adapter(pipeline.transformer, folder / "fresh.safetensors", CONFIGS["plain"], 0)
    try:
        page.get_by_text("Adapters of this server").click()
        page.get_by_role("button", name="Look for new files").click()
        expect(page.locator("#listing")).to_contain_text("fresh")
        expect(page.locator("#listing")).to_contain_text("is damaged or no safetensors file")
        shot(page, "adapters")
        page.locator("#layout").select_option("one")
        page.locator("#steps").fill("1")
        choose(page, {"fresh": 1})
        draw(page)
        write_adapter(pipeline.transformer, folder / "fresh.safetensors", CONFIGS["plain"], 1)
        page.locator("#results").get_by_role("button", name="Use its settings").click()
        draw(page)
        expect(status).to_contain_text("adapter 'fresh' is another than the one that drew the picture before")
    finally:
        (folder / "fresh.safetensors").unlink()
    page.locator("#draw").click()
    expect(status).to_contain_text("no adapter 'fresh'")


def test_the_place_in_the_queue_the_progress_and_cancel(opened, served):
    pipeline, folder = make_pipeline(), served[1]
    drawing = Held(pipeline)
    with serving(pipeline, folder, drawing=drawing, max_batch=1) as batcher:
        with answering(batcher, folder) as (address, _):
            page = opened(address)
            page.locator("#count").fill("2")
            page.locator("#draw").click()
            expect(page.locator("#status")).to_contain_text("drawing: 0%")
            other = opened(address)
            other.locator("#draw").click()
            expect(other.locator("#status")).to_contain_text(re.compile(r"place [12] in the queue"))
            other.keyboard.press("Escape")
            expect(other.locator("#status")).to_have_text("cancelled")
            shot(page, "progress")
            page.locator("#cancel").click()
            expect(page.locator("#status")).to_have_text("cancelled")
            while batcher.state()["cancelled"] < 3:
                time.sleep(0.05)
            drawing.go.set()
        assert batcher.state()["images"] == 0


def test_a_token_is_asked_for_and_kept_and_prompts_have_negative_ones(browser, tmp_path, monkeypatch):
    monkeypatch.setenv("ONELORA_SERVE_TOKENS", "a-token-of-some-length")
    pipeline = tiny_models.make_pipeline("pixart")
    with serving(pipeline, tmp_path, drawing=Drawing(pipeline, 50)) as batcher:
        with answering(batcher, tmp_path) as (address, _):
            page = browser.new_page()
            page.goto(address)
            page.locator("#token").fill("a-token-of-some-length")
            page.get_by_role("button", name="Go on").click()
            page.reload()
            expect(page.locator("#base")).to_have_text("toy")
            page.locator("#prompt").fill("a red cube")
            page.locator("#negative").fill("blue")
            page.locator("#steps").fill("2")
            draw(page)
            request = json.loads(Image.open(save(page, tmp_path)).info["onelora"])["request"]
            assert (request["subject"], request["negative_prompt"]) == ("a red cube", "blue")
            page.close()
