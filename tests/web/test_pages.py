"""The files as they are served: which, with which headers, and that the policy in them is a real one."""

import re
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from ernie45.server import pages

FILES = sorted(path.name for path in pages.FOLDER.iterdir())


@pytest.fixture
def get(running_server):
    """(status, headers, body) of a path; `headers` go with the request."""

    def ask(path, method="GET", **headers):
        request = Request(
            running_server[1] + path, method=method, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )
        try:
            with urlopen(request, timeout=10) as answer:
                return answer.status, answer.headers, answer.read()
        except HTTPError as error:
            with error:
                return error.code, error.headers, error.read()

    return ask


@pytest.mark.parametrize("path", ["/", "/status", *(f"/web/{name}" for name in FILES)])
def test_every_file_comes_with_its_type_and_the_policy(get, path):
    status, headers, body = get(path)
    assert status == 200
    assert body
    assert headers["content-security-policy"] == pages.POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    kind = pages.MEDIA_TYPES["." + path.rpartition(".")[2]] if "." in path else "text/html; charset=utf-8"
    assert headers["content-type"] == kind
    assert get(path, "HEAD")[::2] == (200, b"")


def test_the_policy_lets_nothing_in():
    rules = dict(rule.split(" ", 1) for rule in pages.POLICY.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert not re.search(r"unsafe|https?:|\*", pages.POLICY)


def test_an_unchanged_file_is_not_sent_again(get):
    tag = get("/web/app.js")[1]["etag"]
    for header in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        status, headers, body = get("/web/app.js", If_None_Match=header)
        assert (status, body, headers["etag"]) == (304, b"", tag)
    assert get("/web/app.js", If_None_Match='"other"')[0] == 200
    assert get("/web/style.css")[1]["etag"] != tag


@pytest.mark.parametrize(
    "path",
    [
        "/web/nothing.js",
        "/web/",
        "/web/..%2fpages.py",
        "/web/%2e%2e/pages.py",
        "/web/..%5cpages.py",
        "/web/%2fetc%2fpasswd",
        "/web/app.js%00",
        "/web/app.js/x",
    ],
)
def test_no_other_file_can_be_reached(get, path):
    status, _, body = get(path)
    assert status == 404
    assert b"import" not in body


def test_a_file_of_an_unknown_kind_is_our_mistake(tmp_path):
    (tmp_path / "page.exe").write_bytes(b"x")
    with pytest.raises(AssertionError, match=r"page\.exe has no media type"):
        pages.read_assets(tmp_path)


def test_nothing_in_the_files_turns_text_into_markup_or_asks_outside():
    sinks = re.compile(
        r"\b(?:innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|srcdoc)\b|\beval\(|\bFunction\("
    )
    elsewhere = re.compile(r"""(?:src|href|from|import|url)\W{1,3}https?://""")
    inline = re.compile(r"<script>|<style|\sstyle=|\son\w+=")
    found = []
    for name in FILES:
        text = (pages.FOLDER / name).read_text("utf-8")
        found += [(name, hit.group()) for hit in [*sinks.finditer(text), *elsewhere.finditer(text)]]
        if name.endswith(".html"):
            found += [(name, hit.group()) for hit in inline.finditer(text)]
    assert found == []


def test_no_file_is_too_long():
    assert [name for name in FILES if len((pages.FOLDER / name).read_text("utf-8").splitlines()) > 500] == []


def test_the_browser_refuses_markup_and_strangers(browser, running_server):
    context = browser.new_context()
    page = context.new_page()
    page.goto(running_server[1])
    blocked = page.evaluate(
        """async () => {
        const tries = {
            markup: () => { document.createElement("div").innerHTML = "<b>x</b>"; },
            script: () => { document.createElement("script").text = "1"; },
        };
        const found = {};
        for (const [name, act] of Object.entries(tries)) {
            try { act(); found[name] = "let through"; } catch (error) { found[name] = error.name; }
        }
        found.stranger = await fetch("https://evil.example/").then(() => "let through", (error) => error.name);
        return found;
    }"""
    )
    context.close()
    assert blocked == {"markup": "TypeError", "script": "TypeError", "stranger": "TypeError"}
