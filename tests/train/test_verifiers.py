"""Built-in rewards: tables of texts and the scores they are due, nasty ones among them."""

import importlib.util
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UsageError
from train.sandbox import refusal
from train.verifiers import answers, programs, shapes
from train.verifiers.extract import answer_of, block_of, numbers_of, values_of

HUGE = "the answer is 7 " * 62_500  # a million characters


def installed(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed (extra rl)")


@pytest.mark.parametrize(
    ("text", "where", "found"),
    [
        ("", "auto", None),
        ("the answer is 42", "auto", None),
        ("a <answer> 4 </answer> b", "auto", "4"),
        ("<answer>1</answer><answer>2</answer>", "tag", "2"),
        ("<answer>1<answer>2</answer>", "tag", "2"),
        ("</answer><answer>", "tag", None),
        ("<answer>so \\boxed{x}</answer>", "auto", "x"),
        ("\\boxed{1} then \\boxed{\\frac{1}{2}}", "auto", "\\frac{1}{2}"),
        ("\\boxed{never closed", "auto", None),
        ("2 + 2 = 4\n#### 1,234\nbye", "auto", "1,234"),
        ("答案是 \\boxed{四十二}。", "auto", "四十二"),
        ("first 3, then 4.", "number", "4"),
        ("none", "number", None),
        (" all of it ", "all", "all of it"),
        (HUGE, "auto", None),
        ("\\boxed{" * 100_000, "auto", None),
    ],
)
def test_answers_are_found(text, where, found):
    assert answer_of(text, where) == found


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,234.5", [1234.5]),
        ("3/4", [0.75]),
        ("\\dfrac{3}{4}", [0.75]),
        ("12%", [0.12, 12.0]),
        ("12\\%", [0.12, 12.0]),
        ("−3", [-3.0]),
        ("5-3", [3.0]),
        ("1e3", [1000.0]),
        (".5", [0.5]),
        ("1/0", []),
        ("1e999", []),
        ("9" * 5000, []),
        ("1,23", [23.0]),
        ("42.", [42.0]),
        ("１２", [12.0]),
    ],
)
def test_numbers(text, values):
    assert values_of(numbers_of(text)[-1]) == values


def test_blocks():
    text = "a\n```python\nx = 1\n```\nb\n```\nplain\n```\n```json\n{}\n```"
    assert block_of(text, "py") == "x = 1"
    assert block_of(text, "json") == "{}"
    assert block_of(text, "c") == "{}"
    assert block_of("x = 2", "py") == "x = 2"
    assert block_of("```py\ncut off", "py") == "cut off"


@pytest.mark.parametrize(
    ("said", "due", "score"),
    [
        ("42", "42", 1),
        (" 42 ", "#### 42", 1),
        ("<answer>Paris</answer>", "Paris", 1),
        ("it is Paris", "Paris", 0),
        ("", "Paris", 0),
        ("北京", "\\boxed{北京}", 1),
        ("PARIS", "paris", 0),
        ("1", 1, 1),
        ("x", None, None),
        (HUGE, "7", 0),
    ],
)
def test_exact(said, due, score):
    assert answers.exact([said], answer=[due]) == [score]


def test_columns_of_references():
    columns = {"answer": [None, "b", None], "solution": ["a", "c", None], "truth": ["t", "t", "t"]}
    assert answers.exact(["a", "b", "c"], **columns) == [1, 1, None]
    assert answers.exact(["t", "t", "x"], column="truth", **columns) == [1, 1, 0]
    assert answers.exact(["A"], ignore_case=True, answer=["a"]) == [1]


@pytest.mark.parametrize(
    ("said", "due", "score"),
    [
        ("so it is 1,234 dollars", "1234", 1),
        ("first 3, then 4", "3", 0),
        ("25%", "#### 25", 1),
        ("25%", "0.25", 1),
        ("a quarter: 1/4", "0.25", 1),
        ("\\boxed{0.333333333}", "1/3", 1),
        ("0.333", "1/3", 0),
        ("none", "1", 0),
        ("", "1", 0),
        ("1", "none", None),
        ("1", None, None),
        ("9" * 10_000, "1", 0),
        ("1e999", "1", 0),
        (HUGE, "7", 1),
        ("答案：７", "7", 1),
    ],
)
def test_numeric(said, due, score):
    assert answers.numeric([said], answer=[due]) == [score]


