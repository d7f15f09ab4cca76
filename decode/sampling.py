"""Every decoding parameter, checked: names, meanings and defaults of transformers' generate and of the OpenAI API.

Imports nothing heavy: the command line makes its options from these fields.
"""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any

from configs.errors import UsageError

SEEDS = 1 << 32
Ids = tuple[int, ...]
Check = tuple[Callable[[Any], bool], str]  # is a value fine, and what is


def whole(least: int, off: bool = False) -> Check:
    """A whole number of at least so much, or 0 where that means off."""
    fine = lambda x: isinstance(x, int) and not isinstance(x, bool) and (x >= least or (off and x == 0))  # noqa: E731
    return fine, f"{least} or more" + (", or 0 for off" if off else "")


def number(fine: Callable[[float], bool], allowed: str) -> Check:
    """A finite number in a range."""
    return lambda x: isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) and fine(x), allowed


TOKEN = whole(0)[0]
IDS: Check = (lambda x: all(map(TOKEN, x)), "token ids")
SHARE = number(lambda x: 0 < x <= 1, "above 0, at most 1 (off)")
CUTOFF = number(lambda x: 0 <= x < 1, "0 (off), or below 1")
API = number(lambda x: -2 <= x <= 2, "-2 to 2; 0 is off")
FLAG: Check = (lambda x: isinstance(x, bool), "true or false")


