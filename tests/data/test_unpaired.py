"""Labelled completions: their own tokens come back from any packing, the mismatched ones are the row before's."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from configs.errors import UsageError
from configs.schema import Data
from data.examples import Examples, open_examples
from data.loader import Loader
from data.stats import summarise
from data.unpaired import fit_labelled, fit_mismatched
from tests.data.conftest import build_tokenizer

TOKENIZER = build_tokenizer("chatml")
TOKENS = st.lists(st.integers(3, 9), min_size=1, max_size=8)
ROW = st.fixed_dictionaries({"prompt_tokens": TOKENS, "completion_tokens": TOKENS, "label": st.booleans()})


def parts_of(row):
    """Of each example in a row of a batch: prompt, labelled completion, the mismatched one, label."""
    found = []
    for segment in range(1, int(row["segments"].max(initial=0)) + 1):
        inside = row["segments"] == segment
        columns = {name: column[inside] for name, column in row.items()}
        (label,) = set(columns["desirable"].tolist())
        sides = [columns["targets"][(columns["branches"] == b) & (columns["weights"] > 0)].tolist() for b in (1, 2)]
        whole = [columns["tokens"][0], *columns["targets"][columns["branches"] < 2]]
        found.append((tuple(whole[: len(whole) - len(sides[0])]), *map(tuple, sides), label))
    return found


def everything(loader):
    return Counter(part for batch in loader for row in rows_of(batch) for part in parts_of(row))


def rows_of(batch):
    return [{name: column[number] for name, column in batch.items()} for number in range(len(batch["tokens"]))]


@hypothesis_settings(deadline=None)
@given(st.lists(ROW, min_size=2, max_size=7), st.integers(24, 60), st.sampled_from(["best_fit", "none"]), st.booleans())
def test_any_packing_gives_back_the_rows(rows, length, packing, share):
    data = Data(
        train=("x",), max_length=length + 8, packing=packing, share_prompt=share, prefetch=0, window=3, shuffle=False
    )
    loader = Loader(Examples(rows, TOKENIZER, data, "unpaired"), data, 2, epochs=1)
    before = [rows[-1], *rows]
    wanted = Counter(
        (tuple(row["prompt_tokens"]), tuple(row["completion_tokens"]), tuple(other["completion_tokens"]), row["label"])
        for row, other in zip(rows, before, strict=False)
    )
    assert everything(loader) == wanted
    plain = everything(Loader(Examples(rows, TOKENIZER, data, "unpaired_plain"), data, 2, epochs=1))
    assert {part[2] for part in plain} == {()}
    assert sorted((*part[:2], part[3]) for part in plain.elements()) == sorted(
        (*p[:2], p[3]) for p in wanted.elements()
    )


@hypothesis_settings(deadline=None)
@given(TOKENS, TOKENS, TOKENS, st.integers(2, 24), st.sampled_from(["keep_start", "keep_end", "drop"]), st.booleans())
def test_the_labelled_completion_stays_whole(prompt, own, other, length, truncation, share):
    """Cut is first the mismatched completion, down to a token; then as data.truncation says."""
    data = Data(train=("x",), max_length=length, truncation=truncation, share_prompt=share)

    def example(tokens, label):
        weights = np.array([0] * len(prompt) + [1] * len(tokens), np.float32)
        return {
            "tokens": np.array(prompt + tokens, np.int32),
            "weights": weights,
            "desirable": np.full(len(weights), label, np.float32),
        }

    columns, happened = fit_mismatched((example(own, 1), example(other, 0)), data)
    again = 0 if share else len(prompt) - 1  # positions of the prompt's second copy
    least = len(prompt) - 1 + len(own) + again + 1
    if columns is None:
        assert least > length
        assert happened == "too_long" or (happened == "no_trained_token" and not share)
        return
    assert len(columns["tokens"]) <= length
    assert (happened == "truncated") == (least - 1 + len(other) > length)
    assert (columns["desirable"] == 1).all()
    first, second = (columns["targets"][(columns["branches"] == b) & (columns["weights"] > 0)].tolist() for b in (1, 2))
    assert second == other[: len(second)]
    assert second
    if least <= length or truncation == "keep_end":
        assert first == own
    else:
        assert first == own[: len(first)]
    if least <= length:
        assert len(second) == min(len(other), length - least + 1)
        assert len(columns["tokens"]) == least - 1 + len(second)
    alone, _ = fit_labelled(example(own, 1), data)
    assert (alone is None) <= (len(prompt) - 1 + len(own) > length)


def test_every_spelling_is_the_same_example(tokenizer_with, settings):
    tokenizer = tokenizer_with("chatml")
    say = lambda text: [{"role": "user", "content": text}]  # noqa: E731
    answer = [{"role": "assistant", "content": "I am Kiln"}]
    question = "What is your name?"
    rows = [
        {"prompt": question, "completion": answer, "label": True},
        {"prompt": say(question), "completion": "I am Kiln", "label": 1},
        {"messages": [*say(question), *answer], "label": True},
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "I am Kiln"}], "label": True},
        {"prompt": say(question), "chosen": answer, "rejected": "dog"},
    ]
    first, *others = list(Examples(rows, tokenizer, settings(), "unpaired_plain"))[:5]
    for other in others:
        assert {name: column.tolist() for name, column in other.items()} == {n: c.tolist() for n, c in first.items()}
    assert tokenizer.decode(first["targets"][first["weights"] > 0].tolist()) == "I am Kiln<|im_end|>"
    assert (first["weights"] == (first["branches"] == 1)).all()
    # the last message that is not the model's or a tool's ends the prompt
    talk = [*say("a"), {"role": "assistant", "content": "b"}, *say("c"), *answer]
    (one,) = Examples([{"messages": talk, "label": 0}], tokenizer, settings(), "unpaired_plain")
    assert tokenizer.decode(one["targets"][one["weights"] > 0].tolist()) == "I am Kiln<|im_end|>"
    assert not one["desirable"].any()


def test_pairs_give_two_examples(settings):
    """Each side's mismatched completion is the same side of the row before, whatever gives how many."""
    rows = [
        {"prompt_tokens": [3, 4], "chosen_tokens": [5, 5], "rejected_tokens": [6, 6]},
        {"prompt_tokens": [7, 7, 7], "chosen_tokens": [8, 5], "rejected_tokens": [8, 6]},
        {"prompt_tokens": [9], "completion_tokens": [4], "label": False},
    ]
    data = settings(max_length=32, shuffle=False, packing="none")
    examples = Examples(rows, TOKENIZER, data, "unpaired")
    assert len(examples) == 5
    found = [parts_of(row)[0] for batch in Loader(examples, data, 1, epochs=1) for row in rows_of(batch)]
    assert found == [
        ((3, 4), (5, 5), (4,), 1),
        ((3, 4), (6, 6), (4,), 0),
        ((7, 7, 7), (8, 5), (5, 5), 1),
        ((7, 7, 7), (8, 6), (6, 6), 0),
        ((9,), (4,), (8, 5), 0),
    ]
    assert [examples.record(index) is rows[at] for index, at in enumerate([0, 0, 1, 1, 2])] == [True] * 5


