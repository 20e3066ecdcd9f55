"""What Markdown, formulas and code become. Expected: the tree of elements, written as they would be in HTML."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Elements as short text: attributes left out but for those that carry meaning; copy buttons and drawings left out.
DRAW = """async (text) => {
    const { renderMarkdown } = await import("/web/markdown.js");
    const root = document.createElement("div");
    renderMarkdown(root, text);
    const show = (node) => {
        if (node.nodeType === 3) return node.data;
        if (node.localName === "button") return "";
        const name = node.localName;
        const kept = ["href", "start", "checked", "alt"].filter((key) => node.hasAttribute(key));
        const head = `<${name}${kept.map((key) => ` ${key}=${node.getAttribute(key)}`).join("")}>`;
        return ["br", "hr", "input", "img"].includes(name) ? head : `${head}${[...node.childNodes].map(show).join("")}</${name}>`;
    };
    return [...root.childNodes].map(show).join("");
}"""

CASES = {
    "paragraphs": ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
    "emphasis": (
        "*a* **b** ***c*** _d_ __e__ ~~f~~",
        "<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em> <em>d</em> <strong>e</strong> <del>f</del></p>",
    ),
    "not emphasis": ("2 * 3 * 4, snake_case_name, a ~ b, **", "<p>2 * 3 * 4, snake_case_name, a ~ b, **</p>"),
    "inside a word": ("un*frigging*believable", "<p>un<em>frigging</em>believable</p>"),
    "nested emphasis": ("**bold with *italic* inside**", "<p><strong>bold with <em>italic</em> inside</strong></p>"),
    "open emphasis": ("**not yet", "<p>**not yet</p>"),
    "Chinese": ("这是**重点**。", "<p>这是<strong>重点</strong>。</p>"),
    "code": ("`a*b*` and `` x`y ``", "<p><code>a*b*</code> and <code>x`y</code></p>"),
    "escapes": (r"\*a\* \# \$5", "<p>*a* # $5</p>"),
    "headings": ("# A #\n## B\n#no\n####### no", "<h3>A</h3><h4>B</h4><p>#no<br>####### no</p>"),
    "rule": ("a\n\n---\n\n* * *", "<p>a</p><hr><hr>"),
    "quote": ("> a\n> **b**\n\nc", "<blockquote><p>a<br><strong>b</strong></p></blockquote><p>c</p>"),
    "bullets": ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
    "numbers": ("3. a\n4. b", "<ol start=3><li>a</li><li>b</li></ol>"),
    "loose list": ("- a\n\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
    "numbers over code": (
        "1. a\n\n   ```sh\n   ls\n   ```\n\n2. b",
        "<ol><li><p>a</p><div><div><span>shell</span></div><pre><code>ls</code></pre></div></li><li><p>b</p></li></ol>",
    ),
    "a list ends": ("- a\n- b\n\nc", "<ul><li>a</li><li>b</li></ul><p>c</p>"),
    "a list after a line": ("Such as:\n- a\n- b", "<p>Such as:</p><ul><li>a</li><li>b</li></ul>"),
    "a year is no list": ("It was\n1987. Then", "<p>It was<br>1987. Then</p>"),
    "tasks": ("- [ ] a\n- [x] b", "<ul><li><input>a</li><li><input checked=>b</li></ul>"),
    "table": (
        "| a | b |\n|---|--:|\n| 1 | `x\\|y` |\n| 2 |",
        "<div><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td><code>x|y</code></td></tr><tr><td>2</td><td></td></tr></tbody></table></div>",
    ),
    "no table": ("a | b\nc | d", "<p>a | b<br>c | d</p>"),
    "fence": ("```text\na\n\n  b\n```\nc", "<div><div><span>text</span></div><pre><code>a\n\n  b</code></pre></div><p>c</p>"),
    "open fence": ("~~~\n# a", "<div><div><span></span></div><pre><code># a</code></pre></div>"),
    "long fence": ("````\n```\n````", "<div><div><span></span></div><pre><code>```</code></pre></div>"),
    "link": ("[a *b*](https://x.org/c_(d) 'title')", "<p><a href=https://x.org/c_(d)>a <em>b</em></a></p>"),
    "bare link": (
        "See https://x.org/a_b?c=1, or (https://y.org/).",
        "<p>See <a href=https://x.org/a_b?c=1>https://x.org/a_b?c=1</a>, or (<a href=https://y.org/>https://y.org/</a>).</p>",
    ),
    "angle link": ("<mailto:a@b.org>", "<p><a href=mailto:a@b.org>a@b.org</a></p>"),
    "another host": ("[a.org](https://b.org/)", "<p><a href=https://b.org/>a.org<span> (b.org)</span></a></p>"),
    "picture elsewhere": ("![a cat](https://x.org/cat.png)", "<p><a href=https://x.org/cat.png>a cat</a></p>"),
    "picture inside": ("![dot](data:image/png;base64,AAAA)", "<p><img alt=dot></p>"),
    "money": ("from $5 to $10, or US$7-$9", "<p>from $5 to $10, or US$7-$9</p>"),
    "markup": ("<b>x</b> & &amp;", "<p><b>x</b> & &amp;</p>"),
    "windows lines": ("a\r\n\r\nb", "<p>a</p><p>b</p>"),
}

MATHS = {
    "letters": ("$x$", "<math><mi>x</mi></math>"),
    "sum": (r"\(a+10\)", "<math><mrow><mi>a</mi><mo>+</mo><mn>10</mn></mrow></math>"),
    "scripts": ("$x_i^2$", "<math><msubsup><mi>x</mi><mi>i</mi><mn>2</mn></msubsup></math>"),
    "one digit": (r"$x^10$", "<math><mrow><msup><mi>x</mi><mn>1</mn></msup><mn>0</mn></mrow></math>"),
    "prime": ("$f'$", "<math><msup><mi>f</mi><mo>′</mo></msup></math>"),
    "fraction": (r"$\frac12$", "<math><mfrac><mn>1</mn><mn>2</mn></mfrac></math>"),
    "root": (r"$\sqrt[3]{x}$", "<math><mroot><mi>x</mi><mn>3</mn></mroot></math>"),
    "greek": (r"$\alpha\le\Omega$", "<math><mrow><mi>α</mi><mo>≤</mo><mi>Ω</mi></mrow></math>"),
    "alphabet": (r"$\mathbb{R}\mathcal{F}\mathbf{x}$", "<math><mrow><mi>ℝ</mi><mi>ℱ</mi><mi>𝐱</mi></mrow></math>"),
    "text": (r"$\text{if } x$", "<math><mrow><mtext>if\u00a0</mtext><mi>x</mi></mrow></math>"),
    "function": (r"$\sin(x)$", "<math><mrow><mrow><mi>sin</mi></mrow><mo>(</mo><mi>x</mi><mo>)</mo></mrow></math>"),
    "fences": (r"$\left(\frac{a}{b}\right.$", "<math><mrow><mo>(</mo><mfrac><mi>a</mi><mi>b</mi></mfrac><mo></mo></mrow></math>"),
    "matrix": (
        r"$\begin{pmatrix}a&b\\c&d\end{pmatrix}$",
        "<math><mrow><mo>(</mo><mtable><mtr><mtd><mi>a</mi></mtd><mtd><mi>b</mi></mtd></mtr><mtr><mtd><mi>c</mi></mtd><mtd><mi>d</mi></mtd></mtr></mtable><mo>)</mo></mrow></math>",
    ),
    "accent": (r"$\hat{x}$", "<math><mover><mi>x</mi><mo>^</mo></mover></math>"),
    "not": (r"$a\not=b$", "<math><mrow><mi>a</mi><mo>≠</mo><mi>b</mi></mrow></math>"),
    "limits inline": (r"$\sum_i x$", "<math><mrow><msub><mo>∑</mo><mi>i</mi></msub><mi>x</mi></mrow></math>"),
    "markup is characters": ("$a<b>c$", "<math><mrow><mi>a</mi><mo><</mo><mi>b</mi><mo>></mo><mi>c</mi></mrow></math>"),
    "unknown": (r"$\frobnicate{x}$", r"<code>\frobnicate{x}</code>"),
    "unbalanced": (r"$\frac{a}{b$", r"<code>\frac{a}{b</code>"),
    "too deep": ("$" + "{" * 60 + "x" + "}" * 60 + "$", "<code>" + "{" * 60 + "x" + "}" * 60 + "</code>"),
}


@pytest.mark.parametrize("name", CASES)
def test_markdown_becomes(shared_page, name):
    text, expected = CASES[name]
    assert shared_page.evaluate(DRAW, text) == expected


@pytest.mark.parametrize("name", MATHS)
def test_a_formula_becomes(shared_page, name):
    text, expected = MATHS[name]
    assert shared_page.evaluate(DRAW, text) == f"<p>{expected}</p>"


def test_a_displayed_formula_has_its_limits_above_and_below(shared_page):
    below = "<mrow><mi>k</mi><mo>=</mo><mn>0</mn></mrow>"
    expected = f"<div><math><mrow><munderover><mo>∑</mo>{below}<mi>n</mi></munderover><mi>k</mi></mrow></math></div>"
    for text in (r"$$\sum_{k=0}^n k$$", "\\[\n\\sum_{k=0}^n k\n\\]", "$$\n\\sum_{k=0}^n k\n$$"):
        assert shared_page.evaluate(DRAW, text) == expected


SAMPLES = st.lists(
    st.sampled_from(
        [
            "word ",
            "**",
            "*",
            "`",
            "```\n",
            "```py\n",
            "\n",
            "\n\n",
            "- ",
            "1. ",
            "  ",
            "> ",
            "# ",
            "$",
            "$$",
            "|",
            "|-|-|\n",
            "[a](https://b.org)",
            "\\(",
            "\\)",
            "x^2",
            "---",
        ]
    ),
    max_size=30,
).map("".join)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(texts=st.lists(SAMPLES, min_size=8, max_size=12))
def test_a_growing_answer_ends_as_if_it_had_come_at_once(shared_page, texts):
    program = """async (texts) => {
        const { renderMarkdown } = await import("/web/markdown.js");
        return texts.filter((text) => {
            const [grown, whole] = [document.createElement("div"), document.createElement("div")];
            for (let end = 0; end <= text.length; end += 3) renderMarkdown(grown, text.slice(0, end));
            renderMarkdown(grown, text);
            renderMarkdown(whole, text);
            return grown.innerHTML !== whole.innerHTML;
        });
    }"""
    assert shared_page.evaluate(program, texts) == []


def test_blocks_that_stand_are_not_drawn_again(shared_page):
    program = """async () => {
        const { renderMarkdown } = await import("/web/markdown.js");
        const root = document.createElement("div");
        renderMarkdown(root, "# one\\n\\ntwo\\n\\nthr");
        const before = [...root.children];
        renderMarkdown(root, "# one\\n\\ntwo\\n\\nthree");
        return before.map((node, i) => node === root.children[i]);
    }"""
    assert shared_page.evaluate(program) == [True, True, False]


CODE = {
    "python": (
        'def f(x):  # why\n    return "a" + str(1.5)',
        'keyword def|call f|comment # why|keyword return|string "a"|call str|number 1.5',
    ),
    "js": ("const a = `x ${b}`; // c", "keyword const|string `x ${b}`|comment // c"),
    "json": ('{"a": [1, true]}', 'mark "a"|number 1|keyword true'),
    "bash": ("ls -l $HOME | grep 'x' # y", "mark -l|mark $HOME|string 'x'|comment # y"),
    "sql": ("SELECT a FROM b WHERE c = 'd'", "keyword SELECT|keyword FROM|keyword WHERE|string 'd'"),
    "html": ('<a href="x">y</a>', 'mark <a|string "x"|mark >|mark </a|mark >'),
    "rust": ('fn main() { println!("x"); let c: &\'a str; }', 'keyword fn|call main|mark println!|string "x"|keyword let|keyword str'),
    "yaml": ("a: 1 # b\n- c: true", "mark a|number 1|comment # b|mark c|keyword true"),
    "diff": ("+a\n-b\n c", "added +a|removed -b"),
    "unknown": ("def x", ""),
    "toString": ("def x", ""),
}


@pytest.mark.parametrize("language", CODE)
def test_code_is_coloured_and_loses_nothing(shared_page, language):
    program = """async ([text, language]) => {
        const { highlight } = await import("/web/highlight.js");
        const root = document.createElement("div");
        root.append(highlight(text, language));
        const spans = [...root.children].map((node) => `${node.className.replace("code-", "")} ${node.textContent.trim()}`);
        return [root.textContent, spans.join("|")];
    }"""
    text, expected = CODE[language]
    assert shared_page.evaluate(program, [text, language]) == [text, expected]


def test_marks_that_reorder_code_are_shown(shared_page):
    program = """async (text) => {
        const { highlight } = await import("/web/highlight.js");
        const root = document.createElement("div");
        root.append(highlight(text, "python"));
        return root.textContent;
    }"""
    assert shared_page.evaluate(program, "if x: # \u202e\u2066 } begin") == "if x: # U+202EU+2066 } begin"
