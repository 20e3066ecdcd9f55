"""Sizes that keep a file and a function in one head, and enough tests beside the code."""

FILE = 500  # lines of one file
FUNCTION = 100  # lines of the longest function
FUNCTION_P95 = 45  # lines that 95 functions in a hundred stay under
TEST_RATIO = 0.6  # written lines of tests to one of code


def long_files(sources):
    return [f"{s.path}: {n} lines" for s in sources if (n := len(s.text.splitlines())) > FILE]


def function_lengths(sources):
    """(lines, where) of every function, the longest last."""
    return sorted((f.end_lineno - f.lineno + 1, f"{s.path}:{f.lineno} {f.name}") for s in sources for f in s.functions)


def test_no_file_is_too_long(package, tests, none):
    none(long_files(package + tests))


def test_no_function_is_too_long(package, tests, none):
    none([f"{where}: {n} lines" for n, where in function_lengths(package + tests) if n > FUNCTION])


def test_most_functions_are_short(package):
    lengths = [n for n, _ in function_lengths(package)]
    p95 = lengths[int(0.95 * (len(lengths) - 1))]
    assert p95 <= FUNCTION_P95, f"95 % of the functions are under {p95} lines; the longest: {function_lengths(package)[-5:]}"


def test_there_are_enough_tests(package, tests):
    code, test = (sum(s.written_lines for s in sources) for sources in (package, tests))
    assert test >= TEST_RATIO * code, f"{test} lines of tests beside {code} of code"


def test_the_rules_see_a_breach(planted):
    assert long_files([planted("x = 1\n" * (FILE + 1))])
    body = "def f():\n" + "    x = 1\n" * FUNCTION
    assert function_lengths([planted(body)]) == [(FUNCTION + 1, "ernie45/planted.py:1 f")]
