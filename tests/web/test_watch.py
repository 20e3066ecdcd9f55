"""`ernie watch` in a browser: runs laid over one another, live, with everything, with nothing, and with hostile text."""

import asyncio
import json
import math
import threading

import pytest
from playwright.sync_api import expect

from ernie45.recipes.watch import WatchConfig, watch


def row(step, rate):
    load = [[1 + 0.5 * math.sin(expert + step / 9), 1.0, 0.5] for expert in range(2)]
    return {"step": step, "loss": 8 * math.exp(-step * rate) + 1, "rate": rate, "norm": 1.0, "tokens": 64, "seconds": 0.1, "load": load}


@pytest.fixture
def runs(tmp_path):
    for name, rate, steps in (("slow", 0.01, 60), ("fast", 0.05, 40)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "settings.json").write_text(json.dumps({"model": "tiny", "seed": 0, "schedule": {"peak": rate}}))
        (folder / "plan.json").write_text('{"steps": 100}')
        (folder / "log.jsonl").write_text("".join(json.dumps(row(step, rate)) + "\n" for step in range(steps)))
    (tmp_path / "fast" / "samples.jsonl").write_text(
        json.dumps({"step": 40, "prompt": "Say", "text": "<img src=x onerror=alert(1)>"}) + "\n"
    )
    return tmp_path


@pytest.fixture
def watching(runs):
    """The address of a page that watches `runs`."""
    told, ready = [], threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    def started(address):
        told.append(address)
        ready.set()

    def live():
        loop.run_until_complete(watch(WatchConfig(runs=(runs,), port=0), started, stop))
        loop.close()

    thread = threading.Thread(target=live)
    thread.start()
    assert ready.wait(20)
    yield told[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture
def page(watching, look_at):
    return look_at(watching)


def test_runs_are_laid_over_one_another_and_grow(page, runs):
    expect(page.locator("#state")).to_have_text("2 runs, 2 learning now")
    assert page.locator("#runs tbody th").all_inner_texts() == ["fast", "slow"]
    loss = page.locator("#plots figure").first
    expect(loss.locator("path.path")).to_have_count(2)
    expect(loss.locator(".readout b")).to_have_text(["2.138", "5.435"])
    with (runs / "fast" / "log.jsonl").open("a") as file:
        file.write(json.dumps({**row(40, 0.05), "loss": 0.5, "vision_loss": 2.5}) + "\n")
    expect(loss.locator(".readout b").first).to_have_text("0.5", timeout=6000)
    expect(page.locator("#plots figcaption > span:first-child", has_text="Loss beside images")).to_have_count(1)


def test_the_pointer_reads_the_curves(page):
    picture = page.locator("#plots svg").first
    expect(picture.locator("path.path")).to_have_count(2)
    box = picture.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 52 / 1180 + 1, box["y"] + 40)
    expect(page.locator("#plots figure").first.locator(".readout")).to_have_text("099")
    page.mouse.move(5, 5)
    expect(page.locator("#plots figure").first.locator(".readout b")).to_have_text(["2.138", "5.435"])


def test_a_run_can_be_hidden_and_the_scale_changed(page):
    page.locator("#runs input").first.uncheck()
    expect(page.locator("#plots figure").first.locator("path.path")).to_have_count(1)
    page.check("#log")
    expect(page.locator("#plots figure").first.locator("text").first).to_have_text("6")
    page.select_option("#axis", "seconds")
    expect(page.locator("#plots figure").first.locator("text").last).to_have_text("6 s")
    page.evaluate("(s => { s.value = 0.9; s.dispatchEvent(new Event('input')); })(document.getElementById('smooth'))")
    expect(page.locator("#plots figure").first.locator("path.raw")).to_have_count(1)


def test_experts_samples_and_settings_are_shown_as_text(page):
    expect(page.locator("#load rect")).to_have_count(6)
    expect(page.locator("#heat-words")).to_contain_text("3 experts, steps 0 to 39")
    assert page.evaluate("document.getElementById('heat').width") == 40
    expect(page.locator(".sample p").last).to_have_text("<img src=x onerror=alert(1)>")
    assert page.locator("#settings tbody th").all_inner_texts() == ["schedule.peak"]
    page.uncheck("#only-different")
    expect(page.locator("#settings tbody th")).to_have_count(3)


def test_the_end_of_the_watch_is_said(look_at, watching, runs):
    page = look_at(watching)
    expect(page.locator("#state")).to_contain_text("2 runs")
    page.route("**/runs.json", lambda route: route.abort())
    expect(page.locator("#problem")).to_have_text("ernie watch has ended; what is shown is its last report.", timeout=6000)


def test_the_page_fits_a_phone(look_at, watching):
    page = look_at(watching, viewport={"width": 360, "height": 640})
    expect(page.locator("#load rect")).to_have_count(6)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
