"""A tokenizer as GGUF's metadata: the inverse of convert/gguf_tokenizer.py, which must read the same out of it."""

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from configs.errors import UsageError
from convert.conversion import tokenizer_home
from convert.gguf import open_gguf
from convert.gguf_tokenizer import (
    BYTE,
    CONTROL,
    GPT2,
    META_SPACE,
    NORMAL,
    SPECIAL,
    SPLITTINGS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    merges_of,
)
from convert.load import load_tokenizer
from convert.source import Source
from data.tokenizer import Tokenizer

Metadata = dict[str, Any]
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


def vocabulary_of(source: Source) -> Metadata:
    """The keys tokenizer.* of a model's tokenizer; UsageError for one that GGUF cannot express.

    A GGUF file's own are kept as they are.
    """
    home = tokenizer_home(source)
    if home is None:
        raise UsageError(f"MODEL '{source.name}' has no tokenizer, without which llama.cpp cannot run it")
    if home.kind == "gguf" and home.tokenizer is None:
        meta = {k: v for k, v in open_gguf(home.path).metadata.items() if k.startswith("tokenizer.")}
    else:
        meta = _of_tokenizer(load_tokenizer(home), source)
    return _fitted(meta, source.arch.vocab_size, source.name)


def _fitted(meta: Metadata, rows: int, where: str) -> Metadata:
    """As many tokens as the embedding has rows, as llama.cpp wants it: names for rows that stand for no token; added
    tokens without a row (an image's, in Gemma 3's text models) are left out."""
    tokens, types = meta.get("tokenizer.ggml.tokens", []), meta.get("tokenizer.ggml.token_type", [])
    extra = rows - len(tokens)
    if extra < 0:
        if any(kind not in (CONTROL, USER_DEFINED, UNUSED) for kind in types[rows:]):
            raise UsageError(f"{where}: the tokenizer has {len(tokens)} tokens, the model's embedding only {rows} rows")
        return {k: v[:rows] if isinstance(v, list) and len(v) == len(tokens) else v for k, v in meta.items()}
    if extra == 0:
        return meta
    more: Metadata = {"tokenizer.ggml.tokens": [*tokens, *(f"[PAD{len(tokens) + i}]" for i in range(extra))]}
    more["tokenizer.ggml.token_type"] = [*(types or [NORMAL] * len(tokens)), *[UNUSED] * extra]
    if scores := meta.get("tokenizer.ggml.scores"):
        more["tokenizer.ggml.scores"] = [*scores, *[0.0] * extra]
    return meta | more


def _of_tokenizer(tokenizer: Tokenizer, source: Source) -> Metadata:
    fast = cast(Any, tokenizer.source)
    folder = tokenizer.source if isinstance(tokenizer.source, Path) else None
    if folder is not None and not (folder / "tokenizer.json").is_file():
        meta = _of_pieces(folder / "tokenizer.model", tokenizer)
    else:
        text = (folder / "tokenizer.json").read_text("utf-8") if folder else fast.backend_tokenizer.to_str()
        meta = _of_json(json.loads(text), str(folder or source.path))
    ids = {key: tokenizer.special_tokens.get(tokenizer.named.get(name, "")) for name, key in SPECIAL.items()}
    more = [index for index in tokenizer.eos_ids if index != ids["eos"]]  # where a turn, a message ends
    ids |= dict(zip(("eot", "eom"), more, strict=False))
    meta |= {f"tokenizer.ggml.{key}_token_id": index for key, index in ids.items() if index is not None}
    meta["tokenizer.ggml.add_bos_token"] = bool(tokenizer.prefix)
    meta["tokenizer.ggml.add_eos_token"] = bool(tokenizer.suffix)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return meta | ({"tokenizer.chat_template": template} if template else {})


