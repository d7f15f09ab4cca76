"""A GGUF file's vocabulary as a fast tokenizer, with what GGUF leaves out put back by the name of its pre-tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UsageError
from convert.gguf import GGUF

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # values of tokenizer.ggml.token_type
META_SPACE = "\u2581"  # sentencepiece writes a space so

# The patterns that the models' own tokenizer.json files split text with before BPE.
GPT2 = "gpt2"  # the one built into tokenizers' ByteLevel
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class Splitting:
    """What text goes through before BPE."""

    pattern: str
    digits: bool = False  # each digit on its own, before the pattern
    nfc: bool = False
    ignore_merges: bool = False  # a whole word of the vocabulary is taken as it is
    add_bos: bool = False  # unless tokenizer.ggml.add_bos_token says otherwise


# tokenizer.ggml.pre -> its rules. GGUF keeps only this name; transformers' GGUF route ignores the digits of smollm.
SPLITTINGS = {
    "default": Splitting(GPT2),
    "gpt-2": Splitting(GPT2),
    "gpt2": Splitting(GPT2),
    "smollm": Splitting(GPT2, digits=True),
    "starcoder": Splitting(GPT2, digits=True),
    "llama-bpe": Splitting(LLAMA3, ignore_merges=True, add_bos=True),
    "llama3": Splitting(LLAMA3, ignore_merges=True, add_bos=True),
    "llama-v3": Splitting(LLAMA3, ignore_merges=True, add_bos=True),
    "qwen2": Splitting(QWEN2, nfc=True),
    "deepseek-r1-qwen": Splitting(QWEN2),
}
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def build_tokenizer(file: GGUF) -> tuple[Any, dict[str, Any]]:
    """(tokenizers.Tokenizer, tokenizer_config.json's dict with the chat template) of a GGUF file."""
    meta, where = file.metadata, file.path
    kind = meta.get("tokenizer.ggml.model")
    tokens = meta.get("tokenizer.ggml.tokens")
    if not tokens:
        raise UsageError(f"{where}: tokenizer.ggml.tokens is missing: a GGUF file without a vocabulary cannot be used")
    if kind not in ("gpt2", "llama"):
        raise UsageError(f"{where}: tokenizer.ggml.model '{kind}' is not supported (gpt2 and llama are)")
    types = meta.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(types) != len(tokens) or len(vocab) != len(tokens):
        raise UsageError(f"{where}: {len(tokens)} tokens, {len(vocab)} of them distinct, but {len(types)} token types")
    tokenizer, bos = _byte_level(meta, where, vocab) if kind == "gpt2" else _sentencepiece(meta, where, vocab, types)
    _add_tokens(tokenizer, tokens, types)
    config = _config(meta, tokens, bos)
    _add_ends(tokenizer, config, vocab)
    return tokenizer, config


def _byte_level(meta: dict[str, Any], where: Path, vocab: dict[str, int]) -> tuple[Any, bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = meta.get("tokenizer.ggml.pre", "default")
    if name not in SPLITTINGS:
        raise UsageError(
            f"{where}: pre-tokenizer tokenizer.ggml.pre '{name}' is not known ({', '.join(SPLITTINGS)} are): "
            "text would be cut wrongly; use the model's Hugging Face folder"
        )
    rules = SPLITTINGS[name]
    merges = [tuple(merge.split(" ", 1)) for merge in meta.get("tokenizer.ggml.merges") or ()]
    try:
        model = models.BPE(vocab, merges, ignore_merges=rules.ignore_merges)
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"{where}: tokenizer.ggml.merges do not fit the vocabulary: {error}") from error
    tokenizer = Tokenizer(model)
    builtin = rules.pattern is GPT2
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rules.digits else []
    if not builtin:
        steps.append(pre_tokenizers.Split(Regex(rules.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=builtin))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if rules.nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, rules.add_bos


def _sentencepiece(meta: dict[str, Any], where: Path, vocab: dict[str, int], types: list[int]) -> tuple[Any, bool]:
    """sentencepiece's BPE with byte fallback, as Llama 1 and 2 and Mistral use it."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    for key in ("precompiled_charsmap", "remove_extra_whitespaces"):
        if meta.get(f"tokenizer.ggml.{key}"):
            raise UsageError(f"{where}: tokenizer.ggml.{key} is not supported: use the model's Hugging Face folder")
    unknown = meta.get("tokenizer.ggml.unknown_token_id", 0)
    model = models.BPE(
        vocab,
        merges_of(meta, where, vocab, types),
        unk_token=list(vocab)[unknown],
        fuse_unk=True,
        byte_fallback=BYTE in types,
    )
    tokenizer = Tokenizer(model)
    prefix = meta.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend(META_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", META_SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(META_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer, True


def merges_of(meta: dict[str, Any], where: Path, vocab: dict[str, int], types: list[int]) -> list[tuple[str, str]]:
    """The file's merges, or those that its scores mean: every way to cut a piece in two, best score first."""
    if merges := meta.get("tokenizer.ggml.merges"):
        return [tuple(merge.split(" ", 1)) for merge in merges]
    scores = meta.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(vocab):
        raise UsageError(f"{where}: neither tokenizer.ggml.merges nor a tokenizer.ggml.scores per token")
    plain = {t for t, i in vocab.items() if types[i] not in (UNKNOWN, CONTROL, USER_DEFINED, BYTE)}
    pairs = [
        (-scores[vocab[piece]], vocab[piece[:cut]], vocab[piece[cut:]], piece[:cut], piece[cut:])
        for piece in plain
        for cut in range(1, len(piece))
        if piece[:cut] in plain and piece[cut:] in plain
    ]
    return [(left, right) for *_, left, right in sorted(pairs)]


def _add_tokens(tokenizer: Any, tokens: list[str], types: list[int]) -> None:
    """Mark control tokens as special, user-defined ones as whole: both are found in text before anything is split."""
    from tokenizers import AddedToken

    pairs = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, n in pairs if n == CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t, n in pairs if n == USER_DEFINED])


def _config(meta: dict[str, Any], tokens: list[str], bos: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": meta.get("tokenizer.ggml.add_bos_token", bos),
        "add_eos_token": meta.get("tokenizer.ggml.add_eos_token", False),
    }
    for name, key in SPECIAL.items():
        number = meta.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and number < len(tokens):
            config[name] = tokens[number]
    family = meta.get("general.architecture", "")
    if f"{family}.context_length" in meta:
        config["model_max_length"] = meta[f"{family}.context_length"]
    if template := meta.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config


def _add_ends(tokenizer: Any, config: dict[str, Any], vocab: dict[str, int]) -> None:
    """Begin and end tokens around every text, where the file asks for them."""
    from tokenizers import processors

    first = [config["bos_token"]] if config["add_bos_token"] and "bos_token" in config else []
    last = [config["eos_token"]] if config["add_eos_token"] and "eos_token" in config else []
    if first or last:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *(f"{t}:1" for t in first), "$B:1", *(f"{t}:1" for t in last)],
            special_tokens=[(t, vocab[t]) for t in {*first, *last}],
        )
