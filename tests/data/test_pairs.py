"""Preference rows: every spelling gives the same pair; the prompt stands once; cuts keep both sides."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UsageError
from configs.schema import Data
from data.examples import Examples
from data.loader import Loader
from data.pairs import _level, fit_pair
from data.stats import summarise
from tests.data.conftest import build_tokenizer

TOKENIZER = build_tokenizer("chatml")
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


@given(st.lists(TOKENS, min_size=1, max_size=4), st.integers(1, 40))
def test_levelling_uses_the_room(sides, room):
    sizes = [len(side) for side in sides]
    most = _level(sizes, room)
    used = sum(min(size, most) for size in sizes)
    assert used <= room
    assert used == sum(sizes) or sum(min(size, most + 1) for size in sizes) > room


def scored(scores, prompt="the quick"):
    return {"prompt": prompt, "completions": [f" dog {i}" for i in range(len(scores))], "scores": scores}


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=5), min_size=1, max_size=5),
    st.sampled_from(["best_worst", "adjacent", "all"]),
    st.sampled_from([0.0, 2.0]),
)
def test_scores_give_exactly_their_pairs(lists, which, least):
    """In the order of the rows, then of the ranks; each example knows its row."""
    wanted = []
    for number, scores in enumerate(lists):
        ranks = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        last = len(ranks) - 1
        for better, worse in combinations(range(len(ranks)), 2):
            margin = scores[ranks[better]] - scores[ranks[worse]]
            taken = {"all": True, "adjacent": worse == better + 1, "best_worst": (better, worse) == (0, last)}[which]
            if taken and margin > 0 and margin >= least:
                wanted.append((number, f" dog {ranks[better]}", f" dog {ranks[worse]}", margin))
    rows = [scored(scores, f"the quick {number}") for number, scores in enumerate(lists)]
    data = Data(train=("x",), pairs=which, min_margin=least, max_length=64)
    examples = Examples(rows, TOKENIZER, data, "pair")
    found = []
    for index, example in enumerate(examples):
        texts = [TOKENIZER.decode(tokens[len(tokens) - int(sum(learnt)) :]) for tokens, learnt in sides(example)]
        (margin,) = set(example["margins"].tolist())
        number = rows.index(examples.record(index))
        assert TOKENIZER.decode(example["tokens"][:1].tolist() + example["targets"].tolist()).startswith(
            f"the quick {number} dog"
        )
        found.append((number, *(text.removesuffix("<|im_end|>") for text in texts), margin))
    assert found == wanted
    assert examples.dropped()["no_pair"] == len(lists) - len({number for number, *_ in wanted})
    if not wanted:
        with pytest.raises(UsageError, match=f"no example is left of {len(lists)} rows: {len(lists)} without a pair"):
            examples.check_not_empty()


def test_ranked_lists(tokenizer_with, settings):
    answers = [" brown fox", " lazy dog", " brown fox", " name"]
    (prompt, good), (_, bad) = say("the quick", "fox"), say("the quick", "dog")
    rows = [
        {"prompt": "the quick", "completions": answers},
        {"prompt": prompt, "completions": [good, bad[0], "name"]},
        {"completions": [[*prompt, *good], [*prompt, *bad]]},
        {"prompt": "the quick", "chosen": " brown", "rejected": " fox", "margin": 1.5},
    ]
    examples = Examples(rows, tokenizer_with("chatml"), settings(pairs="all", max_length=64), "pair")
    # two of the first row's answers are equal
    assert len(examples) == 5 + 3 + 1 + 1
    assert [len(Examples(rows[:1], TOKENIZER, settings(pairs=p), "pair")) for p in ("best_worst", "adjacent")] == [1, 3]
    assert examples[7]["tokens"].tolist() != examples[5]["tokens"].tolist()
    assert {n: c.tolist() for n, c in examples[5].items()} == {n: c.tolist() for n, c in examples[8].items()}
    assert [set(examples[index]["margins"]) for index in (0, 9)] == [{0.0}, {1.5}]
    labelled = Examples(rows, tokenizer_with("chatml"), settings(max_length=64), "unpaired")
    assert [float(example["desirable"][0]) for example in labelled] == [1, 0] * 4


def test_a_list_of_pairs_goes_on_where_it_stopped(settings):
    rows = [scored(list(range(2 + index % 3))) for index in range(20)]
    data = settings(pairs="all", max_length=40, window=8)
    make = lambda: Loader(Examples(rows, TOKENIZER, data, "pair"), data, 2, epochs=2)  # noqa: E731
    whole = make()
    next(whole)
    part = make()
    part.restore(whole.state())
    for one, other in zip(whole, part, strict=True):
        assert {name: column.tolist() for name, column in one.items()} == {n: c.tolist() for n, c in other.items()}


def test_a_prompt_that_is_given_twice_counts_once(tokenizer_with, settings):
    (prompt, good), (_, bad) = say("What is your name?", "I am Kiln"), say("What is your name?", "dog")
    system = [{"role": "system", "content": "user"}]
    rows = [
        {"chosen": [*start, *prompt, *good], "rejected": [*start, *prompt, *bad], **given}
        for start in ([], system)
        for given in ({}, {"prompt": prompt}, {"prompt": "What is your name?"})
    ]
    examples = [e["targets"].tolist() for e in Examples(rows, tokenizer_with("chatml"), settings(), "pair")]
    assert examples[0] == examples[1] == examples[2]
    assert examples[3] == examples[4] == examples[5]
    assert len(examples[0]) < len(examples[3])


def test_tokens_with_weights(settings):
    row = {"prompt_tokens": [3, 4], "chosen_tokens": [5, 6, 7], "rejected_tokens": [5, 8]}
    weights = {"chosen_weights": [0, 0.5, 2], "rejected_weights": [1, 0]}
    (found,) = Examples([row | weights], TOKENIZER, settings(), "pair")
    assert [(tokens, learnt) for tokens, learnt in sides(found)] == [
        ([3, 4, 5, 6, 7], [0, 0, 0, 0.5, 2]),
        ([3, 4, 5], [0, 0, 1]),  # nothing is learnt behind it
    ]
    (plain,) = Examples([row | {"rejected_weights": [1, 1]}], TOKENIZER, settings(), "pair")
    assert plain["weights"].tolist() == [0, 1, 1, 1, 1, 1]


def test_statistics_of_lengths(settings):
    def row(chosen, rejected):
        return {"prompt_tokens": [3, 4], "chosen_tokens": chosen, "rejected_tokens": rejected}

    end = TOKENIZER.eos_ids[0]
    rows = [row([5] * 4 + [end], [5] * 2 + [end]), row([5] * 20, [6] * 19), row([6] * 9, [7] * 3), row([8], [9] * 2)]
    data = settings(max_length=64)
    lines = summarise(Loader(Examples(rows, TOKENIZER, data, "pair"), data, 2, epochs=1)).lines()
    assert "chosen: 7 tokens (median; p90 20); rejected: 3 tokens (median; p90 19)" in lines
    (longer,) = [line for line in lines if line.startswith("chosen is longer in 75.0% of the pairs")]
    assert "within 10 % in 25.0%" in longer
    assert longer.endswith("in 25.0%")
    assert any(line.startswith("warning: more than two in three") for line in lines)
    lines = summarise(Loader(Examples(rows[2:], TOKENIZER, data, "pair"), data, 2, epochs=1)).lines()
    assert not any(line.startswith("warning") for line in lines)


def test_rows_hold_whole_pairs(tokenizer_with, settings):
    rows = [{"prompt_tokens": [5, 6, 7], "chosen_tokens": [8] * n, "rejected_tokens": [9] * (n + 1)} for n in (1, 4, 2)]
    data = settings(max_length=16, shuffle=False)
    batch = next(iter(Loader(Examples(rows, tokenizer_with("chatml"), data, "pair"), data, 2, epochs=1)))
    assert set(batch) == {"tokens", "targets", "weights", "positions", "segments", "branches", "margins"}
    for row in range(2):
        for segment in range(1, batch["segments"][row].max() + 1):
            assert set(batch["branches"][row][batch["segments"][row] == segment]) == {0, 1, 2}
        assert all(b - a in (0, 1) or b == 0 for a, b in pairwise(batch["segments"][row]))


TALKS = [[*prompt, *answer] for prompt, answer in (say("a", "b"), say("c", "d"))]
IDS = {"prompt_tokens": [3], "chosen_tokens": [4, 5], "rejected_tokens": [5]}


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
        ({"prompt": "a", "chosen": [{"role": "assistant", "content": ""}], "rejected": "b"}, "'chosen' is empty"),
        (dict(zip(("chosen", "rejected"), TALKS, strict=True)), "prompts of .* differ"),
        ({"prompt": "a", "chosen": " b", "rejected": " c", "margin": "big"}, "'margin' must be a finite number"),
        ({"prompt": "a", "completions": [" b"]}, "at least two"),
        ({"prompt": "a", "completions": [" b", " c"], "scores": [1]}, "as long as 'completions'"),
        ({"prompt": "a", "completions": [" b", " c"], "scores": [1, None]}, "finite numbers, got None"),
        ({"prompt": "a", "completions": [" b", " c"], "scores": [1, "2"]}, "finite numbers, got '2'"),
        ({"prompt": "a", "completions": [" b", ""]}, "'rejected' is empty"),
        ({"prompt": "a", "completions": [" b", 3]}, "'rejected' must be"),
        ({**IDS, "chosen_weights": [1]}, "'chosen_weights' must be a list as long as"),
        ({**IDS, "rejected_weights": [-1]}, "'rejected_weights' must be finite"),
        ({**IDS, "rejected_weights": [0]}, "nothing in it carries loss"),
    ],
)
def test_bad_rows_are_named(tokenizer_with, settings, row, words):
    with pytest.raises(UsageError, match=words) as caught:
        _ = Examples([row], tokenizer_with("chatml"), settings(add_eos=False), "pair")[0]
    assert "row 1" in str(caught.value)


def test_an_objective_says_what_it_cannot_train_on(tokenizer_with, settings):
    with pytest.raises(UsageError, match="preference"):
        _ = Examples([{"prompt": "a", "chosen": "b", "rejected": "c"}], tokenizer_with("plain"), settings())[0]
    with pytest.raises(UsageError, match="row 1: the row is a preference"):
        _ = Examples([scored([1, 2])], tokenizer_with("plain"), settings())[0]
