"""Rows of reward models: completions whole, read at their ends; steps read at theirs; cuts keep what is read."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UsageError
from configs.schema import Data
from data.examples import Examples
from data.loader import Loader
from data.rewards import fit_reward

TOKENS = st.lists(st.integers(3, 9), min_size=1, max_size=12)


def side(prompt, completion):
    weights = np.concatenate([np.zeros(len(prompt)), np.ones(len(completion))]).astype(np.float32)
    return {"tokens": np.asarray([*prompt, *completion], np.int32), "weights": weights}


def sequences(columns):
    """The tokens of both sides; each is read once, at its last one."""
    start, found = columns["branches"] == 0, []
    for branch in (1, 2):
        own = columns["branches"] == branch
        assert [*columns["positions"][start], *columns["positions"][own]] == list(range(start.sum() + own.sum()))
        assert columns["weights"][own].tolist() == [0.0] * (own.sum() - 1) + [1.0]
        found.append([*columns["tokens"][start], *columns["tokens"][own]])
    assert columns["weights"].sum() == 2
    return found


@given(TOKENS, TOKENS, TOKENS, st.integers(3, 40), st.sampled_from(["keep_start", "keep_end", "drop"]), st.booleans())
def test_cuts_keep_both_ends(prompt, chosen, rejected, length, truncation, share):
    data = Data(train=("x",), max_length=length, truncation=truncation, share_prompt=share)
    whole = [[*prompt, *chosen], [*prompt, *rejected]]
    columns, happened = fit_reward((side(prompt, chosen), side(prompt, rejected), 0.5), data)
    if columns is None:
        assert happened == "too_long"
        return
    assert {len(column) for column in columns.values()} == {len(columns["tokens"])}
    assert len(columns["tokens"]) <= length
    assert (columns["margins"] == 0.5).all()
    cut = len(whole[0]) - len(sequences(columns)[0])
    assert sequences(columns) == [tokens[cut:] for tokens in whole]
    assert (happened == "truncated") == (cut > 0)
    assert cut < len(prompt)
    assert cut == 0 or truncation == "keep_end"
    if not share:
        assert not (columns["branches"] == 0).any()


def test_answers_end_with_their_turn(tokenizer_with, settings):
    tokenizer = tokenizer_with("chatml")
    ask, say = [{"role": "user", "content": "What is your name?"}], lambda x: [{"role": "assistant", "content": x}]
    rows = [
        {"prompt": ask, "chosen": say("I am Kiln"), "rejected": say("dog"), "margin": 2},
        {"prompt": "the quick", "chosen": " brown fox", "rejected": " lazy dog"},
        {"prompt_tokens": [5, 6], "chosen_tokens": [7, 8], "rejected_tokens": [7], "margin": 0.5},
    ]
    chat, plain, tokens = Examples(rows, tokenizer, settings(), "reward")
    for columns, words in ((chat, ("I am Kiln", "dog")), (plain, (" brown fox", " lazy dog"))):
        for sequence, word in zip(sequences(columns), words, strict=True):
            assert tokenizer.decode(sequence).endswith(f"{word}<|im_end|>")
    assert sequences(tokens) == [[5, 6, 7, 8], [5, 6, 7]]
    assert [set(c["margins"].tolist()) for c in (chat, plain, tokens)] == [{2.0}, {0.0}, {0.5}]
    data = settings(max_length=64)
    batch = next(iter(Loader(Examples(rows, tokenizer, data, "reward"), data, 1, epochs=1)))
    assert set(batch) == {"tokens", "targets", "weights", "positions", "segments", "branches", "margins"}


def test_steps_are_tokenised_one_by_one(tokenizer_with, settings):
    tokenizer = tokenizer_with("chatml")
    row = {"prompt": "1 + 1", "completions": ["1 + 1 = 2.", "the lazy dog"], "labels": [True, False]}
    (columns,) = Examples([row], tokenizer, settings(), "steps")
    pieces = [tokenizer.encode(text) for text in ("1 + 1", "1 + 1 = 2.", "\n", "the lazy dog", "\n")]
    assert columns["tokens"].tolist() == [token for piece in pieces for token in piece]
    ends = np.flatnonzero(columns["weights"])
    assert ends.tolist() == [sum(map(len, pieces[:3])) - 1, sum(map(len, pieces)) - 1]
    assert columns["labels"][ends].tolist() == [1, 0]
    cut = settings(max_length=int(ends[0]) + 2)
    (first,) = Examples([row], tokenizer, cut, "steps")
    assert np.flatnonzero(first["weights"]).tolist() == [ends[0]]
    (last,) = Examples([row], tokenizer, settings(max_length=6, truncation="keep_end"), "steps")
    assert last["tokens"].tolist() == columns["tokens"][-6:].tolist()
    assert last["labels"].tolist() == columns["labels"][-6:].tolist()
    (chat,) = Examples([{**row, "prompt": [{"role": "user", "content": "1 + 1"}]}], tokenizer, settings(), "steps")
    assert "assistant\n1 + 1 = 2." in tokenizer.decode(chat["tokens"])


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        ("reward", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "2"}, "'margin' must be a finite number"),
        ("reward", {"prompt": "the", "chosen": " dog", "rejected": " dog"}, "same tokens"),
        ("reward", {"prompt": "a", "completion": "b"}, "needs chosen and rejected"),
        ("steps", {"prompt": "a", "completions": ["b"], "labels": [2]}, "'labels' must be a list of true and false"),
        ("steps", {"prompt": "a", "completions": ["b"], "labels": [True, True]}, "1 'completions' and 2 'labels'"),
        ("steps", {"prompt": "a", "completions": [], "labels": []}, "at least one"),
        ("steps", {"prompt": "a", "chosen": "b", "rejected": "c"}, "trains on rows {prompt, completions"),
        ("lm", {"prompt": "a", "completions": ["b"], "labels": [True]}, "only objective.type=process_reward"),
    ],
)
def test_bad_rows_are_named(tokenizer_with, settings, kind, row, words):
    with pytest.raises(UsageError) as caught:
        _ = Examples([row], tokenizer_with("plain"), settings(add_eos=False), kind)[0]
    assert words in str(caught.value)
    assert "row 1" in str(caught.value)


def test_what_is_too_long_may_be_refused(tokenizer_with, settings):
    pair = {"prompt_tokens": [5] * 9, "chosen_tokens": [7, 8], "rejected_tokens": [7]}
    with pytest.raises(UsageError, match=r"the pair takes 12 positions, data\.max_length is 8"):
        _ = Examples([pair], tokenizer_with("plain"), settings(max_length=8, truncation="error"), "reward")[0]
