"""From rows to examples: masks by kind, truncation, what is dropped and what is said."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from configs.errors import UsageError
from data.examples import Examples, fit, open_examples, to_example
from data.sources import open_source
from tests.data.test_chat import talk, trained


def rows_of(count, **row):
    return [dict(row) for _ in range(count)]


def test_kinds(tokenizer_with, settings):
    tokenizer = tokenizer_with("chatml")
    expected = {
        "text": ({"text": "hello"}, ["ello<|im_end|>"]),
        "strings": ({"prompt": "What", "completion": " is"}, [" is<|im_end|>"]),
        "messages": ({"messages": talk("a", "b", "c", "d")}, ["b<|im_end|>", "d<|im_end|>"]),
        "alpaca": ({"instruction": "a", "output": "b"}, ["b<|im_end|>"]),
        "lists": ({"prompt": talk("a", "b", "c"), "completion": talk("", "d")[1:]}, ["d<|im_end|>"]),
    }
    for name, (row, texts) in expected.items():
        found = trained(tokenizer, to_example(row, tokenizer, settings()))
        # plain text trains everything but its first token, which nothing predicts
        assert [text[-len(want) :] for text, want in zip(found, texts, strict=True)] == texts, name
    everything = to_example(expected["lists"][0], tokenizer, settings(completion_only=False))
    assert trained(tokenizer, everything) == ["b<|im_end|>", "d<|im_end|>"]
    no_eos = to_example(expected["strings"][0], tokenizer, settings(add_eos=False))
    assert trained(tokenizer, no_eos) == [" is"]


def test_tokens(tokenizer_with, settings):
    tokenizer = tokenizer_with("chatml")
    example = to_example({"tokens": [5, 6, 7], "weights": [1, 0, 0.5]}, tokenizer, settings())
    assert example["tokens"].tolist() == [5, 6, 7]
    assert example["weights"].tolist() == [1, 0, 0.5]
    assert to_example({"tokens": [5, 6]}, tokenizer, settings())["weights"].tolist() == [1, 1]
    assert to_example({"tokens": [5, 6], "weights": [1, 0]}, tokenizer, settings()) is None
    for row, message in [
        ({"tokens": [5, 10**6]}, "token id 1000000 is outside"),
        ({"tokens": ["a", "b"]}, "list of integers"),
        ({"tokens": [5, 6], "weights": [1]}, "as long as"),
        ({"tokens": [5, 6], "weights": [1, -1]}, "finite numbers >= 0"),
    ]:
        with pytest.raises(ValueError, match=f"f:3: .*{message}"):
            to_example(row, tokenizer, settings(), "f:3")


@pytest.mark.parametrize(("policy", "tokens"), [("keep_start", [1, 2, 3, 4, 5]), ("keep_end", [4, 5, 6, 7, 8])])
def test_truncation(tokenizer_with, settings, policy, tokens):
    row = {"tokens": list(range(1, 9))}
    data = settings(max_length=4, truncation=policy)
    assert to_example(row, tokenizer_with("chatml"), data)["tokens"].tolist() == tokens
    assert to_example({"tokens": tokens}, tokenizer_with("chatml"), data)["tokens"].tolist() == tokens


def test_truncation_drop_and_error(tokenizer_with, settings):
    row = {"tokens": list(range(1, 9))}
    assert to_example(row, tokenizer_with("chatml"), settings(max_length=4, truncation="drop")) is None
    with pytest.raises(UsageError, match=r"f:1: the example has 8 tokens, data\.max_length allows 5"):
        to_example(row, tokenizer_with("chatml"), settings(max_length=4, truncation="error"), "f:1")


def test_what_is_dropped_is_counted(tokenizer_with, settings):
    rows = [
        {"messages": talk("a", "b")},
        {"messages": talk("only a question")},
        {"messages": "broken"},
        {"text": ""},
        {"messages": talk("long " * 40, "cut away")},
        {"text": "word " * 40},
    ]
    examples = Examples(rows, tokenizer_with("chatml"), settings(max_length=24, on_bad_row="skip"))
    examples.scan()
    assert examples.dropped() == {"no_trained_token": 2, "bad_row": 1, "too_short": 1}
    assert [example is not None for example in examples] == [True, False, False, False, False, True]
    assert examples.truncated.tolist() == [False] * 5 + [True]
    assert [examples.length(index) > 0 for index in range(6)] == [True, False, False, False, False, True]
    assert examples.first_bad == "row 3: 'messages' must be a list, got str"


def test_bad_rows_stop_by_default(tokenizer_with, settings, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": []}\n\n{"messages": 3}\n{\n')
    examples = open_examples(path, tokenizer_with("chatml"), settings())
    for index, message in enumerate(
        [r"a\.jsonl:1: 'messages' is empty", r"a\.jsonl:3: 'messages' must", r"a\.jsonl:4:"]
    ):
        with pytest.raises(UsageError, match=message):
            examples[index]


def test_nothing_left(tokenizer_with, settings, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"messages": talk("q")}, {"messages": [3]}]))
    examples = open_examples(path, tokenizer_with("chatml"), settings(on_bad_row="skip"))
    with pytest.raises(
        UsageError, match=r"no example is left of 2 rows: .*1 malformed; 1 no token.*a\.jsonl:2: message 1"
    ):
        examples.scan()


def test_a_wrong_configuration_is_not_a_bad_row(tokenizer_with, settings, tmp_path, backend):
    from data.tokenizer import wrap_fast

    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": talk("q", "a")}) + "\n" + json.dumps({"text": "x"}))
    without = open_examples(path, tokenizer_with(None, "plain"), settings(on_bad_row="skip"))
    with pytest.raises(UsageError, match=r"a\.jsonl:1: the tokenizer has no chat template.*data\.chat_template"):
        without.scan()
    given = open_examples(path, tokenizer_with(None, "plain"), settings(chat_template="{% for m in messages %}\n{{ m.content }}{% endfor %}"))  # fmt: skip  # noqa: E501
    given.scan()
    no_eos = Examples([{"text": "x"}], wrap_fast(backend, {"eos_token": None}), settings())
    if not no_eos.tokenizer.eos_ids:
        with pytest.raises(UsageError, match="no end-of-sequence token"):
            no_eos.scan()


def test_examples_are_made_once(tokenizer_with, settings):
    examples = Examples(rows_of(2, messages=talk("a", "b")), tokenizer_with("chatml"), settings())
    assert examples[0] is examples[0]
    assert fit(examples[0], settings())[0] is examples[0]


def test_the_conversations_of_the_quick_start(tokenizer_with, settings):
    """Every row of our own data: what carries loss is what the assistant says, and its ends of turn."""
    folder = Path(__file__).parents[2] / "configs/recipes/identity"
    records = open_source(folder)
    tokenizer = tokenizer_with("default_system")
    for index in range(len(records)):
        if "messages" not in records[index]:
            continue  # the pairs
        answers = [m["content"] for m in records[index]["messages"] if m["role"] == "assistant"]
        example = to_example(records[index], tokenizer, settings(max_length=4096), records.where(index))
        assert (example is None) == (not answers)  # held-out questions
        assert example is None or trained(tokenizer, example) == [f"{answer}<|im_end|>" for answer in answers]


def test_threads_may_share_a_marked_template(tokenizer_with, settings):
    rows = [{"messages": talk(f"a{index}", f"b{index}", "c", "d")} for index in range(200)]
    tokenizer = tokenizer_with("marked")
    with ThreadPoolExecutor(4) as pool:
        examples = list(pool.map(lambda row: to_example(row, tokenizer, settings()), rows))
    wanted = [[f"b{index}<|im_end|>", "d<|im_end|>"] for index in range(200)]
    assert [trained(tokenizer, example) for example in examples] == wanted
