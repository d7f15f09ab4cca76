"""purestep generate, score and chat on a tiny model's folder."""

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from configs.errors import UsageError
from decode.chat import run_chat
from decode.generate import Sampling, generate
from decode.score import perplexity, score
from train.cli import app


@pytest.fixture(autouse=True)
def _cache_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("sharding.compile_cache.enable_compilation_cache", lambda: None)


def run(*args, input=None):
    result = CliRunner().invoke(app, [str(a) for a in args], input=input)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def rows_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_generate_rows(tiny, tiny_folder, tmp_path):
    messages = [{"role": "user", "content": "Hi"}]
    given = [{"prompt": "The sky"}, {"messages": messages}, {"tokens": [5, 6, 7]}]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in given))
    options = ["--max-new-tokens", 6, "--temperature", 0.9, "--top-p", 0.9, "--seed", 3, "--num-return-sequences", 2]
    assert run("generate", tiny_folder, "--input", source, "--output", target, *options) == ""
    out = rows_of(target.read_text(encoding="utf-8"))
    sampling = Sampling(6, temperature=0.9, top_p=0.9, seed=3, num_return_sequences=2)
    expected = generate(tiny, ["The sky", messages, [5, 6, 7]], sampling)
    assert [list(row) for row in out] == [["completions"]] * 3
    flat = [c for row in out for c in row["completions"]]
    assert [list(c) for c in flat] == [["tokens", "text", "logprobs", "score", "finish_reason"]] * 6
    for c, e in zip(flat, expected, strict=True):
        assert (c["tokens"], c["text"], c["finish_reason"]) == (e.tokens, e.text, e.finish_reason)
        assert c["logprobs"] == pytest.approx(e.logprobs, abs=1e-5)
        assert c["score"] == pytest.approx(sum(c["logprobs"]))


def test_generate_arguments_and_standard_input(tiny, tiny_folder):
    short = ["--max-new-tokens", 4]
    asked = [[{"role": "system", "content": "Be"}, {"role": "user", "content": text}] for text in ("Hi", "You")]
    expected = generate(tiny, [asked[0], asked[1]], Sampling(4))
    lines = rows_of(run("generate", tiny_folder, "Hi", "You", "--system", "Be", "--json", *short))
    assert [row["completions"][0]["tokens"] for row in lines] == [c.tokens for c in expected]
    raw = generate(tiny, ["Hi\n you"], Sampling(4))[0]
    (line,) = rows_of(run("generate", tiny_folder, "--raw", "--json", *short, input="Hi\n you\n"))
    assert line["completions"][0]["tokens"] == raw.tokens
    assert run("generate", tiny_folder, "--raw", *short, input="Hi\n you\n") == raw.text + "\n"


def test_beams_as_json(tiny, tiny_folder):
    asked = ["--num-beams", 4, "--num-return-sequences", 4, "--length-penalty", 0.6, "--early-stopping", "never"]
    (line,) = rows_of(run("generate", tiny_folder, "--raw", "--json", "--max-new-tokens", 6, *asked, "The sky"))
    sampling = Sampling(6, num_beams=4, num_return_sequences=4, length_penalty=0.6, early_stopping="never")
    expected = generate(tiny, ["The sky"], sampling)
    assert [c["tokens"] for c in line["completions"]] == [c.tokens for c in expected]
    assert [c["score"] for c in line["completions"]] == pytest.approx([c.score for c in expected], abs=1e-5)
    assert len({tuple(c["tokens"]) for c in line["completions"]}) == 4


def test_every_kind_of_option_arrives(tiny, tiny_folder):
    options = ["--logit-bias", "5=3", "--logit-bias", "6=-2.5", "--bad-words-ids", "7,8", "--suppress-token", 9,
               "--suppress-token", 10, "--stop-token-id", 11, "--stop", "zz", "--stop", "qq", "--best-of", 3,
               "--exponential-decay-length-penalty", "2,1.5", "--temperature", 0.7, "--logprobs", 2,
               "--prompt-logprobs", "--cache-dtype", "int8", "--echo", "--seed", 4]  # fmt: skip
    (line,) = rows_of(run("generate", tiny_folder, "--raw", "--json", "--max-new-tokens", 8, *options, "The sky"))
    sampling = Sampling(
        8, logit_bias={5: 3.0, 6: -2.5}, bad_words_ids=((7, 8),), suppress_tokens=(9, 10), stop_token_ids=(11,),
        stop=("zz", "qq"), best_of=3, exponential_decay_length_penalty=(2, 1.5), temperature=0.7, logprobs=2,
        prompt_logprobs=True, echo=True, seed=4,
    )  # fmt: skip
    (expected,) = generate(tiny, ["The sky"], sampling, cache_dtype="int8")
    (found,) = line["completions"]
    assert (found["tokens"], found["text"]) == (expected.tokens, expected.text)
    assert [list(map(int, place)) for place in found["top_logprobs"]] == [list(p) for p in expected.top_logprobs]
    assert found["prompt_tokens"] == expected.prompt_tokens
    assert found["prompt_logprobs"] == pytest.approx(expected.prompt_logprobs, abs=1e-5)