def _of_json(spec: dict[str, Any], where: str) -> Metadata:
    """Of a tokenizer.json."""
    model = spec["model"]
    if model.get("type", "BPE") != "BPE" or model.get("dropout"):
        raise UsageError(f"{where}: a tokenizer of type {model.get('type')} cannot be written as GGUF (BPE can)")
    added = {token["id"]: token for token in spec.get("added_tokens", ())}
    names = {index: token for token, index in model["vocab"].items()}
    names |= {index: token["content"] for index, token in added.items()}
    size = max(names) + 1
    tokens = [names.get(i, f"[PAD{i}]") for i in range(size)]
    bytes_too = bool(model.get("byte_fallback"))

    def kind(index: int) -> int:
        token = tokens[index]
        if index not in names:
            return UNUSED
        if bytes_too and token == model.get("unk_token"):
            return UNKNOWN
        if index in added:
            return CONTROL if added[index]["special"] else USER_DEFINED
        return BYTE if bytes_too and BYTE_TOKEN.fullmatch(token) else NORMAL

    types = [kind(i) for i in range(size)]
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    meta: Metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if not bytes_too:
        meta |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _pre(spec, where)}
        return meta | {"tokenizer.ggml.merges": [" ".join(merge) for merge in merges]}
    meta |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_space_prefix": _space_prefix(spec, where)}
    meta["tokenizer.ggml.scores"] = _scores(meta, merges, where)
    for i in (i for i, number in enumerate(types) if number == USER_DEFINED):  # found in text as it is
        tokens[i] = tokens[i].replace(META_SPACE, " ")
    return meta


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The members of a sequence of normalizers or pre-tokenizers."""
    if part is None:
        return []
    inner = part.get("pretokenizers") or part.get("normalizers")
    return [step for member in inner for step in _steps(member)] if inner else [part]


def _pre(spec: dict[str, Any], where: str) -> str:
    """llama.cpp's name of how text is split before BPE: GGUF keeps only that."""
    steps, normal = _steps(spec.get("pre_tokenizer")), _steps(spec.get("normalizer"))
    levels = [step for step in steps if step["type"] == "ByteLevel"]
    splits = [step for step in steps if step["type"] == "Split"]
    digits = [step for step in steps if step["type"] == "Digits" and step.get("individual_digits")]
    plain = len(levels) == 1 and not levels[0].get("add_prefix_space") and len(splits) <= 1
    if plain and len(steps) == 1 + len(splits) + len(digits) and all(step["type"] == "NFC" for step in normal):
        pattern = splits[0]["pattern"].get("Regex") if splits else GPT2
        found = (pattern, bool(digits), bool(normal), bool(spec["model"].get("ignore_merges")))
        for name, rules in SPLITTINGS.items():
            # "default" is another pattern in llama.cpp
            if name != "default" and found == (rules.pattern, rules.digits, rules.nfc, rules.ignore_merges):
                if levels[0].get("use_regex", True) == (pattern == GPT2):
                    return name
    raise UsageError(
        f"{where}: llama.cpp has no name for how this tokenizer splits text that is known here "
        f"({', '.join(SPLITTINGS)} are): {json.dumps(spec.get('pre_tokenizer'), ensure_ascii=False)[:300]}"
    )


def _space_prefix(spec: dict[str, Any], where: str) -> bool:
    """Whether a space is put before a text, of a tokenizer that writes spaces as sentencepiece does."""
    prefix = replaces = False
    for step in [*_steps(spec.get("normalizer")), *_steps(spec.get("pre_tokenizer"))]:
        match step:
            case {"type": "Prepend", "prepend": "\u2581"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                replaces = True
            case {"type": "Metaspace", "replacement": "\u2581"}:
                prefix, replaces = step.get("prepend_scheme", "always") != "never", True
            case {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"} if replaces:
                pass  # Gemma's: there are no spaces left that it could split at
            case _:
                raise UsageError(f"{where}: GGUF has no word for this tokenizer's step {json.dumps(step)}")
    if not replaces:
        raise UsageError(f"{where}: this tokenizer does not write spaces as {META_SPACE}: GGUF has no word for that")
    return prefix


def _scores(meta: Metadata, merges: list[tuple[str, ...]], where: str) -> list[float]:
    """Scores that mean these merges: llama.cpp joins first what makes the token with the best score."""
    ranks: dict[str, int] = {}
    for merge in merges:
        ranks.setdefault("".join(merge), len(ranks))
    tokens = meta["tokenizer.ggml.tokens"]
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    vocab, types = {token: i for i, token in enumerate(tokens)}, meta["tokenizer.ggml.token_type"]
    # user-defined tokens are found whole before anything is merged
    merges = [merge for merge in merges if types[vocab["".join(merge)]] != USER_DEFINED]
    meant = merges_of(meta | {"tokenizer.ggml.scores": scores}, Path(where), vocab, types)
    made, given = ([piece for piece, _ in groupby(map("".join, pairs))] for pairs in (meant, merges))
    if set(meant) != set(merges) or made != given:
        raise UsageError(
            f"{where}: {len(set(meant) ^ set(merges))} merges of this tokenizer are not what scores of tokens could "
            "mean, which is all that GGUF has for a tokenizer with bytes as a fallback"
        )
    return scores


def _of_pieces(path: Path, tokenizer: Tokenizer) -> Metadata:
    """Of a sentencepiece model."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    spec = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    spec.ParseFromString(path.read_bytes())
    if spec.trainer_spec.model_type != 2 or spec.normalizer_spec.precompiled_charsmap:
        raise UsageError(f"{path}: of sentencepiece models only BPE without a normalizer can be written as GGUF")
    if spec.normalizer_spec.remove_extra_whitespaces:
        raise UsageError(f"{path}: GGUF has no word for remove_extra_whitespaces")
    model = SentencePieceProcessor(model_file=str(path))
    size = len(model)
    special = {index: token for token, index in tokenizer.special_tokens.items()}

    def kind(index: int) -> int:
        if index >= size:
            return CONTROL if index in special else UNUSED
        if model.is_unknown(index):
            return UNKNOWN
        if model.is_control(index) or index in special:
            return CONTROL
        return BYTE if model.is_byte(index) else UNUSED if model.is_unused(index) else NORMAL

    everything = range(max(size, tokenizer.vocab_size))
    pieces = {i: model.id_to_piece(i) for i in range(size)} | special
    user = {i for i, piece in enumerate(spec.pieces) if piece.type == USER_DEFINED}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [pieces.get(i, f"[PAD{i}]") for i in everything],
        "tokenizer.ggml.scores": [float(model.get_score(i)) if i < size else 0.0 for i in everything],
        "tokenizer.ggml.token_type": [USER_DEFINED if i in user else kind(i) for i in everything],
        "tokenizer.ggml.add_space_prefix": bool(spec.normalizer_spec.add_dummy_prefix),
    }
