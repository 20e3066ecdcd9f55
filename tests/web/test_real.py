"""The pages against a real server: `ernie serve` with a tiny random model that sees. What it says means nothing."""

import base64
import json
import re
import threading
import urllib.request

import pytest
from playwright.sync_api import expect

from tests.serving import serving
from tests.sighted import RULES, sighted_folder


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = sighted_folder(tmp_path_factory.mktemp("seeing") / "eyes")
    with serving(str(folder), "--engine.max-running", "2", "--engine.num-pages", "64", "--engine.max-length", "256") as server:
        yield server.url


@pytest.fixture(scope="module")
def cat(photo):
    return photo("chelsea.png")


@pytest.fixture(scope="module")
def tokens(cat):
    from ernie45.tokens.images import read_image

    return read_image(cat, RULES).tokens


@pytest.fixture
def chat(look_at, address):
    page = look_at(address)
    expect(page.locator("#model")).to_be_enabled()
    expect(page.locator("#attach")).to_be_visible()
    page.click("#open-settings")
    page.fill("#set-max_tokens", "12")  # random words do not end by themselves
    page.keyboard.press("Escape")
    return page


def ask(page, text):
    answers = page.locator("article.assistant")
    count = answers.count()
    page.fill("#message", text)
    page.press("#message", "Enter")
    expect(answers.nth(count)).to_have_attribute("aria-busy", "false", timeout=60_000)
    return answers.nth(count)


def test_a_picture_is_uploaded_and_seen(chat, cat, tokens):
    chat.set_input_files("#file", [{"name": "cat.png", "mimeType": "image/png", "buffer": cat}])
    expect(chat.locator(".thumb img")).to_be_visible()
    answer = ask(chat, "What is this?")
    expect(answer.locator(".prose").last).not_to_be_empty()
    expect(answer.locator(".numbers")).to_contain_text(f"{tokens} tokens seen")
    assert re.search(r"eyes\s+·\s+\d+ tokens", answer.locator(".numbers").inner_text())
    expect(chat.locator("article.user .picture img")).to_be_visible()
    again = ask(chat, "And now?")
    expect(again.locator(".numbers")).to_contain_text(f"{tokens} tokens seen")


PASTE = """([selector, text]) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], "cat.png", { type: "image/png" }));
    const pasted = new ClipboardEvent("paste", { bubbles: true, cancelable: true, clipboardData: transfer });
    document.querySelector(selector).dispatchEvent(pasted);
}"""


def test_a_picture_is_pasted_and_seen(chat, cat, tokens):
    chat.evaluate(PASTE, ["#message", base64.b64encode(cat).decode()])
    expect(chat.locator(".thumb img")).to_be_visible()
    expect(ask(chat, "What is this?").locator(".numbers")).to_contain_text(f"{tokens} tokens seen")


def test_what_is_no_picture_for_the_model_is_said_in_the_servers_words(chat, cat):
    """The page takes what the browser can draw; a picture that only the server finds too odd is its error, with the part's name."""
    chat.set_input_files("#file", [{"name": "cat.png", "mimeType": "image/png", "buffer": cat}])
    chat.route("**/v1/chat/completions", lambda route: route.continue_(post_data=spoiled(route.request.post_data)))
    expect(ask(chat, "What is this?").locator(".notice.error")).to_contain_text("no image of a known format")


def spoiled(body):
    asked = json.loads(body)
    asked["messages"][0]["content"][0]["image_url"]["url"] = "data:image/png;base64,AAAA"
    return json.dumps(asked)


def test_the_state_of_a_server_under_load(look_at, address):
    """Four clients ask at once of a server that computes two: the page shows both, the times, and the throughput."""
    stop = threading.Event()

    def load():
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40, "ignore_eos": True}
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        while not stop.is_set():
            urllib.request.urlopen(request, timeout=60).read()

    clients = [threading.Thread(target=load) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        page = look_at(address, "/status")
        expect(page.locator("#state")).to_contain_text("Running")
        tile = page.locator(".tile")
        expect(tile.nth(0).locator(".value")).to_have_text("2", timeout=20_000)
        expect(tile.nth(1).locator(".value")).to_have_text(re.compile("[12]"), timeout=20_000)
        rows = page.locator("#latency tbody tr")
        expect(rows).to_have_count(5, timeout=20_000)
        names = ["To the first token", "Each further token, by answer", "Between tokens", "Whole answer", "In the queue"]
        assert [row.locator("th").inner_text() for row in rows.all()] == names
        for row in rows.all():
            assert all(re.fullmatch(r"[\d.]+ (µs|ms|s)", cell) for cell in row.locator("td").all_inner_texts()[:4])
        expect(page.locator("#charts figure").first.locator("strong")).not_to_have_text("0.0 tokens/s", timeout=20_000)
        expect(page.locator("#experts rect").first).to_be_visible(timeout=20_000)
        expect(page.locator("#models tbody tr th")).to_have_text("eyes")
        expect(page.locator("#totals")).to_contain_text("Tokens written")
    finally:
        stop.set()
        for client in clients:
            client.join()
