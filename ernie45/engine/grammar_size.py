"""How much a grammar may hold before it is compiled.

llguidance bounds what a compiled grammar becomes, not what compiling takes. It descends by recursion, so a chain of rules that call one
another ends at the bottom of the stack, and the process with it (2,684 rules, or 1,000 references through objects); options and properties
cost the square of their number (8,000 took 5 s). What is counted here is counted in the text, generously: what passes compiles in a second
or two.
"""

import re

from ernie45.errors import RequestError

_MOST = {
    "definitions of rules and terminals": (re.compile(r"[A-Za-z_]\w*(?:\.-?\d+)?\s*(?:\[[^\]\n]*\]|\{[^}\n]*\})?\s*:"), 1_000),
    "references": (re.compile(r"\$ref"), 400),
    "names of properties and keywords": (re.compile(r'"\s*:'), 3_000),
    "operators ?, * and +": (re.compile(r"[?*+]"), 2_000),
    "alternatives": (re.compile(r"\|"), 10_000),
}


def check_size(grammar: str, field: str) -> None:
    """Raises RequestError naming `field` when a grammar has more of something than is compiled."""
    text = grammar.replace('\\"', '"')  # a grammar inside JSON has its quotes escaped
    for what, (pattern, most) in _MOST.items():
        count = sum(1 for _ in pattern.finditer(text))
        if count > most:
            raise RequestError(f"{field} makes a grammar with {count:,} {what}; at most {most:,} are compiled", field)
