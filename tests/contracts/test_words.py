"""What every file says: a docstring, types, plain names, and nothing about one machine."""

import ast
import re

DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers", "tools", "stuff"}
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b(?!\(#\d+\))")
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(work|tmp|root|home/\w+|opt/wheels|opt/pypi)/")
REGISTRY_HOST = re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs|deb\.debian\.org|--(extra-)?index-url")
BINARY = {".gguf", ".gz", ".model", ".npy", ".npz", ".png", ".safetensors", ".xz", ".zst"}


def untyped_arguments(source):
    """Arguments without annotation, `self` and `cls` aside, and functions that do not say what they return."""
    found = []
    for function in source.functions:
        named = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        packed = [a for a in (function.args.vararg, function.args.kwarg) if a]
        found += [f"{source.path}:{a.lineno} {a.arg}" for a in named + packed if a.annotation is None and a.arg not in ("self", "cls")]
        if function.returns is None:
            found.append(f"{source.path}:{function.lineno} {function.name} -> ?")
    return found


def unfinished(source):
    return [f"{source.path}:{n} {line.strip()}" for n, line in enumerate(source.text.splitlines(), 1) if UNFINISHED.search(line)]


def local_words(name, text):
    """Paths of one machine and hosts of registries: neither exists where the next person clones."""
    lines = enumerate(text.splitlines(), 1)
    return [f"{name}:{n} {line.strip()[:120]}" for n, line in lines if MACHINE_PATH.search(line) or REGISTRY_HOST.search(line)]


def test_every_module_has_a_docstring(package, none):
    none([str(s.path) for s in package if not ast.get_docstring(s.tree)])


def test_every_argument_is_typed(package, none):
    none([hit for source in package for hit in untyped_arguments(source)])


def test_nothing_is_left_unfinished_without_an_issue(package, tests, none):
    own = "test_words.py"
    none([hit for source in package + tests if source.path.name != own for hit in unfinished(source)])


def test_there_are_no_drawers(package, tests, none):
    none([str(s.path) for s in package + tests if DRAWERS & {part.removesuffix(".py") for part in s.path.parts}])


def test_no_tracked_file_speaks_of_one_machine(tracked, none):
    texts = ((path, path.read_text("utf-8")) for path in tracked if path.suffix not in BINARY)
    none([hit for path, text in texts for hit in local_words(path.name, text)])


def test_the_rules_see_a_breach(planted):
    assert untyped_arguments(planted("def f(self, a, *b: int) -> None: ...")) == ["ernie45/planted.py:1 a"]
    assert untyped_arguments(planted("def f(): ...")) == ["ernie45/planted.py:1 f -> ?"]
    assert unfinished(planted("# TODO: later"))
    assert not unfinished(planted("# TODO(#12): later"))
    # in pieces, since this file is read too
    assert local_words("x", "/".join(["cache = '", "work", "cache'"]))
    assert local_words("x", "-".join(["pip install -", "extra", "index", "url ..."]))
    assert not local_words("x", "see the /v1/work/ route and docs/tmp/x")
