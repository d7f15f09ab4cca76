"""Any training row has a prompt part; what has none is named."""

import json

import pytest

from configs.errors import UsageError
from configs.schema import Data
from data.formats import normalise
from data.prompts import read_prompts, split_prompt
from tests.train.tiny import make_tokenizer

ASKED = [{"role": "user", "content": "the sun"}]
ANSWER = [{"role": "assistant", "content": "red"}]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def read(tmp_path, tokenizer):
    """read(*rows, **knobs of Data) -> read_prompts of a file of these rows."""

    def made(*rows, **knobs):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_prompts((str(path),), tokenizer, Data(train=(str(path),), **knobs))

    return made


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "the sun"}, "the sun"),
        ({"prompt": ASKED}, ASKED),
        ({"messages": ASKED}, ASKED),
        ({"messages": ASKED + ANSWER}, ASKED),
        ({"messages": ASKED + ANSWER + ASKED + ANSWER}, ASKED + ANSWER + ASKED),
        ({"conversations": [{"from": "human", "value": "the sun"}, {"from": "gpt", "value": "red"}]}, ASKED),
        ({"instruction": "the", "input": "sun", "output": "red"}, [{"role": "user", "content": "the\nsun"}]),
        ({"prompt": "the sun", "completion": "red"}, "the sun"),
        ({"prompt": ASKED, "completion": "red"}, ASKED),
        ({"prompt": ASKED, "chosen": "red", "rejected": "blue"}, ASKED),
        ({"chosen": ASKED + ANSWER, "rejected": [*ASKED, {"role": "assistant", "content": "blue"}]}, ASKED),
        ({"chosen": "the sun is red", "rejected": "the sun is blue"}, "the sun is"),
        ({"prompt_tokens": [5, 6], "chosen_tokens": [7], "rejected_tokens": [8]}, [5, 6]),
    ],
)
def test_the_prompt_of_a_row(row, prompt):
    assert split_prompt(normalise(row)) == prompt


def test_tokens_are_those_that_generation_takes(read, tokenizer):
    rows = [{"prompt": "the sun", "want": 3}, {"messages": ASKED + ANSWER}]
    rows.append({"prompt_tokens": [70, 71], "chosen_tokens": [7], "rejected_tokens": [8]})
    found, skipped = [], 0
    for row in rows:  # files hold rows of one kind
        (prompt,), bad = read(row)
        found.append(prompt)
        skipped += bad
    text, chat, ids = found
    assert skipped == 0
    assert text.tokens == tokenizer.encode("the sun", special=True)
    assert (text.columns, text.where.endswith("rows.jsonl:1")) == ({"want": 3}, True)
    assert chat.tokens == tokenizer.encode(tokenizer.render(ASKED, add_generation_prompt=True))
    assert (ids.tokens, ids.value) == ([70, 71], tokenizer.decode([70, 71]))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": ""}, "rows.jsonl:2: the row has no prompt"),
        ({"prompt": 3}, "rows.jsonl:2: 'prompt' must be text or a list"),
        ({"prompt": ["hello"]}, "rows.jsonl:2: message 1 of the prompt"),
        ({"messages": ANSWER}, "rows.jsonl:2: the row has no prompt"),
        ({"text": "no prompt"}, "rows.jsonl:2: the row has no prompt"),
        ({"other": 1}, "rows.jsonl:2: row with the keys other is of no known kind"),
    ],
)
def test_bad_rows_are_named_or_counted(read, row, words):
    good = {"prompt": "the sun"}
    with pytest.raises(UsageError, match=words):
        read(good, row)
    prompts, skipped = read(good, row, good, on_bad_row="skip")
    assert (len(prompts), skipped) == (2, 1)


def test_nothing_left_is_an_error(read):
    with pytest.raises(UsageError, match="no prompt is left of 2 rows"):
        read({"prompt": ""}, {"prompt": ""}, on_bad_row="skip")


def test_a_prompt_alone_is_not_trained_on(tokenizer):
    from data.examples import encode_row

    with pytest.raises(UsageError, match="a prompt without a completion"):
        encode_row({"prompt": "the sun"}, tokenizer, Data(train=("x",)))


def test_a_template_makes_the_prompt_of_columns(read):
    template = 'Reply {"answer": number}, as with {this}: {question}'
    (prompt,), bad = read({"question": "1 + {this}?", "this": 7, "answer": "8"}, prompt_template=template)
    assert prompt.value == [{"role": "user", "content": 'Reply {"answer": number}, as with 7: 1 + {this}?'}]
    assert prompt.columns == {"question": "1 + {this}?", "this": 7, "answer": "8"}
    assert bad == 0


def test_a_row_without_a_column_of_the_template_is_named(read):
    with pytest.raises(UsageError, match=r"rows.jsonl:2: data.prompt_template has \{question\}, the row has answer"):
        read({"question": "1?"}, {"answer": "8"}, prompt_template="{question}")
