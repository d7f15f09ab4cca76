"""Preference rows: every spelling gives the same pair; the prompt stands once; cuts keep both sides."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UsageError
from configs.schema import Data
from data.examples import Examples
from data.loader import Loader
from data.pairs import fit_pair

TOKENS = st.lists(st.integers(3, 9), min_size=1, max_size=12)


def sides(columns):
    """The unshifted tokens of both sides, and which of them are learnt."""
    found = []
    for branch in (1, 2):
        own = columns["branches"] == branch
        start = columns["branches"] == 0
        tokens = [*columns["tokens"][start], *columns["tokens"][own][:1], *columns["targets"][own]]
        learnt = np.concatenate([np.zeros(start.sum() + 1), columns["weights"][own]])
        positions = [*columns["positions"][start], *columns["positions"][own]]
        assert positions == list(range(len(tokens) - 1))
        # within a branch nothing is shifted wrongly
        assert columns["tokens"][own][1:].tolist() == columns["targets"][own][:-1].tolist()
        found.append((tokens, learnt.tolist()))
    return found


def example(prompt, chosen, rejected):
    def side(completion):
        weights = np.concatenate([np.zeros(len(prompt)), np.ones(len(completion))]).astype(np.float32)
        return {"tokens": np.asarray([*prompt, *completion], np.int32), "weights": weights}

    return side(chosen), side(rejected)


def say(prompt, answer):
    return [{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}]


def test_every_spelling_is_the_same_pair(tokenizer_with, settings):
    tokenizer = tokenizer_with("chatml")
    (prompt, good), (_, bad) = say("What is your name?", "I am Kiln"), say("What is your name?", "dog")
    rows = [
        {"prompt": prompt, "chosen": good, "rejected": bad},
        {"chosen": [*prompt, *good], "rejected": [*prompt, *bad]},
        {"prompt": "What is your name?", "chosen": good[0], "rejected": bad},
        {"prompt": prompt, "chosen": "I am Kiln", "rejected": "dog"},
    ]
    first, *others = Examples(rows, tokenizer, settings(), "pair")
    for other in others:
        assert {name: column.tolist() for name, column in other.items()} == {n: c.tolist() for n, c in first.items()}
    for (tokens, learnt), answer in zip(sides(first), ("I am Kiln", "dog"), strict=True):
        text = tokenizer.decode([token for token, weight in zip(tokens, learnt, strict=True) if weight])
        assert text == f"{answer}<|im_end|>"
    plain = {"prompt": "the quick", "chosen": " brown fox", "rejected": " lazy dog"}
    implicit = {name: plain["prompt"] + plain[name] for name in ("chosen", "rejected")}
    ids = {f"{name}_tokens": tokenizer.encode(plain[name]) for name in plain}
    ends = {name: [*ids[name], *tokenizer.eos_ids[:1]] for name in ("chosen_tokens", "rejected_tokens")}
    a, b, c = Examples([plain, implicit, {**ids, **ends}], tokenizer, settings(), "pair")
    assert [tokens for tokens, _ in sides(a)] == [tokens for tokens, _ in sides(c)]
    assert [tokens for tokens, _ in sides(a)] == [tokens for tokens, _ in sides(b)]


@given(TOKENS, TOKENS, TOKENS, st.integers(3, 40), st.sampled_from(["keep_start", "keep_end", "drop"]), st.booleans())
def test_cuts_keep_both_sides(prompt, chosen, rejected, length, truncation, share):
    data = Data(train=("x",), max_length=length, truncation=truncation, share_prompt=share)
    pair = example(prompt, chosen, rejected)
    if chosen == rejected:
        return
    columns, happened = fit_pair(pair, data)
    full = (len(prompt) - 1) * (1 if share else 2) + len(chosen) + len(rejected)
    if columns is None:
        assert full > length
        return
    size = {len(column) for column in columns.values()}
    assert size == {min(len(columns["tokens"]), length)}
    assert (happened == "truncated") == (full > length)
    for (tokens, learnt), completion in zip(sides(columns), (chosen, rejected), strict=True):
        new = [token for token, weight in zip(tokens, learnt, strict=True) if weight]
        whole = [*prompt, *completion]
        if truncation == "keep_end":
            assert new == completion
            assert tokens == whole[len(whole) - len(tokens) :]
        else:
            assert tokens == whole[: len(tokens)]
            assert new == completion[: len(new)]
            assert new
    if not happened:
        assert len(columns["tokens"]) == full
        assert (columns["branches"] == 0).sum() == (len(prompt) - 1 if share else 0)


def test_rows_hold_whole_pairs(tokenizer_with, settings):
    rows = [{"prompt_tokens": [5, 6, 7], "chosen_tokens": [8] * n, "rejected_tokens": [9] * (n + 1)} for n in (1, 4, 2)]
    data = settings(max_length=16, shuffle=False)
    batch = next(iter(Loader(Examples(rows, tokenizer_with("chatml"), data, "pair"), data, 2, epochs=1)))
    assert set(batch) == {"tokens", "targets", "weights", "positions", "segments", "branches", "margins"}
    for row in range(2):
        for segment in range(1, batch["segments"][row].max() + 1):
            assert set(batch["branches"][row][batch["segments"][row] == segment]) == {0, 1, 2}
        assert all(b - a in (0, 1) or b == 0 for a, b in pairwise(batch["segments"][row]))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": " b", "rejected": " b"}, "same tokens"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "'chosen' is empty"),
        ({"prompt_tokens": [3], "chosen_tokens": [4], "rejected_tokens": []}, "'rejected' is empty"),
        ({"prompt_tokens": [], "chosen_tokens": [4], "rejected_tokens": [5]}, "'prompt_tokens' is empty"),
        ({"prompt_tokens": [3], "chosen_tokens": [99999], "rejected_tokens": [5]}, "outside the vocabulary"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' must be"),
        ({"chosen": "dog", "rejected": "cat"}, "do not begin alike"),
        ({"prompt": "a", "completion": "b"}, "needs chosen and rejected"),
    ],
)
def test_bad_rows_are_named(tokenizer_with, settings, row, words):
    with pytest.raises(UsageError, match=words) as caught:
        _ = Examples([row], tokenizer_with("plain"), settings(add_eos=False), "pair")[0]
    assert "row 1" in str(caught.value)


def test_an_objective_says_what_it_cannot_train_on(tokenizer_with, settings):
    with pytest.raises(UsageError, match="preference"):
        _ = Examples([{"prompt": "a", "chosen": "b", "rejected": "c"}], tokenizer_with("plain"), settings())[0]