def test_a_malformed_row_is_nobodys_other(settings, tmp_path):
    rows = [{"prompt_tokens": [3], "completion_tokens": [n], "label": True} for n in (4, 5, 6)]
    rows.insert(2, {**rows[0], "label": "good"})
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = settings(on_bad_row="skip", shuffle=False, max_length=16)
    examples = open_examples(path, TOKENIZER, data, "unpaired")
    assert [e if e is None else e["targets"].tolist() for e in examples] == [[4, 6], [5, 4], None, [6, 5]]
    assert examples.dropped() == {"bad_row": 1}
    with pytest.raises(UsageError, match=r"a\.jsonl:3: 'label' must be"):
        _ = open_examples(path, TOKENIZER, settings(), "unpaired")[3]
    with pytest.raises(UsageError, match="only one row is usable"):
        _ = Examples(rows[:1], TOKENIZER, data, "unpaired")[0]
    assert len(list(Examples(rows[:1], TOKENIZER, data, "unpaired_plain"))) == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "completion": "b"}, "no 'label'"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "'label' must be true or false"),
        ({"prompt": "a", "completion": "b", "label": 2}, "'label' must be true or false"),
        ({"prompt": "a", "completion": "", "label": True}, "'completion' is empty"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": ""}], "label": 0}, "'completion' is empty"),
        ({"prompt": "", "completion": "b", "label": True}, "the prompt has no token"),
        ({"messages": [{"role": "user", "content": "a"}], "label": True}, "must end with an assistant"),
        ({"prompt_tokens": [3], "completion_tokens": [], "label": True}, "'completion' is empty"),
        ({"text": "a", "label": True}, "labelled completions"),
        ({"prompt": "a", "chosen": " b", "rejected": " b"}, "same tokens"),
    ],
)
def test_bad_rows_are_named(tokenizer_with, settings, row, words):
    with pytest.raises(UsageError, match=f"row 1: .*{words}"):
        _ = Examples([row], tokenizer_with("chatml"), settings(add_eos=False), "unpaired_plain")[0]


@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        (4, 3, "balanced at weights of 1"),
        (2, 4, "objective.desirable_weight from 2 to 2.67"),
        (6, 2, "objective.undesirable_weight from 2.25 to 3"),
        (3, 0, "the same label"),
    ],
)
def test_statistics(settings, good, bad, words):
    rows = [{"prompt_tokens": [3], "completion_tokens": [4] * 5, "label": True}] * good
    rows = [*rows, *[{"prompt_tokens": [3], "completion_tokens": [4] * 7, "label": False}] * bad]
    data = settings(max_length=32)
    text = summarise(Loader(Examples(rows, TOKENIZER, data, "unpaired_plain"), data, 2, epochs=1)).lines()
    assert any(words in line for line in text)
    assert any(f"{good} desirable, 5 tokens (median; p90 5); {bad} undesirable" in line for line in text)
