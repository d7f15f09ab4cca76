"""Make beam.npz and beam.json: transformers' greedy and beam search with SmolLM2-135M-Instruct. Extra `parity`.

    python -m tests.golden.make_beam FOLDER

FOLDER: as for make_smollm2.py. Four minutes on one core, because the beam searches share what the model computed: their
27 configurations meet the same sequences over and over. Every search is also run by tests/decode/reference.py over the
very log-probs that transformers saw: that must give the same beams, and tells how close a decision was.
"""

import json
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from tests.decode import reference
from tests.golden.make_smollm2 import OPENINGS, QUESTIONS

STEPS, NEW = 64, 24  # tokens of greedy and of beam search
TIE = 2e-4
BEAMS, PENALTIES, STOPPINGS = (2, 4, 8), (0.6, 1.0, 2.0), (True, False, "never")

MORE = [  # greedy only, besides make_smollm2's
    ("chat", "List five European rivers."),
    ("chat", "Translate to French: good morning."),
    ("chat", "Is 17 a prime number? Answer briefly."),
    ("text", "The Industrial Revolution began in Britain in the late eighteenth century, when"),
    ("text", "def quicksort(xs):\n"),
    ("text", "Shopping list:\n- milk\n- bread\n-"),
    ("text", "SELECT name, population FROM cities WHERE"),
    ("text", "Q: What is 7 times 8?\nA:"),
    ("text", "<html>\n<head>\n<title>"),
    ("text", "My grandmother used to say that"),
]
SEARCHED = [  # beam search; short answers that end, and text that does not
    ("chat", "What is the capital of France?"),
    ("text", "Once upon a time"),
    ("chat", "Say hello."),
    ("text", "def is_prime(n):\n    if n < 2:\n        return False\n"),
    ("chat", "Which is larger, the Earth or the Moon? Answer in one short sentence, without any explanation."),
]
BANNED = [" Paris", " the", "Hello", " upon a", " is the"]  # texts of one or more tokens


def main(folder: str) -> None:
    """Run the oracle and write both files beside this one."""
    torch.set_num_threads(1)  # on busy cores two wait for each other a hundred times longer than they compute
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    arrays: dict[str, np.ndarray] = {}
    about: dict[str, Any] = {
        "made_with": {"transformers": transformers.__version__, "torch": torch.__version__, "dtype": "float32"},
        "new_tokens": NEW,
        "unstable_means": "other tokens with float64 weights and activations; "
        "transformers keeps log-probs and scores of beams in float32",
    }

    old, last = np.load(Path(__file__).parent / "smollm2.npz"), len(QUESTIONS) + len(OPENINGS)
    kinds = [("chat", q) for q in QUESTIONS] + [("text", t) for t in OPENINGS] + MORE
    about["greedy_prompts"] = [write_out(tokenizer, *kind) for kind in kinds]
    rows = [tokenizer(text)["input_ids"] for text in about["greedy_prompts"]]
    about["greedy_near_ties"] = greedy(arrays, model, rows)
    for i in range(last):  # the same as before
        n = arrays["greedy_alone_lengths"][i]
        assert arrays["greedy_alone_tokens"][i, :n].tolist() == old[f"greedy{i}"].tolist()

    about["prompts"] = [write_out(tokenizer, *kind) for kind in SEARCHED]
    prompts = [tokenizer(text)["input_ids"] for text in about["prompts"]]
    about["configurations"] = list(product(PENALTIES, STOPPINGS))
    stop = tokenizer(".")["input_ids"]
    assert len(stop) == 1
    processors = {
        "repetition_penalty": {"repetition_penalty": 1.3},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 3},
        "min_new_tokens": {"min_new_tokens": 12},
        "bad_words_ids": {"bad_words_ids": [tokenizer(text)["input_ids"] for text in BANNED]},
        "two ends": {"eos_token_id": [tokenizer.eos_token_id, *stop]},
    }
    processors["all"] = {key: value for options in processors.values() for key, value in options.items()}
    about["processors"] = processors

    whole = search(model, prompts, {"num_beams": 4})  # really as one padded batch
    single, double = ({}, {})
    about["near_ties"] = beams_of_all(single, Remembering(model), prompts, processors)
    for p, found in enumerate(whole):
        at = 4, p  # penalty 1.0, early_stopping False
        assert found.tokens == unpack(single["beams4_tokens"][at], single["beams4_lengths"][at])
        np.testing.assert_allclose(found.scores, single["beams4_scores"][at], rtol=0, atol=1e-5)
    beams_of_all(double, Remembering(model.double()), prompts, processors)
    about["unstable"] = [
        {"beams": name.removesuffix("_tokens"), "configuration": c, "prompt": p}
        for name in single
        if name.endswith("_tokens")
        for c, p in np.argwhere((single[name] != double[name]).any((2, 3))).tolist()
    ]
    off = [np.abs(single[name] - double[name]) for name in single if name.endswith("_scores")]
    about["float32_off_by"] = float(max(x.max() for x in off))
    arrays |= single
    here = Path(__file__).parent
    np.savez_compressed(here / "beam.npz", **arrays)  # type: ignore[arg-type]
    (here / "beam.json").write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: about[k] for k in ("greedy_near_ties", "near_ties", "unstable", "float32_off_by")}, indent=1))


