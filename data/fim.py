"""Fill in the middle (arXiv 2207.14255): a text rearranged so that what comes before and after predicts what is
between."""

import zlib

import numpy as np

from configs.errors import UsageError
from data.chat import Example
from data.tokenizer import Tokenizer

# prefix, middle, suffix as models spell them: Qwen and ours, StarCoder, DeepSeek, CodeLlama
SPELLINGS = (
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581end\uff5c>", "<\uff5cfim\u2581hole\uff5c>"),
    ("<PRE>", "<MID>", "<SUF>"),
    ("\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>"),
)


def fim_tokens(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """The ids of the tokens before a prefix, a middle and a suffix."""
    known = tokenizer.special_tokens
    for names in SPELLINGS:
        if all(name in known for name in names):
            prefix, middle, suffix = (known[name] for name in names)
            return prefix, middle, suffix
    raise UsageError(
        "data.fim_rate is above 0, but the tokenizer has no tokens for it, such as "
        f"{', '.join(SPELLINGS[0])}: set data.fim_rate=0, or train a tokenizer with --fim"
    )


def rearrange(text: str, tokenizer: Tokenizer, rate: float, spm_rate: float, seed: int) -> list[int] | None:
    """The ids of a text cut at two random characters, prefix-suffix-middle or suffix-prefix-middle; None for one that
    stays as it is. What happens to a text depends on it and on the seed alone."""
    rng = np.random.default_rng((seed, zlib.crc32(text.encode("utf-8", "surrogatepass"))))
    if rng.random() >= rate:
        return None
    pre, mid, suf = fim_tokens(tokenizer)
    one, two = np.sort(rng.integers(0, len(text) + 1, 2)).tolist()
    prefix, middle, suffix = (tokenizer.encode(part) for part in (text[:one], text[one:two], text[two:]))
    if rng.random() < spm_rate:  # the paper's variant 2: the prefix goes on right into the middle
        return [pre, suf, *suffix, mid, *prefix, *middle]
    return [pre, *prefix, suf, *suffix, mid, *middle]


def encode_fim(text: str, tokenizer: Tokenizer, rate: float, spm_rate: float, seed: int, eos: bool) -> Example | None:
    """The example of a text that is rearranged; every token counts."""
    ids = rearrange(text, tokenizer, rate, spm_rate, seed)
    if ids is None:
        return None
    tokens = [*tokenizer.prefix, *ids, *(tokenizer.eos_ids[:1] if eos else ())]
    weights = np.ones(len(tokens), np.float32)
    weights[: len(tokenizer.prefix)] = 0
    return {"tokens": np.asarray(tokens, np.int32), "weights": weights}