def test_tolerance_is_relative_above_one():
    said = ["100.9", "101.1", "0.009", "0.011"]
    assert answers.numeric(said, tolerance=0.01, answer=["100", "100", "0", "0"]) == [1, 0, 1, 0]


@installed("math_verify")
@pytest.mark.parametrize(
    ("said", "due", "score"),
    [
        ("\\boxed{\\frac{1}{2}}", "0.5", 1),
        ("The answer is $1+x$.", "x+1", 1),
        ("#### 42", "some steps\n#### 42", 1),
        ("so x is 42.", "\\boxed{42}", 1),
        ("<think>43</think><answer>42</answer>", "42", 1),
        ("\\boxed{43}", "42", 0),
        ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", 1),
        ("\\boxed{(1, 2)}", "(1,2)", 1),
        ("", "42", 0),
        ("\\boxed{42", "42", 0),
        ("\\boxed{$1,234$}", "#### 1,234", 1),
        ("答案是 42", "42", 1),
        ("x", "", None),
        ("x", None, None),
        (HUGE, "7", 1),
        ("\\boxed{" * 10_000, "7", 0),
    ],
)
def test_math(said, due, score):
    assert answers.math([said], answer=[due]) == [score]


def test_regex():
    assert answers.regex(["a1", "b", ""], pattern=r"\d") == [1, 0, 0]
    assert answers.regex(["a1", "1", "x"], pattern=[r"\d", None, "x"], full=True) == [0, None, 1]
    assert answers.regex(["1 <answer>2</answer>"], pattern="2", full=True, extract="auto") == [1]
    with pytest.raises(UsageError, match=r"reward_options\.regex\.pattern is no regular expression"):
        answers.regex([], pattern="(")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"a": 1}', 1),
        ('so:\n```json\n{"a": [1, null]}\n```', 1),
        ('{"b": 1}', 0),
        ("[1]", 0),
        ("", 0),
        ('{"a": NaN}', 0),
        ('{"a": 1', 0),
        ("[" * 100_000, 0),
        ('{"a": ' + "9" * 5000 + "}", 0),
    ],
)
def test_json(text, score):
    assert answers.json([text], required=["a"]) == [score]


@installed("jsonschema")
def test_json_schema():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert answers.json(['{"a": 1}', '{"a": "1"}', "{}", "1"], schema=schema) == [1, 0, 0, 0]
    with pytest.raises(UsageError, match=r"json\.schema is no JSON schema: 'thing'"):
        answers.json([], schema={"type": "thing"})


@pytest.mark.parametrize(
    ("text", "score", "partial"),
    [
        ("<think>a</think><answer>b</answer>", 1, 1),
        (" <think>a</think>\n<answer>b</answer>\n", 1, 1),
        ("<think></think><answer></answer>", 1, 1),
        ("x<think>a</think><answer>b</answer>", 0, 0.5),
        ("<think>a</think>x<answer>b</answer>", 0, 0.5),
        ("<answer>b</answer><think>a</think>", 0, 0.5),
        ("<think>a<think>b</think></think><answer>c</answer>", 0, 0.25),
        ("<think>a<answer>b</think></answer>", 0, 0.5),
        ("<think>a</think>", 0, 0.25),
        ("", 0, 0),
        ("<think>" * 140_000, 0, 0),
    ],
)
def test_format(text, score, partial):
    assert shapes.format([text]) == [score]
    assert shapes.format([text], partial=True) == [partial]


def test_format_of_other_tags_and_an_opened_one():
    assert shapes.format(["<计划>一</计划>"], tags=["计划"]) == [1]
    assert shapes.format(["a</think><answer>b</answer>", "<think>a</think><answer>b</answer>"], opened=True) == [1, 0]


def test_length():
    ids = [[0] * n for n in (0, 3, 4, 6, 7, 8, 20)]
    assert shapes.length(list("abcdefg"), ids, least=4, most=6) == [0, 0, 1, 1, 0, 0, 0]
    assert shapes.length(list("abcdefg"), ids, least=4, most=6, fade=4) == [0, 0.75, 1, 1, 0.75, 0.5, 0]
    assert shapes.length(["a b c", "abcdef"], [[], []], most=4, unit="words") == [1, 1]
    assert shapes.length(["a b c", "abcdef"], [[], []], most=5, unit="characters") == [1, 0]
    with pytest.raises(UsageError, match="least is 3 and most is 2"):
        shapes.length([], [], least=3, most=2)


