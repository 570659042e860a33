"""The page in a real browser: choose, draw, compare, save, restore, go wrong, cancel; nothing comes from elsewhere.

Without a Chromium it is skipped; with REQUIRE_BROWSER=1, as .ci/run has it, it fails.
"""

import dataclasses
import os
import re
import shutil
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

if os.environ.get("REQUIRE_BROWSER") != "1":
    pytest.importorskip("gradio", reason="make test-serve installs it")
    pytest.importorskip("playwright", reason="make test-serve installs it")

from playwright.sync_api import expect, sync_playwright
from serving.servers import make_pipeline, serving, write_adapters

from onelora_diffusion.serving.launching import PortSettings, launch
from onelora_diffusion.serving.page import Page
from onelora_diffusion.serving.picture_file import request_of
from onelora_diffusion.serving.request import Request

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHOTS = os.environ.get("SCREENSHOTS")  # a folder for pictures of the page


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    pipeline = make_pipeline()
    write_adapters(folder, pipeline.transformer)
    (folder / "broken.safetensors").write_bytes((folder / "plain.safetensors").read_bytes()[:500])
    with serving(pipeline, folder) as batcher:
        blocks, address = launch(Page(batcher, "toy", 2.0), PortSettings(port=0))
        yield address, batcher, folder
        blocks.close(verbose=False)


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
def page(server, browser):
    """The page, just opened; at the end, it has asked nobody but its server, and said nothing is wrong."""
    address, *_ = server
    context = browser.new_context(accept_downloads=True, viewport={"width": 1280, "height": 1000})
    page, asked, wrong = context.new_page(), set(), []
    page.on("request", lambda request: asked.add(urlsplit(request.url).hostname))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(address)
    expect(page.locator("#card")).to_contain_text("birds", timeout=20_000)
    yield page
    context.close()
    assert asked <= {"127.0.0.1", None, ""}
    assert wrong == []


def choose(page, elem_id: str, name: str) -> None:
    box = page.locator(f"#{elem_id} input").first
    box.click()
    page.get_by_role("option", name=name, exact=True).click()


def fill(page, elem_id: str, value) -> None:
    box = page.locator(f"#{elem_id} input[type=number]").first
    box.fill(str(value))
    box.blur()


def save(page, folder: Path) -> Path:
    """The picture as the page's download button saves it."""
    with page.expect_download() as download:
        page.locator("#picture").get_by_label("Download").click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def shot(page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS, f"{name}.png"), full_page=True)


def test_a_picture_is_drawn_as_it_is_asked_for_saved_and_restored(page, server, tmp_path):
    _, batcher, _ = server
    choose(page, "b", "food")
    expect(page.locator("#card")).to_contain_text("food")
    fill(page, "weight-a", 0.4)
    fill(page, "weight-b", 0.6)
    choose(page, "subject", "soup")  # the classes are those of B, which came last
    page.locator("#guidance").get_by_text("domain").click()
    fill(page, "scale", 3)
    choose(page, "sampler", "dpm-solver++")
    fill(page, "steps", 4)
    fill(page, "seed", 11)
    page.locator("#draw").click()
    expect(page.locator("#status")).to_contain_text("1 drawn in", timeout=20_000)
    shot(page, "one")
    saved = save(page, tmp_path)
    request, base = request_of(saved)
    expected = Request(
        subject=2,
        adapters=(("birds", 0.4), ("food", 0.6)),
        guidance="domain",
        guidance_scale=3,
        sampler="dpm-solver++",
        num_inference_steps=4,
        seed=11,
        size=16,
    )
    assert (request, base) == (expected, "toy")

    page.reload()
    expect(page.locator("#card")).to_contain_text("birds", timeout=20_000)
    page.locator("#restore input[type=file]").set_input_files(saved)
    expect(page.locator("#b input").first).to_have_value("food")
    expect(page.locator("#subject input").first).to_have_value("soup")
    page.locator("#draw").click()
    expect(page.locator("#status")).to_contain_text("1 drawn in", timeout=20_000)
    assert save(page, tmp_path / "again").read_bytes() == saved.read_bytes()


def test_pictures_stand_side_by_side_in_a_strip_and_in_a_grid(page, server):
    choose(page, "b", "plain")
    fill(page, "steps", 3)
    page.get_by_role("tab", name="Side by side").click()
    page.locator("#compare").click()
    expect(page.locator("#status")).to_contain_text("4 drawn in", timeout=20_000)
    expect(page.locator("#side-by-side img")).to_have_count(4)
    assert page.locator("#side-by-side .caption-label").all_inner_texts() == ["base: 0", "A", "B: 0", "mix"]
    shot(page, "side-by-side")
    page.get_by_role("tab", name="From A to B").click()
    page.locator("#strip").click()
    expect(page.locator("#status")).to_contain_text("5 drawn in", timeout=20_000)
    expect(page.locator("#strip-of img")).to_have_count(5)
    shot(page, "strip")
    page.get_by_role("tab", name="A grid of adapters").click()
    page.locator("#grid").click()
    expect(page.locator("#status")).to_contain_text("4 drawn in", timeout=20_000)
    assert page.locator("#grid-of .caption-label").all_inner_texts() == ["birds", "food: pizza", "lora: 0", "plain: 0"]
    shot(page, "grid")


def test_what_is_wrong_is_one_line(page, tmp_path):
    (tmp_path / "no.png").write_text("no picture")
    page.locator("#restore input[type=file]").set_input_files(tmp_path / "no.png")
    expect(page.locator(".toast-body")).to_contain_text("no.png is no PNG that can be read")
    shot(page, "error")
    page.get_by_role("tab", name="From A to B").click()
    page.locator("#strip").click()
    expect(page.locator("#status")).to_have_text("a strip leads from one adapter to another: choose two")


def test_a_new_file_appears_and_a_damaged_one_says_why(page, server):
    _, batcher, folder = server
    shutil.copy(folder / "food.safetensors", folder / "fresh.safetensors")
    try:
        page.get_by_role("button", name="Adapters").click()
        time.sleep(1)
        page.get_by_role("button", name="Look for new files").click()
        expect(page.locator("#adapters")).to_contain_text("fresh")
        expect(page.locator("#adapters")).to_contain_text("is damaged or no safetensors file")
        shot(page, "adapters")
        choose(page, "a", "fresh")
        expect(page.locator("#subject input").first).to_have_value("pizza")
    finally:
        (folder / "fresh.safetensors").unlink()


def test_the_place_in_the_queue_the_progress_and_cancel(page, server, monkeypatch):
    _, batcher, _ = server
    step, steps = batcher.drawing.step, []

    def slowly(trajectories):
        time.sleep(0.2)
        steps.append(len(trajectories))
        step(trajectories)

    monkeypatch.setattr(batcher.drawing, "step", slowly)
    monkeypatch.setattr(batcher, "settings", dataclasses.replace(batcher.settings, max_batch=1))
    before = batcher.state()
    other = batcher.submit(Request(subject=1, num_inference_steps=10, guidance_scale=1.0, sampler="ddpm"))
    fill(page, "steps", 50)
    page.locator("#draw").click()
    expect(page.locator("#status")).to_contain_text("place 1 in the queue")
    other.picture.result(30)
    expect(page.locator("#status")).to_contain_text(re.compile(r"drawing: \d+%"))
    shot(page, "progress")
    page.locator("#cancel").click()
    expect(page.locator("#status")).to_have_text("cancelled")
    after = batcher.state()
    while after["drawing"]:
        time.sleep(0.05)
        after = batcher.state()
    assert after["cancelled"] == before["cancelled"] + 1 and len(steps) < 10 + 50