class Remembering(LlamaForCausalLM):
    """Generates like `real`, which computes what follows a sequence once, from the keys and values of its parts."""

    def __init__(self, real: Any) -> None:
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        super().__init__(LlamaConfig(vocab_size=real.config.vocab_size, **sizes))
        self.generation_config = real.generation_config
        self.real = [real]  # in a list: not a submodule
        self.known: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}  # logits, keys and values [L,2,K,T,H]
        self.begun: set[tuple[int, ...]] = set()  # those read whole

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> CausalLMOutput:
        """The last position's logits; use_cache must be off, so that input_ids are whole sequences."""
        if attention_mask is None:  # transformers drops a mask of ones
            attention_mask = torch.ones_like(input_ids)
        rows = [tuple(ids[mask > 0].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        lengths: dict[int, list[tuple[int, ...]]] = {}
        for row in dict.fromkeys(rows):
            if row not in self.known:
                lengths.setdefault(len(row), []).append(row)
        for group in lengths.values():
            for first in {self.beginning(row) for row in group}:
                self.read(first, [row for row in group if self.beginning(row) == first])
        return CausalLMOutput(logits=torch.stack([self.known[row][0] for row in rows])[:, None])

    def beginning(self, row: tuple[int, ...]) -> tuple[int, ...]:
        """The prompt that a sequence grew from, or itself."""
        while row not in self.begun:
            if row[:-1] not in self.known:
                return row
            row = row[:-1]
        return row

    @torch.no_grad()
    def read(self, first: tuple[int, ...], rows: list[tuple[int, ...]]) -> None:
        """Compute what follows these rows of one length, all with the same beginning."""
        cache, real = DynamicCache(), self.real[0]
        if first == rows[0]:
            self.begun.add(first)
            past, new = 0, first
        else:
            past, new = len(first), rows[0][-1:]
            parts = [[self.known[row[:n]][1] for n in range(past, len(row))] for row in rows]
            for layer, (k, v) in enumerate(
                zip(*torch.stack([torch.cat(part, 3) for part in parts], 2).unbind(1), strict=True)
            ):
                cache.update(k, v, layer)
            past = len(rows[0]) - 1
        ids = torch.tensor([row[past:] for row in rows])
        out = real(ids, cache=cache, position_ids=torch.arange(past, past + len(new))[None], use_cache=True)
        for i, row in enumerate(rows):
            state = [torch.stack([layer.keys[i, :, past:], layer.values[i, :, past:]]) for layer in cache.layers]
            self.known[row] = out.logits[i, -1].clone(), torch.stack(state)


def write_out(tokenizer: Any, kind: str, text: str) -> str:
    """A question through the chat template; other text as it is."""
    if kind == "text":
        return text
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )


def left_pad(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """One batch padded on the left, with its attention mask."""
    longest = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), longest), 2), torch.zeros(len(prompts), longest, dtype=torch.long)
    for i, row in enumerate(prompts):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def greedy(arrays: dict[str, np.ndarray], model: Any, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Each prompt alone, then all in one batch; [prompts, STEPS] tokens and how far the best logit was ahead."""
    ties = []
    for kind, batches in (("alone", [[row] for row in prompts]), ("batch", [prompts])):
        tokens = np.zeros((len(prompts), STEPS), np.uint16)
        gaps, lengths, at = np.zeros((len(prompts), STEPS), np.float32), np.zeros(len(prompts), np.uint8), 0
        for rows in batches:
            out = model.generate(
                **left_pad(rows), do_sample=False, max_new_tokens=STEPS, return_dict_in_generate=True,
                output_logits=True,
            )  # fmt: skip
            best = torch.stack(out.logits, 1).topk(2).values
            for i in range(len(rows)):
                new = out.sequences[i, out.sequences.shape[1] - len(out.logits) :].tolist()
                n = new.index(2) + 1 if 2 in new else len(new)
                tokens[at, :n], lengths[at], gaps[at, :n] = new[:n], n, (best[i, :n, 0] - best[i, :n, 1]).numpy()
                ties += [
                    {"kind": kind, "prompt": at, "step": j, "gap": float(gaps[at, j])}
                    for j in range(n)
                    if gaps[at, j] < TIE
                ]
                at += 1
        arrays |= {f"greedy_{kind}_tokens": tokens, f"greedy_{kind}_lengths": lengths, f"greedy_{kind}_gaps": gaps}
    return ties


def beams_of_all(
    arrays: dict[str, np.ndarray], model: Any, prompts: list[list[int]], processors: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """`beams{K}` [configurations, prompts, K, NEW] and `processors` [chains, prompts, 4, NEW]; the close decisions."""
    close: list[dict[str, Any]] = []
    for beams in BEAMS:
        results, begin = [], time.perf_counter()
        for penalty, stopping in product(PENALTIES, STOPPINGS):
            options = {"num_beams": beams, "length_penalty": penalty, "early_stopping": stopping}
            results.append(search(model, prompts, options))
        ended = {stopped for found in results for one in found for stopped in one.stopped}
        assert ended == {True, False}, "some must end and some must not"
        close += keep(arrays, f"beams{beams}", results)
        print(f"{beams} beams: {time.perf_counter() - begin:.0f} s", flush=True)
    for few in (1, 3):  # fewer results are the first ones
        out = model.generate(
            **left_pad(prompts), num_beams=4, num_return_sequences=few, max_new_tokens=NEW, use_cache=False
        )
        for i, row in enumerate(out[:, max(map(len, prompts)) :].tolist()):
            at = 4, i // few
            expected = unpack(arrays["beams4_tokens"][at], arrays["beams4_lengths"][at])[i % few]
            assert row[: len(expected)] == expected
    # alone: to transformers, padding is a token of the prompt that a processor counts
    results = [
        [search(model, [prompt], {"num_beams": 4, **options})[0] for prompt in prompts]
        for options in processors.values()
    ]
    close += keep(arrays, "processors", results)
    return close


def search(model: Any, prompts: list[list[int]], options: dict[str, Any]) -> list[reference.Found]:
    """transformers' beams of one batch; the reference must agree, and adds the margin."""
    seen: list[np.ndarray] = []  # the running beams at each step

    def watch(*args: Any, running_sequences: torch.Tensor, cur_len: int, **rest: Any) -> Any:
        seen.append(running_sequences[:, :, start:cur_len].numpy().copy())
        return original(*args, running_sequences=running_sequences, cur_len=cur_len, **rest)

    batch, beams = left_pad(prompts), options["num_beams"]
    start, original = batch["input_ids"].shape[1], model._get_top_k_continuations
    model._get_top_k_continuations = watch
    try:
        out = model.generate(
            **batch, **options, do_sample=False, max_new_tokens=NEW, num_return_sequences=beams,
            return_dict_in_generate=True, output_scores=True, use_cache=not isinstance(model, Remembering),
        )  # fmt: skip
    finally:
        del model._get_top_k_continuations
    logprobs = {  # every sequence that ran: the processed log-probs of what follows
        (i, *tokens.tolist()): scores[i * beams + j]
        for running, scores in zip(seen, out.scores, strict=True)
        for i, rows in enumerate(running)
        for j, tokens in reversed(list(enumerate(rows)))
    }
    lengths = (out.beam_indices >= 0).sum(1).tolist()
    sequences = [row[start : start + n].tolist() for row, n in zip(out.sequences, lengths, strict=True)]
    found = []
    for i, prompt in enumerate(prompts):
        ends = options.get("eos_token_id", [2])

        def process(tokens: list[int], _: np.ndarray, i: int = i, prompt: list[int] = prompt) -> np.ndarray:
            return logprobs[i, *tokens[len(prompt) :]].double().numpy()

        result = reference.beam_search(
            lambda tokens: np.zeros(1), prompt, num_beams=beams, max_new_tokens=NEW, eos_ids=ends, process=process,
            length_penalty=options.get("length_penalty", 1.0), early_stopping=options.get("early_stopping", False),
        )  # fmt: skip
        rows = slice(i * beams, (i + 1) * beams)
        scores = out.sequences_scores[rows].tolist()
        if result.margin > 1e-5:
            assert result.tokens == sequences[rows], (options, i, result.margin)
            np.testing.assert_allclose(result.scores, scores, rtol=0, atol=1e-5)
        else:
            print("float32 may decide otherwise:", options, i, result.margin, result.tokens == sequences[rows])
        result.tokens, result.scores = sequences[rows], scores
        result.stopped = [row[-1] in ends for row in sequences[rows]]
        found.append(result)
    return found


def unpack(tokens: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    """[beams, NEW] without what fills it up."""
    return [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]


def keep(arrays: dict[str, np.ndarray], name: str, results: list[list[reference.Found]]) -> list[dict[str, Any]]:
    """Pack [configurations][prompts] into arrays; which of them have a close decision."""
    beams = len(results[0][0].tokens)
    shape = (len(results), len(results[0]), beams)
    tokens, lengths = np.zeros((*shape, NEW), np.uint16), np.zeros(shape, np.uint8)
    scores, close = np.zeros(shape, np.float32), []
    for c, row in enumerate(results):
        for p, found in enumerate(row):
            for b, new in enumerate(found.tokens):
                tokens[c, p, b, : len(new)], lengths[c, p, b] = new, len(new)
            scores[c, p] = found.scores
            if found.margin < TIE:
                close.append({"beams": name, "configuration": c, "prompt": p, "margin": found.margin})
    arrays |= {f"{name}_tokens": tokens, f"{name}_lengths": lengths, f"{name}_scores": scores}
    return close


if __name__ == "__main__":
    main(sys.argv[1])