def test_cosine_length():
    """The values of the definition at length 0, the half and the maximum, and beyond."""
    ids = [[0] * n for n in (0, 5, 10, 99)]
    score = lambda right: shapes.cosine_length([""] * 4, ids, {"math": [right] * 4}, max_len=10)  # noqa: E731
    assert score(1.0) == pytest.approx([1.0, 0.75, 0.5, 0.5], abs=1e-12)
    assert score(0.0) == pytest.approx([-1.0, -0.75, -0.5, -0.5], abs=1e-12)
    assert score(None) == [None] * 4
    with pytest.raises(UsageError, match=r"needs the reward 'math' before it .*before it are format"):
        shapes.cosine_length([], [], {"format": []}, max_len=10)


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 100), st.booleans())
def test_cosine_length_stays_in_its_bounds_and_falls(a, b, most, right):
    a, b = sorted((a, b))
    short, long = shapes.cosine_length(["", ""], [[0] * a, [0] * b], {"math": [float(right)] * 2}, max_len=most)
    low, high = (0.5, 1.0) if right else (-1.0, -0.5)
    assert low - 1e-12 <= min(short, long) <= max(short, long) <= high + 1e-12
    assert (short >= long - 1e-12) if right else (short <= long + 1e-12)


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 4))
def test_repetition(words, n):
    (score,) = shapes.repetition([" ".join(words)], [[]], ngram_size=n, max_penalty=-2.0)
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    assert score == pytest.approx(-2 * (1 - len(set(grams)) / len(grams)) if grams else 0, abs=1e-12)
    assert -2 < score <= 0
    ids = [ord(word) for word in words]
    assert shapes.repetition(["x"], [ids], ngram_size=n, max_penalty=-2.0, unit="tokens") == [score]
    assert shapes.repetition(["".join(words)], [[]], ngram_size=n, max_penalty=-2.0, unit="characters") == [score]


@given(st.integers(1, 50), st.integers(0, 50), st.lists(st.integers(0, 150), min_size=1, max_size=8))
def test_soft_overlong(cache, free, lengths):
    lengths = sorted(lengths)
    scores = shapes.soft_overlong([[0] * n for n in lengths], max_completion_len=free + cache, soft_punish_cache=cache)
    for n, score in zip(lengths, scores, strict=True):
        due = 0 if n <= free else -1 if n >= free + cache else (free - n) / cache
        assert score == pytest.approx(due, abs=1e-12)
    assert scores == sorted(scores, reverse=True)


def test_language():
    texts = ["hello", "你好", "你好 ab", "42 + 1", "", "Привет", "ありがとう漢字", "안녕", "naïve"]
    of = lambda script: shapes.language(texts, script=script)  # noqa: E731
    assert of("en") == [1, 0, 0.5, None, None, 0, 0, 0, 1]
    assert of("zh") == [0, 1, 0.5, None, None, 0, pytest.approx(2 / 7), 0, 0]
    assert (of("ru")[5], of("ja")[6], of("ko")[7]) == (1, 1, 1)
    assert shapes.language(["好" * 10**6], script="zh") == [1]
    with pytest.raises(UsageError, match="script is xx, allowed: ar, "):
        shapes.language([], script="xx")


def test_brevity():
    texts = ["", "Yes.", "word " * 19 + "end.", "word " * 39 + "end.", "word " * 39 + "end", "no end"]
    assert shapes.brevity(texts) == [0.0, 1.0, 1.0, 0.5, 0.25, 0.5]


ADD = "```python\ndef add(a, b):\n    return {}\n```"
ASSERTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
PAIRS = [{"input": "2\n", "output": "4\n"}, {"input": "3", "output": ["9"]}]
MODE = "none" if refusal() else "namespaces"


