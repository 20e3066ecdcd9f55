"""Walls that an import contract does not see: who reads the environment, what is imported inside a function, what is silenced."""

import ast

REFERENCES = {"transformers", "peft", "trl", "vllm", "lightning", "gguf", "xllamacpp", "llama_cpp"}


def environment_readers(sources):
    """Where `os.environ`, `os.getenv` or `os.putenv` is used, by any way of importing it."""
    words = {"environ", "environb", "getenv", "putenv"}
    found = []
    for source in sources:
        for node in ast.walk(source.tree):
            attribute = isinstance(node, ast.Attribute) and node.attr in words
            imported = isinstance(node, ast.ImportFrom) and node.module == "os" and words & {alias.name for alias in node.names}
            if attribute or imported:
                found.append(f"{source.path}:{node.lineno}")
    return found


def silenced_types(sources):
    return [f"{s.path}:{n}" for s in sources for n, line in enumerate(s.text.splitlines(), 1) if "# type: ignore" in line]


def test_the_environment_is_read_in_one_place(package, none):
    elsewhere = [source for source in package if source.path.as_posix() != "ernie45/config.py"]
    none(environment_readers(elsewhere))


def test_reference_implementations_stay_in_tests(package, none):
    none([f"{s.path}: {sorted(REFERENCES & s.imports)}" for s in package if REFERENCES & s.imports])


def test_types_are_stated_not_silenced(package, none):
    none(silenced_types(package))


def test_the_rules_see_a_breach(planted):
    assert environment_readers([planted("import os\nx = os.environ")]) == ["ernie45/planted.py:2"]
    assert environment_readers([planted("from os import getenv")]) == ["ernie45/planted.py:1"]
    assert planted("def f():\n    import transformers.models").imports == {"transformers"}
