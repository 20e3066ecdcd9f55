"""The page in a real browser: chromium, headless, against a fake server. Whatever the page's policy has to refuse is a failure.

A machine without a browser fails with a word; nothing is skipped.
"""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # whatever a page might ask for outside, nothing is sent
]

# Asks the page to remember what its policy refused, and every dialog that a script opened.
WATCH = """
window.refusals = [];
const refused = ({ violatedDirective, blockedURI, sample }) => window.refusals.push(`${violatedDirective} ${blockedURI} ${sample}`);
document.addEventListener("securitypolicyviolation", refused);
window.alert = window.confirm = window.prompt = (text) => { window.refusals.push(`dialog ${text}`); };
"""


def load_fake():
    """The module beside this file; under pytest's importlib mode a folder of tests is no package."""
    spec = importlib.util.spec_from_file_location("web_fake_server", Path(__file__).parent / "fake.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake = load_fake()


@pytest.fixture(scope="session")
def reply():
    """The kind of answer that the fake server can be told to give."""
    return fake.Reply


# The package's end, not the session's: Playwright holds an event loop in this thread, which other tests could not bear.
@pytest.fixture(scope="package")
def browser():
    """One browser for all tests of this folder."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.fail("the tests of the web page need chromium, as a package of your system: apt-get install chromium", pytrace=False)
    with sync_playwright() as playwright:
        # Chromium refuses its sandbox to root; the pages come from this test alone.
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        running = playwright.chromium.launch(executable_path=path, args=FLAGS + sandbox)
        yield running
        running.close()


@pytest.fixture(scope="package")
def running_server():
    """(the fake server, its address)."""
    server = fake.FakeServer()
    address = server.start()
    yield server, address
    server.stop()


@pytest.fixture
def server(running_server):
    """The fake server, without what the last test told it."""
    running_server[0].reset()
    return running_server[0]


class Visit:
    """A browser of its own, as a first visitor has it, and a record of everything that went wrong in it."""

    def __init__(self, browser, address, **options):
        self.address = address
        self.context = browser.new_context(**{"viewport": {"width": 1180, "height": 820}, **options})
        self.context.set_default_timeout(30_000)  # patience with a machine that does other work, not a claim about speed
        self.context.add_init_script(WATCH)
        self.problems = []
        self.outside = []
        self.context.on("request", self.asked)

    def asked(self, request):
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.outside.append(request.url)

    def open(self, path="/"):
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("console", self.heard)
        page.on("dialog", lambda dialog: (self.problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(self.address + path)
        return page

    def heard(self, message):
        # The browser itself reports an HTTP status it does not like; a test that provokes one looks at the page instead.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.problems.append(f"console: {message.text}")

    def finish(self):
        for page in self.context.pages:
            self.problems += page.evaluate("window.refusals") or []
        self.context.close()
        assert not self.outside, f"the page asked outside: {self.outside}"
        assert not self.problems, self.problems


@pytest.fixture
def visit(browser, running_server, server):
    """Opens a page as a new visitor: `visit(path="/", **context options)`. At the end nothing may have gone wrong in it."""
    visits = []

    def start(path="/", **options):
        visits.append(Visit(browser, running_server[1], **options))
        return visits[-1].open(path)

    yield start
    for one in visits:
        one.finish()


@pytest.fixture
def look_at(browser):
    """As `visit`, for a page that has a server of its own: `look_at(address, path="/", **context options)`."""
    visits = []

    def start(address, path="/", **options):
        visits.append(Visit(browser, address, **options))
        return visits[-1].open(path)

    yield start
    for one in visits:
        one.finish()


@pytest.fixture
def page(visit):
    """The chat, with the models already known."""
    opened = visit()
    expect(opened.locator("#model")).to_be_enabled()
    return opened


@pytest.fixture(scope="module")
def shared_page(browser, running_server):
    """One page for the tests of a module that only call functions of the page's own files."""
    one = Visit(browser, running_server[1])
    yield one.open()
    one.finish()


@pytest.fixture
def say():
    """Sends a message and, unless told not to, waits for the end of the answer; returns that answer."""

    def send(page, text, wait=True):
        count = page.locator("article.assistant").count()
        page.fill("#message", text)
        page.press("#message", "Enter")
        answer = page.locator("article.assistant").nth(count)
        if wait:
            expect(answer).to_have_attribute("aria-busy", "false", timeout=30_000)
        return answer

    return send