def test_contradictions_are_refused_before_loading(tmp_path):
    rows = tmp_path / "in.jsonl"
    rows.write_text('{"prompt": "a"}\n')
    for args, words in (
        (["generate", "none", "--input", rows, "text"], "--input is given"),
        (["generate", "none", "--input", rows, "--chat"], "--input is given"),
        (["generate", "none", "a", "--top-p", "1.5"], "top_p is 1.5"),
        (["generate", "none", "a", "--num-beams", "2", "--num-return-sequences", "3"], "num_return_sequences is 3"),
        (["generate", "none", "a", "--logit-bias", "5"], "logit_bias is"),
        (["generate", "none", "a", "--stop", ""], "stop is"),
        (["generate", "none", "a", "--early-stopping", "soon"], "early_stopping is"),
        (["generate", "none", "a", "-o", tmp_path / "no" / "out.jsonl"], "cannot be written"),
        (["score", "none"], "either TEXTS or --input"),
        (["score", "none", "a", "--input", rows], "either TEXTS or --input"),
        (["chat", "none", "--temperature", "-1"], "temperature is -1"),
        (["generate", "no-such-model", "a"], "no-such-model"),
    ):
        with pytest.raises(UsageError, match=words):
            run(*args)


def test_score(tiny, tiny_folder, tmp_path):
    given = [{"text": "The sky"}, {"tokens": [5, 6, 7]}, {"tokens": [1]}]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in given))
    assert run("score", tiny_folder, "--input", source, "--output", target) == ""
    out = rows_of(target.read_text(encoding="utf-8"))
    expected = score(tiny, ["The sky", [5, 6, 7], [1]])
    assert [list(row) for row in out] == [["tokens", "logprobs"]] * 3
    for row, e in zip(out, expected, strict=True):
        assert row["tokens"] == e.tokens
        assert row["logprobs"] == pytest.approx(e.logprobs, abs=1e-5)
        assert len(row["logprobs"]) == len(row["tokens"]) - 1
    name, value, *rest = run("score", tiny_folder, "The sky").split()
    assert [name, *rest] == ["perplexity", "6", "predicted", "tokens"]
    assert float(value) == pytest.approx(perplexity(expected[:1]), rel=1e-4)


def test_chat_keeps_history_and_obeys_commands(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr("decode.chat.stream", lambda model, prompt, sampling, memory: answer(model, prompt))

    def answer(model, prompt):
        asked.append(model.tokenizer.decode(prompt))
        yield "[b]fine"
        return generate(model, [[1]], Sampling(2))[0]

    lines = ["Hi", "And?", "/retry", "/clear", "One", "/system Be brief.", "Two", "/what", "", "/exit", "never"]
    console = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(console, "input", lambda prompt: lines.pop(0))
    run_chat(tiny, Sampling(4), None, console)
    turn = "<|s|>{}\n{}<|e|>".format
    start = "<|s|>assistant\n"
    hi = turn("user", "Hi") + turn("assistant", "[b]fine") + turn("user", "And?") + start
    assert asked == [
        turn("user", "Hi") + start, hi, hi, turn("user", "One") + start,
        turn("system", "Be brief.") + turn("user", "Two") + start,
    ]  # fmt: skip
    assert lines == ["never"]
    shown = console.file.getvalue()
    assert "[b]fine" in shown
    assert "unknown command /what" in shown


def test_chat_streams_ends_with_the_input_and_says_when_the_context_is_full(tiny, tiny_folder):
    out = run("chat", tiny_folder, "--temperature", 0, "--max-new-tokens", 6, input="Hi\nWhy\n" + "a" * 200 + "\nHi\n")
    first = generate(tiny, [[{"role": "user", "content": "Hi"}]], Sampling(6))[0]
    assert first.text.strip("\ufffd") in out
    assert "context" in out
    assert out.count("/s\n") == 3
