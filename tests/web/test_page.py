"""Around the talk: settings, models, pictures, keys, errors, the list, files, appearance, phone."""

import json
import re
import struct
import zlib

import pytest
from playwright.sync_api import expect


def png(width=3, height=2):
    """A small red picture."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\xc0\x20\x20" * width) * height
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def picture(name="red.png", data=None, kind="image/png"):
    return {"name": name, "mimeType": kind, "buffer": png() if data is None else data}


# ---- settings and models


def test_what_is_not_set_is_not_sent(page, server, say):
    say(page, "Plain")
    body = server.requests[0]
    assert sorted(body) == ["messages", "model", "stream", "stream_options"]
    assert body["model"] == "tiny"
    assert body["stream"] is True


def test_every_setting_reaches_the_server(page, server, say):
    page.click("#open-settings")
    numbers = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.5,
        "max_tokens": 64,
        "seed": 7,
    }
    assert page.locator("#sampling input").count() == len(numbers)
    expect(page.locator("#set-temperature")).to_have_attribute("placeholder", "0.8")
    for name, value in numbers.items():
        page.fill(f"#set-{name}", str(value))
    page.fill("#system", "Be brief.")
    page.fill("#stop-strings", "END\n\\n\\n")
    page.select_option("#thinking-mode", "on")
    page.fill("#budget", "300")
    page.locator(".advanced summary").click()
    page.fill("#tools", '[{"name": "weather", "parameters": {}}]')
    page.keyboard.press("Escape")
    expect(page.locator("#thinking")).to_have_value("300")
    say(page, "Set")
    body = server.requests[0]
    assert {name: body[name] for name in numbers} == numbers
    assert body["stop"] == ["END", "\n\n"]
    assert (body["enable_thinking"], body["reasoning_max_tokens"]) == (True, 300)
    assert body["tools"] == [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    page.reload()
    say(page, "Still set")
    assert server.requests[1]["temperature"] == 0.7


def test_a_wrong_number_is_marked_and_not_sent(page, server, say):
    page.click("#open-settings")
    page.fill("#set-temperature", "9")
    expect(page.locator("#set-temperature")).to_have_attribute("aria-invalid", "true")
    page.locator(".advanced summary").click()
    page.fill("#tools", "[")
    page.locator("#tools").blur()
    expect(page.locator("#tools-problem")).to_contain_text("not JSON")
    page.fill("#tools", "")
    page.keyboard.press("Escape")
    say(page, "Hello")
    assert "temperature" not in server.requests[0]


def test_kept_settings_hold_for_new_chats_only_when_asked(page, server, say):
    page.click("#open-settings")
    page.fill("#set-top_k", "5")
    page.keyboard.press("Escape")
    page.keyboard.press("Control+k")
    say(page, "Without")
    page.click("#open-settings")
    page.fill("#set-top_k", "6")
    page.click("#keep")
    page.keyboard.press("Escape")
    page.keyboard.press("Control+k")
    say(page, "With")
    assert "top_k" not in server.requests[0]
    assert server.requests[1]["top_k"] == 6


def test_thinking_is_set_beside_the_message(page, server, say):
    for choice, expected in [("off", (False, None)), ("on", (True, None)), ("2048", (True, 2048)), ("auto", (None, None))]:
        page.select_option("#thinking", choice)
        say(page, choice)
        assert (server.requests[-1].get("enable_thinking"), server.requests[-1].get("reasoning_max_tokens")) == expected
    page.select_option("#model", "plain")
    expect(page.locator("#thinking-chip")).to_be_hidden()


def test_models_and_adapters_can_be_chosen(page, server, say):
    assert page.locator("#model optgroup").get_attribute("label") == "tiny"
    assert page.locator("#model option").all_inner_texts() == ["tiny", "tiny with poet", "eyes", "plain"]
    page.select_option("#model", "tiny:poet")
    say(page, "Rhyme")
    assert server.requests[0]["model"] == "tiny:poet"
    page.reload()
    expect(page.locator("#model")).to_have_value("tiny:poet")


# ---- pictures


def test_a_picture_is_added_removed_and_sent(page, server, say):
    expect(page.locator("#attach")).to_be_hidden()
    page.select_option("#model", "eyes")
    expect(page.locator("#attach")).to_be_visible()
    page.set_input_files("#file", [picture(), picture("two.png")])
    expect(page.locator(".thumb")).to_have_count(2)
    page.get_by_label("Remove picture 2").click()
    say(page, "What is this?")
    [image, text] = server.requests[0]["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert text == {"type": "text", "text": "What is this?"}
    expect(page.locator("article.user .picture img")).to_be_visible()
    page.reload()
    page.locator("article.user .picture").click()
    expect(page.locator("#viewer img")).to_be_visible()


PASTE = """async ([selector, kind, bytes]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([new Uint8Array(bytes)], "x.png", { type: "image/png" }));
    const init = { bubbles: true, cancelable: true };
    const paste = () => new ClipboardEvent("paste", { ...init, clipboardData: transfer });
    const drop = () => new DragEvent("drop", { ...init, dataTransfer: transfer });
    document.querySelector(selector).dispatchEvent(kind === "paste" ? paste() : drop());
}"""


def test_a_picture_is_pasted_and_dropped(page):
    page.select_option("#model", "eyes")
    page.evaluate(PASTE, ["#message", "paste", list(png())])
    expect(page.locator(".thumb")).to_have_count(1)
    page.evaluate(PASTE, ["#thread", "drop", list(png())])
    expect(page.locator(".thumb")).to_have_count(2)
    page.select_option("#model", "tiny")
    expect(page.locator(".thumb")).to_have_count(0)
    expect(page.locator("#banner")).to_contain_text("sees no pictures")


def test_a_large_picture_is_made_smaller(page, server, say):
    page.select_option("#model", "eyes")
    page.set_input_files("#file", [picture(data=png(4096, 8))])
    expect(page.locator(".thumb")).to_have_count(1)
    assert page.locator(".thumb img").evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])") == [2048, 4]


def test_what_is_no_picture_is_refused_in_words(page):
    page.select_option("#model", "eyes")
    page.set_input_files("#file", [picture("broken.png", b"not a picture")])
    expect(page.locator("#banner")).to_contain_text("broken.png cannot be read as a picture.")
    page.set_input_files("#file", [picture("x.svg", b"<svg/>", "image/svg+xml")])
    expect(page.locator("#banner")).to_contain_text("x.svg is not a PNG, JPEG, WebP or GIF picture.")
    expect(page.locator(".thumb")).to_have_count(0)


# ---- errors and keys


def test_an_error_is_said_in_words_and_can_be_tried_again(page, server, say):
    server.failure = (503, {"error": {"message": "the queue is full"}}, {"Retry-After": "3"})
    answer = say(page, "Now?")
    expect(answer.locator(".notice.error p")).to_have_text("the queue is full. Try again in 3 s.")
    server.failure = None
    answer.get_by_role("button", name="Try again").click()
    expect(page.locator("article.assistant .prose").last).to_have_text("Answer 2 to: Now?")
    expect(page.locator("article.assistant")).to_have_count(1)
    expect(page.locator(".branches")).to_have_count(0)


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("break", "The connection ended in the middle of the answer."),
        ("error", "the engine lost this request."),
        ("length", "longest allowed answer"),
    ],
)
def test_a_stream_that_ends_badly_keeps_its_text(page, server, reply, say, ending, words):
    server.replies["Half"] = reply("Half an answer", ending=ending)
    answer = say(page, "Half")
    expect(answer.locator(".notice")).to_contain_text(words)
    expect(answer.locator(".prose").last).to_have_text("Half an answer")


def test_an_answer_without_words_says_so(page, server, reply, say):
    server.failure = (500, {}, {})
    expect(say(page, "A").locator(".notice")).to_contain_text("The server answered with the status 500.")
    server.failure = None
    server.replies["A\n\nB"] = reply("")
    expect(say(page, "B").locator(".notice")).to_have_text("The model said nothing.")
    # The failed answer is no turn: both questions are sent as one.
    assert server.requests[1]["messages"] == [{"role": "user", "content": "A\n\nB"}]


def test_a_server_that_is_away_is_named_and_asked_again(visit, server):
    server.models_status = 503
    page = visit()
    expect(page.locator("#banner")).to_contain_text("The server is busy or going down.")
    server.models_status = 200
    page.locator("#banner").get_by_role("button", name="Try again").click()
    expect(page.locator("#model")).to_be_enabled()
    expect(page.locator("#banner")).to_be_hidden()


def test_a_key_is_asked_for_used_and_forgotten_with_the_tab(visit, server, say):
    server.key = "secret"
    page = visit()
    expect(page.locator("#key-dialog")).to_be_visible()
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    expect(page.locator("#key-dialog")).to_be_visible()
    page.fill("#key", "secret")
    page.press("#key", "Enter")
    expect(page.locator("#model")).to_be_enabled()
    expect(page.locator("#banner")).to_be_hidden()
    expect(say(page, "Open?").locator(".prose").last).to_have_text("Answer 1 to: Open?")
    assert page.evaluate("localStorage.getItem('ernie45.key')") is None
    server.key = "changed"
    answer = say(page, "Still?")
    answer.get_by_role("button", name="Enter API key").click()
    page.fill("#key", "changed")
    page.check("#remember")
    page.get_by_role("button", name="Use key").click()
    expect(page.locator("article.assistant .prose").last).to_have_text("Answer 2 to: Still?")
    assert page.evaluate("localStorage.getItem('ernie45.key')") == "changed"


# ---- the list and files


def test_conversations_are_listed_found_renamed_and_deleted(page, say):
    for name in ("Apples", "Pears"):
        say(page, name)
        page.keyboard.press("Control+k")
    expect(page.locator(".entry-open")).to_have_text(["Pears", "Apples"])
    page.fill("#search", "answer 1 appl")
    expect(page.locator(".entry-open")).to_have_text(["Apples"])
    page.fill("#search", "nowhere")
    expect(page.locator("#conversations")).to_contain_text("Nothing found.")
    page.fill("#search", "")
    page.get_by_label("More for Apples").click()
    page.get_by_role("button", name="Rename").locator("visible=true").click()
    page.locator(".rename").fill("Fruit")
    page.locator(".rename").press("Enter")
    expect(page.locator(".entry-open")).to_have_text(["Pears", "Fruit"])
    page.get_by_label("More for Pears").click()
    page.get_by_role("button", name="Delete").locator("visible=true").click()
    page.locator(".confirm").get_by_role("button", name="Delete").click()
    expect(page.locator(".entry-open")).to_have_text(["Fruit"])
    page.reload()
    expect(page.locator(".entry-open")).to_have_text(["Fruit"])


def exported(page, choice):
    with page.expect_download() as saved:
        page.locator(".entry .menu summary").first.click()
        page.get_by_role("button", name=choice).locator("visible=true").click()
    return saved.value.suggested_filename, saved.value.path().read_text("utf-8")


def test_what_is_exported_can_be_imported(page, server, reply, say):
    server.replies["Why so?"] = reply("**Because**", reasoning="Hm.")
    say(page, "Why so?").get_by_label("Regenerate").click()
    expect(page.locator(".branches")).to_have_text("2 / 2")
    name, text = exported(page, "Export as Markdown")
    assert name == "why-so.md"
    assert text == "# Why so?\n\n## You\n\nWhy so?\n\n## Assistant (tiny)\n\n> Hm.\n\n**Because**\n"
    name, text = exported(page, "Export as JSON")
    assert name == "why-so.json"
    assert [node["role"] for node in json.loads(text)["conversations"][0]["nodes"]] == ["user", "assistant", "assistant"]
    page.set_input_files("#import-file", [{"name": name, "mimeType": "application/json", "buffer": text.encode()}])
    expect(page.locator(".entry-open")).to_have_text(["Why so?", "Why so?"])
    expect(page.locator(".branches")).to_have_text("2 / 2")
    expect(page.locator("article.assistant strong")).to_have_text("Because")


def test_another_tab_sees_what_is_said(page, say):
    say(page, "First tab")
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.locator("article.user .bubble-text")).to_have_text("First tab")
    expect(other.locator("#model")).to_be_enabled()
    say(other, "Second tab")
    expect(page.locator("article.user .bubble-text")).to_have_text(["First tab", "Second tab"])


# ---- appearance


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_dark_follows_the_system_or_the_choice(visit):
    page = visit(color_scheme="dark")
    assert background(page) == "rgb(25, 24, 23)"
    page.select_option("#theme", "light")
    assert background(page) == "rgb(252, 251, 249)"
    page.reload()
    assert background(page) == "rgb(252, 251, 249)"
    page.goto(page.url.split("#")[0] + "status")
    assert background(page) == "rgb(252, 251, 249)"
    page.select_option("#theme", "auto")
    assert background(page) == "rgb(25, 24, 23)"


CONTRAST = """() => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
    const light = (name) => {
        canvas.fillStyle = getComputedStyle(probe).getPropertyValue("color");
        canvas.fillRect(0, 0, 1, 1);
        const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const probe = document.body.appendChild(document.createElement("span"));
    const of = (name) => { probe.style.color = `var(--${name})`; return light(name); };
    const ratio = (a, b) => { const [x, y] = [of(a), of(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
    const grounds = ["ground", "side", "raised", "sunken"];
    const code = ["comment", "string", "number", "keyword", "call", "mark"].map((kind) => [`code-${kind}`, "sunken"]);
    const text = ["text", "soft", "accent", "danger"].flatMap((text) => grounds.map((ground) => [text, ground]));
    const pairs = [...text, ...code, ["text", "bubble"], ["accent-text", "accent"], ["danger", "danger-wash"], ["accent", "accent-wash"]];
    return pairs.map(([a, b]) => [a, b, ratio(a, b)]).filter(([, , found]) => found < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(visit, scheme):
    # 4.5 to 1: WCAG 2.2, 1.4.3, for text of ordinary size.
    assert visit(color_scheme=scheme).evaluate(CONTRAST) == []


def test_the_page_fits_a_phone(visit, server, reply, say):
    page = visit(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    expect(page.locator("#model")).to_be_enabled()
    server.replies["Wide"] = reply(
        "\n\n".join([f"```\n{'x' * 400}\n```", f"$${'x + ' * 60}y$$", f"{'| column ' * 8}|\n{'|---' * 8}|", "w" * 300]), size=90
    )
    say(page, "Wide")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("document.getElementById('scroller').scrollWidth <= 360")
    expect(page.locator("#sidebar")).not_to_be_visible()
    page.click("#open-sidebar")
    expect(page.locator("#sidebar")).to_be_visible()
    page.locator(".entry-open").click()
    expect(page.locator("#sidebar")).not_to_be_visible()
    page.click("#open-settings")
    assert page.evaluate("document.getElementById('settings').getBoundingClientRect().width") == 360


def test_every_control_has_a_name(page, say):
    say(page, "Named")
    page.click("#open-settings")
    unnamed = page.evaluate(
        """() => {
        const named = (node) => node.getAttribute("aria-label") || node.textContent.trim() || node.labels?.length;
        const controls = [...document.querySelectorAll("button, input, select, textarea, summary")];
        return controls.filter((node) => !node.hidden && node.type !== "file" && !named(node)).map((node) => node.outerHTML);
    }"""
    )
    assert unnamed == []
    assert page.evaluate("[...document.images].every((image) => image.hasAttribute('alt'))")


def test_the_end_is_told_to_a_screen_reader(page, say):
    say(page, "Listen")
    expect(page.locator("#announcer")).to_have_text(re.compile("^The answer is complete"))