@pytest.mark.parametrize(
    ("said", "tests", "score"),
    [
        (ADD.format("a + b"), ASSERTS, 1),
        (ADD.format("a * b"), ASSERTS, 0.5),
        (ADD.format("a + b"), "\n".join(ASSERTS), 1),
        (ADD.format("a * b"), "\n".join(ASSERTS), 0),
        (ADD.format("a +"), ASSERTS, 0),
        ("", ASSERTS, 0),
        (ADD.format("a + b") + "\nand\n```py\nimport os; os._exit(0)\n```", ASSERTS, 0),
        ("import sys\nprint('0\\n1')\nsys.exit(0)", ASSERTS, 0),
        ("def add(a, b): raise SystemExit", ASSERTS, 0),
        ("print(int(input())**2)", PAIRS, 1),
        ("print(4)", PAIRS, 0.5),
        ("print(4)", '{"inputs": ["2", "3"], "outputs": ["4", "9"]}', 0.5),
        ("x = 1", None, None),
        ("x = 1", [], None),
    ],
)
def test_code(said, tests, score):
    assert programs.code([said], tests=[tests], sandbox=MODE) == [score]


def test_code_all_or_nothing_and_what_are_no_tests():
    assert programs.code([ADD.format("a * b")], partial=False, tests=[ASSERTS], sandbox=MODE) == [0]
    assert programs.code([ADD.format("a + b")], column="mine", mine=[ASSERTS], sandbox=MODE) == [1]
    with pytest.raises(ValueError, match="tests are Python texts or"):
        programs.code(["x"], tests=[[1]], sandbox=MODE)


def test_code_ends_in_its_time():
    hangs = "def add(a, b):\n    while a: pass\n    return b"
    assert programs.code([hangs], timeout=0.8, tests=[["assert add(0, 1) == 1", *ASSERTS]], sandbox=MODE) == [1 / 3]
    assert programs.code(["while True: pass"], timeout=0.3, tests=[PAIRS], sandbox=MODE) == [0]


def test_code_is_refused_without_a_sandbox(monkeypatch):
    monkeypatch.setattr(programs, "refusal", lambda: "unshare: Operation not permitted")
    with pytest.raises(UsageError, match=r"'code' is refused: .*unshare: .*\{code: \{sandbox: none\}\}"):
        programs.code([], tests=[])


@pytest.mark.parity
@installed("reasoning_gym")
def test_an_environment_is_prompts_and_verifier():
    from data.sources import open_source

    name = "reasoning_gym:chain_sum?size=4&seed=3&max_terms=3"
    rows = list(open_source(name))
    assert [row["item"] for row in rows] == [0, 1, 2, 3]
    assert rows == list(open_source(name))
    assert rows[0]["prompt"][0]["content"].startswith("State the final answer")
    said = [f"<answer>{rows[0]['answer']}</answer>", rows[1]["answer"], "\\boxed{x}", "x"]
    columns = {key: [row[key] for row in rows] for key in ("environment", "item")}
    columns["item"][3] = None
    scores = programs.reasoning_gym(said, **columns)
    assert scores[:2] == [1, 1]
    assert scores[2] < 0.1
    assert scores[3] is None


@pytest.mark.parity
@installed("reasoning_gym")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("chain_summ", "no environment 'chain_summ'; near it: chain_sum"),
        ("chain_sum?sise=3", "unexpected keyword argument 'sise'"),
        ("chain_sum?max_terms=-1", "max_terms must be >= min_terms"),
        ("chain_sum?size", "'size' is no option=value"),
    ],
)
def test_what_no_environment_is(name, words):
    from data.sources import open_source

    with pytest.raises(UsageError, match=words):
        open_source(f"reasoning_gym:{name}")


@pytest.mark.parametrize(
    ("module", "act", "words"),
    [
        ("math_verify", lambda: answers.math([], answer=[]), r"'math' needs math-verify .*purestep\[rl\]"),
        ("jsonschema.validators", lambda: answers.json([], schema={}), r"needs jsonschema: pip install"),
        ("reasoning_gym", lambda: programs._made("reasoning_gym:x"), r"needs reasoning-gym .*purestep\[rl\]"),
    ],
)
def test_what_is_not_installed_is_named(module, act, words, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=words):
        act()


def test_no_score_is_infinite_on_nasty_texts():
    for text in ("", HUGE, "\x00", "\ud800", "🙂" * 1000):
        for function in (shapes.brevity, shapes.format, shapes.language, answers.json):
            assert all(score is None or math.isfinite(score) for score in function([text]))
        assert answers.exact([text], answer=["1"]) == [0]