def knob(default: Any, check: Check, meaning: str) -> Any:
    """A parameter: its default, its range, and what it does."""
    about = {"check": check, "help": meaning}
    return field(default_factory=dict, metadata=about) if default == {} else field(default=default, metadata=about)


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens and when to stop; temperature 0 = greedy (transformers' do_sample=False), the default.

    num_beams above 1 searches: beams at temperature 0, beam sampling above; penalty_alpha above 0 with top_k above 1 is
    contrastive search.
    """

    max_new_tokens: int | None = knob(None, whole(1), "Longest completion, in tokens; default: by max_length, else 64.")
    _: KW_ONLY
    max_length: int | None = knob(None, whole(1), "Longest prompt and completion together, in tokens.")
    # which tokens are likely
    temperature: float = knob(0.0, number(lambda x: x >= 0, "0 (greedy) or more"), "0 is greedy: the likeliest token.")
    top_k: int = knob(0, whole(1, off=True), "Sample from the k likeliest tokens; 0 is off.")
    top_p: float = knob(1.0, SHARE, "Sample from the likeliest tokens that reach this probability; 1 is off.")
    min_p: float = knob(
        0.0, number(lambda x: 0 <= x <= 1, "0 (off) to 1"), "Least share of the likeliest's probability."
    )
    typical_p: float = knob(1.0, SHARE, "Locally typical sampling with this probability; 1 is off.")
    epsilon_cutoff: float = knob(0.0, CUTOFF, "Least probability of a token; 0 is off.")
    eta_cutoff: float = knob(0.0, CUTOFF, "Eta sampling's epsilon; 0 is off.")
    top_h: float = knob(1.0, SHARE, "Tokens whose entropy is at most this share of the whole; 1 is off.")
    top_n_sigma: float = knob(
        0.0, number(lambda x: x >= 0, "0 (off) or more"), "Logits within n standard deviations of the best; 0 is off."
    )
    # what was said before
    repetition_penalty: float = knob(
        1.0, number(lambda x: x > 0, "above 0; 1 is off, above 1 avoids repetition"), "Of all tokens so far; 1 is off."
    )
    presence_penalty: float = knob(0.0, API, "Subtracted from every new token's logit once it was said; 0 is off.")
    frequency_penalty: float = knob(0.0, API, "Subtracted from a token's logit each time it was said; 0 is off.")
    no_repeat_ngram_size: int = knob(0, whole(1, off=True), "No run of so many tokens comes twice; 0 is off.")
    # what may be said
    logit_bias: dict[int, float] = knob(
        {}, (lambda x: all(map(TOKEN, x)) and all(map(math.isfinite, x.values())), "{token id: finite bias}"),
        "Added to a token's logit.",
    )  # fmt: skip
    bad_words_ids: tuple[Ids, ...] = knob(
        (), (lambda x: all(word and all(map(TOKEN, word)) for word in x), "non-empty tuples of token ids"),
        "Runs of tokens that never come.",
    )  # fmt: skip
    allowed_token_ids: Ids = knob((), IDS, "Only these tokens; none: all.")
    suppress_tokens: Ids = knob((), IDS, "Never these tokens.")
    begin_suppress_tokens: Ids = knob((), IDS, "Not these tokens first.")
    forced_bos_token_id: int | None = knob(None, (TOKEN, "a token id"), "The first token after a prompt of one token.")
    forced_eos_token_id: int | None = knob(None, (TOKEN, "a token id"), "The last token, where the length ends a row.")
    min_new_tokens: int = knob(0, whole(0), "No end of sequence before so many new tokens.")
    min_length: int = knob(0, whole(0), "No end of sequence before prompt and new tokens are so many.")
    exponential_decay_length_penalty: tuple[int, float] | None = knob(
        None, (lambda x: len(x) == 2 and TOKEN(x[0]) and x[1] > 0, "(start, factor above 0)"),
        "START,FACTOR: the end of sequence grows likelier after START new tokens.",
    )  # fmt: skip
    prefix_allowed_tokens: Callable[..., Any] | None = knob(
        None, (callable, "a function (tokens i32[S], length i32[]) -> bool[V]"), "On the device: which tokens may come."
    )
    guidance_scale: float = knob(
        1.0, number(lambda x: x > 0, "above 0; 1 is off"), "Classifier-free guidance; 1 is off."
    )
    negative_prompt: Any = knob(
        None,
        (lambda x: len(x) > 0, "a prompt"),
        "What guidance leads away from; default: the prompt's last token alone.",
    )
    processors: tuple[Callable[..., Any], ...] = knob(
        (), (lambda x: all(map(callable, x)), "functions (logits, context) -> logits"), "Your own, before the warpers."
    )
    # when to stop
    stop: str | tuple[str, ...] = knob(
        (),
        (lambda x: all(isinstance(t, str) and t for t in x), "non-empty strings"),
        "The completion ends before this text.",
    )
    stop_token_ids: Ids = knob((), IDS, "Ends a completion too.")
    ignore_eos: bool = knob(False, FLAG, "Do not stop at the model's end-of-sequence tokens.")
    # how many, and which
    seed: int = knob(0, (lambda x: TOKEN(x) and x < SEEDS, "0 to 2**32 - 1"), "Prompt number i samples with seed + i.")
    num_return_sequences: int = knob(1, whole(1), "Completions per prompt.")
    best_of: int | None = knob(None, whole(1), "Sample so many, return those of the best mean log-prob.")
    # what is told
    logprobs: int = knob(
        0, (lambda x: TOKEN(x) and x <= 1000, "0 to 1000"), "Tell so many likeliest tokens at each position too."
    )
    prompt_logprobs: bool = knob(False, FLAG, "Tell the log-probs of the prompt's tokens too.")
    scaled_logprobs: bool = knob(False, FLAG, "New tokens: tell log-probs at the temperature (before top_p), not at 1.")
    echo: bool = knob(False, FLAG, "The text starts with the prompt.")
    # beam search
    num_beams: int = knob(1, whole(1), "Beam search with so many beams; with a temperature, beam sampling.")
    length_penalty: float = knob(1.0, number(lambda x: True, "a finite number"), "Beams: score / length ** this.")
    early_stopping: bool | str = knob(
        False, (lambda x: x in (True, False, "never"), 'True, False or "never"'), "Beams: when a prompt is done."
    )
    num_beam_groups: int = knob(1, whole(1), "Diverse beam search: groups of beams that avoid each other's tokens.")
    diversity_penalty: float = knob(
        0.0, number(lambda x: x >= 0, "0 or more"), "Subtracted for each earlier group's beam that says the same."
    )
    # contrastive search
    penalty_alpha: float = knob(
        0.0, number(lambda x: 0 <= x <= 1, "0 (off) to 1"), "Contrastive search among top_k tokens; 0 is off."
    )
    # speculative decoding
    prompt_lookup_num_tokens: int = knob(
        0, whole(1, off=True), "Guess so many tokens from the row's own past; 0 is off."
    )
    max_matching_ngram_size: int = knob(2, whole(1), "The longest run of tokens that such a guess continues.")
    num_assistant_tokens: int = knob(5, whole(1), "A draft model guesses so many tokens at a time.")

    def __post_init__(self) -> None:
        for name in (
            "bad_words_ids",
            "allowed_token_ids",
            "suppress_tokens",
            "begin_suppress_tokens",
            "stop_token_ids",
        ):
            frozen = tuple(tuple(v) if isinstance(v, list | tuple) else v for v in getattr(self, name))
            object.__setattr__(self, name, frozen)
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "processors", tuple(self.processors))
        for one in fields(self):
            (fine, allowed), value = one.metadata["check"], getattr(self, one.name)
            if value is not None and not fine(value):
                raise UsageError(f"{one.name} is {value!r}, allowed: {allowed}")
        self._check_together()

    def _check_together(self) -> None:
        """Refuse parameters that contradict each other."""
        many, beams, groups, best = self.num_return_sequences, self.num_beams, self.num_beam_groups, self.best_of
        greedy, alpha = self.temperature == 0, self.penalty_alpha
        given = {one.name for one in fields(self) if getattr(self, one.name) != one.default}
        ways = {"num_beams": beams > 1, "penalty_alpha": alpha > 0, "guidance_scale": self.guidance_scale != 1,
                "prompt_lookup_num_tokens": self.prompt_lookup_num_tokens > 0}  # fmt: skip
        chosen = [name for name, on in ways.items() if on]
        of_beams = ("length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty")
        alone = [name for name in of_beams if name in given and beams == 1]
        clashes = (
            (len(chosen) > 1, f"{' and '.join(chosen)} do not go together"),
            (bool(alone), f"{', '.join(alone)}: given with num_beams 1, but of use in beam search only"),
            (1 < beams < many, f"num_return_sequences is {many} with num_beams {beams}: beams are all there is"),
            (
                beams == 1 and many > 1 and greedy,
                f"num_return_sequences is {many} with temperature 0: greedy search has one result; set a temperature "
                "or num_beams",
            ),
            (best is not None and best < many, f"best_of is {best}, below num_return_sequences {many}"),
            (
                best is not None and best > 1 and (greedy or beams > 1),
                f"best_of is {best}: it chooses among samples, so it needs a temperature above 0 and num_beams 1",
            ),
            (beams % groups > 0, f"num_beam_groups is {groups} with num_beams {beams}: groups must be of one size"),
            (groups > 1 and not greedy, f"num_beam_groups is {groups}: groups are not sampled, temperature must be 0"),
            (
                groups == 1 and self.diversity_penalty > 0,
                f"diversity_penalty is {self.diversity_penalty} with num_beam_groups 1: nobody to differ from",
            ),
            (
                alpha > 0 and (not greedy or self.top_k < 2),
                f"penalty_alpha is {alpha}: contrastive search needs top_k 2 or more and temperature 0",
            ),
            (
                self.negative_prompt is not None and self.guidance_scale == 1,
                "negative_prompt is given with guidance_scale 1: without guidance it is not read",
            ),
            (
                bool(set(self.allowed_token_ids) & set(self.suppress_tokens)),
                "allowed_token_ids and suppress_tokens name the same tokens",
            ),
        )
        for clash, what in clashes:
            if clash:
                raise UsageError(what)

    @property
    def samples(self) -> int:
        """Rows generated for each prompt."""
        return self.best_of or self.num_return_sequences

    @property
    def texts(self) -> tuple[str, ...]:
        """The stop strings."""
        return tuple(self.stop)

    def limit(self, prompt: int) -> int:
        """The most new tokens after a prompt of so many; below 1 when the prompt itself is too long."""
        given = [] if self.max_new_tokens is None else [self.max_new_tokens]
        given += [] if self.max_length is None else [self.max_length - prompt]
        return min(given, default=64)
