"""The sandbox: what a stranger's template may not do, each by a template that tries."""

import pytest

from ernie45.errors import TokenizerError
from ernie45.tokens.jinja import Bounds, render

MESSAGES = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{% for i in [1, 2] recursive %}{% if loop.depth < 40 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'a' * 10**9 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{% set a = 'x' * 9999 %}{{ a.replace('x', a) }}",
        "{% set a = 'x' * 9999 %}{{ a | replace('x', a) }}",
        "{% set a = 'x' * 9999 %}{{ a.join(a) }}",
        "{% set a = 'x' * 9999 %}{{ a | join(a) }}",
        "{{ 'a'.center(10**9) }}",
        "{{ 'a' | center(10**9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ messages | tojson(indent=1000000) }}",
        "{{ raise_exception('no') }}",
        "{{ messages[0].nothing.deeper }}",
        "{{ 1 / 0 }}",
        "{% for x in 5 %}{% endfor %}",
        "{% if",
        "x" * (2**20 + 1),
    ],
)
def test_refused(source):
    with pytest.raises(TokenizerError, match="template"):
        render(source, MESSAGES, Bounds(steps=20_000, seconds=5, size=2**20))


def test_time_is_bounded():
    with pytest.raises(TokenizerError, match="more than 0 seconds"):
        render("{% for i in range(9) %}{% endfor %}", MESSAGES, Bounds(seconds=0))


def test_the_words_of_the_field_work():
    assert render("{{ strftime_now('%Y') | length }}", MESSAGES)[0] == "4"
    assert render("{{ messages | tojson }}", {"messages": [{"a": "<\u00e9>"}]})[0] == '[{"a": "<\u00e9>"}]'
    assert (
        render("{% for m in messages %}{% if loop.last %}{{ m.content ~ 1 ~ loop.length }}{% break %}{% endif %}{% endfor %}", MESSAGES)[0]
        == "yes12"
    )
    assert render("{%- if x is defined %}a{% endif -%}\n  b", MESSAGES)[0] == "b"
    with pytest.raises(TokenizerError, match="only two roles"):
        render("{{ raise_exception('only two roles') }}", MESSAGES)


def test_generation_blocks_give_spans():
    source = "{% for m in messages %}[{% generation %}{{ m.content }}{% endgeneration %}]{% endfor %}"
    assert render(source, MESSAGES) == ("[hi][yes]", ((1, 3), (5, 8)))
