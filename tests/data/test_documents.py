"""Documents in rows: cut, joined, masked or not; nothing is lost or learnt twice; fill in the middle."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.data import Data
from configs.errors import UsageError
from data.examples import Examples, encode_form, fit
from data.fim import SPELLINGS, fim_tokens, rearrange
from data.loader import Loader
from data.pack import fill_pieces, pack_rows


def document(tokens):
    """An example of so many tokens, each its own number and weight, to be recognised."""
    return {"tokens": np.asarray(tokens, np.int32), "weights": np.asarray(tokens, np.float32)}


def rows_of(sizes, **given):
    """The rows of documents of `sizes` tokens, whose tokens count on from document to document."""
    data = Data(train=("x",), **{"packing": "concat", "max_length": 8, "truncation": "split", **given})
    ends = np.cumsum(sizes)
    documents = [document(np.arange(end - size, end) + 1) for size, end in zip(sizes, ends, strict=True)]
    plan = pack_rows([max(size - 1, 0) for size in sizes], data, None if not data.shuffle else 3)
    return documents, [fill_pieces(row, [documents[p.number] for p in row], data) for row in plan]


SIZES = st.lists(st.integers(2, 30), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(2, 12), st.sampled_from(["concat", "best_fit", "none"]), st.booleans())
def test_every_prediction_once(sizes, length, packing, shuffle):
    """With masks: each token but the first of each document is a target once, after the token before it."""
    documents, rows = rows_of(sizes, max_length=length, packing=packing, shuffle=shuffle)
    found = {}
    for row in rows:
        inside = row["segments"] > 0
        assert row["tokens"].shape == (length,)
        for token, target, weight in zip(*(row[n][inside] for n in ("tokens", "targets", "weights")), strict=True):
            assert target not in found
            assert weight == target
            found[int(target)] = int(token)
    wanted = {int(b): int(a) for one in documents for a, b in zip(one["tokens"], one["tokens"][1:], strict=False)}
    assert found == wanted
    if packing == "concat":
        assert all((row["segments"] > 0).all() for row in rows[:-1]) or shuffle
        assert len(rows) == -(-sum(size - 1 for size in sizes) // length)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(2, 12), st.booleans())
def test_one_stream_of_tokens(sizes, length, shuffle):
    """Without masks: rows are the whole stream, each of whose tokens but the first is predicted once, too."""
    _, rows = rows_of(sizes, max_length=length, document_mask=False, shuffle=shuffle)
    found = {}
    for row in rows:
        inside = row["segments"] > 0
        assert set(row["segments"]) <= {0, 1}
        assert row["positions"][inside].tolist() == list(range(inside.sum()))
        found |= dict(zip(row["targets"][inside].tolist(), row["tokens"][inside].tolist(), strict=True))
    assert found == {number + 1: number for number in range(1, sum(sizes))}


def test_positions_may_run_through_the_row():
    _, restarted = rows_of([5, 4, 9], shuffle=False)
    assert restarted[0]["positions"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    _, running = rows_of([5, 4, 9], shuffle=False, reset_positions=False)
    assert running[0]["positions"].tolist() == list(range(8))
    assert restarted[0]["segments"].tolist() == running[0]["segments"].tolist() == [1, 1, 1, 1, 2, 2, 2, 3]


def test_a_document_that_goes_on_starts_at_position_0():
    _, rows = rows_of([20], packing="best_fit")
    assert sorted(int((row["segments"] > 0).sum()) for row in rows) == [3, 8, 8]
    for row in rows:
        assert row["positions"][0] == 0


def test_only_texts_are_cut_or_joined(tokenizer_with):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    for key, value in (("packing", "concat"), ("truncation", "split"), ("document_mask", False)):
        with pytest.raises(UsageError, match=f"data.{key}={str(value).lower()} cuts or joins texts"):
            Examples(rows, tokenizer_with("chatml"), Data(train=("x",), **{key: value}), "pair")


@pytest.mark.parametrize("given", [{"packing": "concat"}, {"truncation": "split"}])
def test_long_documents_stay_whole_until_they_are_packed(tokenizer_with, given):
    data = Data(train=("x",), max_length=8, prefetch=0, shuffle=False, **given)
    rows = [{"tokens": list(range(3, 43))}, {"tokens": [50, 51, 52]}]
    loader = Loader(Examples(rows, tokenizer_with("chatml"), data), data, 2, epochs=1)
    targets = np.concatenate([b["targets"][b["segments"] > 0] for b in loader])
    assert sorted(targets.tolist()) == [*range(4, 43), 51, 52]
    assert fit(document(range(3, 43)), data)[1] == ""


@pytest.fixture
def fim_tokenizer(tokenizer_with):
    """A tokenizer with the three special tokens, beyond its vocabulary."""
    backend = tokenizer_with("chatml")
    special = dict(zip(SPELLINGS[0], (10**6, 10**6 + 1, 10**6 + 2), strict=True))
    return SimpleNamespace(
        encode=backend.encode, decode=backend.decode, prefix=backend.prefix, eos_ids=backend.eos_ids,
        special_tokens={**backend.special_tokens, **special}, encode_with_offsets=backend.encode_with_offsets,
    )  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(min_size=0, max_size=40), seed=st.integers(0, 9), spm=st.sampled_from([0.0, 1.0]))
def test_fill_in_the_middle_is_the_text_again(fim_tokenizer, text, seed, spm):
    ids = rearrange(text, fim_tokenizer, 1.0, spm, seed)
    assert ids is not None
    assert ids == rearrange(text, fim_tokenizer, 1.0, spm, seed)
    pre, mid, suf = fim_tokens(fim_tokenizer)
    at = {name: ids.index(token) for name, token in (("pre", pre), ("mid", mid), ("suf", suf))}
    if spm:
        assert (at["pre"], at["suf"]) == (0, 1)
        suffix, rest = ids[2 : at["mid"]], ids[at["mid"] + 1 :]
        assert fim_tokenizer.decode(rest) + fim_tokenizer.decode(suffix) == text
    else:
        prefix, suffix, middle = ids[1 : at["suf"]], ids[at["suf"] + 1 : at["mid"]], ids[at["mid"] + 1 :]
        assert "".join(map(fim_tokenizer.decode, (prefix, middle, suffix))) == text


def test_the_share_of_rearranged_texts(fim_tokenizer, tokenizer_with):
    data = Data(train=("x",), fim_rate=0.5)
    made = [encode_form({"text": f"number {i} of many"}, fim_tokenizer, data) for i in range(200)]
    count = sum(10**6 in example["tokens"] for example in made)
    assert 70 < count < 130
    assert all(example["tokens"][-1] == fim_tokenizer.eos_ids[0] for example in made)
    with pytest.raises(UsageError, match=r"the tokenizer has no tokens for it, such as <.fim_prefix.>"):
        encode_form({"text": "a text"}, tokenizer_with("chatml"), data.model_copy(update={"fim_rate": 1.0}))
