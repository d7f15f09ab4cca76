"""Tokenizers behind one small interface: Hugging Face fast ones, and sentencepiece's .model files. No torch."""

import copy
import json
import os
import re
import shutil
import threading
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from configs.errors import UsageError

Message = Mapping[str, Any]
Offsets = list[tuple[int, int]]
Templates = str | dict[str, str] | None

# Everything a tokenizer folder may consist of; copied as it is when a tokenizer is saved unchanged.
FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)

# transformers keeps the state of {% generation %} markers on the compiled template, which all threads share
_RENDERING = threading.Lock()


def import_transformers() -> types.ModuleType:
    """Import transformers without its notice that PyTorch is missing: we use its tokenizers, never its models."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        import transformers
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
    return transformers


class Codec(Protocol):
    """Text to ids and back; what differs between the two kinds of tokenizer files."""

    def ids(self, text: str) -> list[int]: ...
    def encode(self, text: str) -> tuple[list[int], Offsets]: ...
    def decode(self, ids: Sequence[int], skip_special: bool) -> str: ...


class FastCodec:
    """A `tokenizers` object. Special tokens are added by Tokenizer, so its post-processor is not needed."""

    def __init__(self, backend: Any):
        self.backend = _without_trimming(backend)

    def ids(self, text: str) -> list[int]:  # a third less time than with offsets
        return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return self.backend.decode(ids, skip_special_tokens=skip_special)


def _without_trimming(backend: Any) -> Any:
    """A copy that neither pads nor cuts, and whose offsets cover the spaces too (a mask must see every character)."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors

    backend = Backend.from_str(backend.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


class PieceCodec:
    """A sentencepiece model: special tokens are cut out first, each stretch between them is encoded by itself."""

    def __init__(self, model: Any, special: Mapping[str, int]):
        self.model = model
        self.special = dict(special)
        self.names = {index: token for token, index in special.items()}
        longest_first = sorted(self.special, key=len, reverse=True)
        self.split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if special else None

    def ids(self, text: str) -> list[int]:
        return self.encode(text)[0]

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        ids: list[int] = []
        offsets: Offsets = []
        at = 0
        for part in self.split.split(text) if self.split else [text]:
            if part in self.special:
                ids.append(self.special[part])
                offsets.append((at, at + len(part)))
            elif part:
                for index, start, end in self._pieces(part):
                    ids.append(index)
                    offsets.append((at + start, at + end))
            at += len(part)
        return ids, offsets

    def _pieces(self, text: str) -> list[tuple[int, int, int]]:
        if hasattr(self.model, "encode_as_offset_mapping"):  # sentencepiece >= 0.2.2
            mapping = self.model.encode_as_offset_mapping(text)
            return [(index, start, end) for index, (start, end) in zip(mapping["ids"], mapping["offsets"], strict=True)]
        pieces = self.model.encode_as_immutable_proto(text).pieces
        return [(piece.id, piece.begin, piece.end) for piece in pieces]

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        text, run = "", []
        for index in [*ids, None]:
            if index is not None and index not in self.names:
                run.append(index)
                continue
            text += self.model.decode(run) if run else ""
            run = []
            if index is not None and not skip_special:
                text += self.names[index]
        return text


class Tokenizer:
    """Text <-> token ids, special tokens and the chat template of one model."""

    def __init__(
        self,
        codec: Codec,
        vocab_size: int,
        special: Mapping[str, int],
        named: Mapping[str, str],
        chat_template: Templates,
        generation_config: Mapping[str, Any] | None = None,
        affixes: tuple[Sequence[int], Sequence[int]] = ((), ()),
        source: Any = None,
    ):
        self.codec = codec
        self.vocab_size = vocab_size  # the largest id + 1, added tokens included
        self.special_tokens = dict(special)  # text -> id
        self.special_ids = frozenset(special.values())
        self.named = dict(named)  # what templates see: bos_token, eos_token, ...
        self.chat_template = chat_template
        self.prefix, self.suffix = list(affixes[0]), list(affixes[1])  # put around text by default, such as BOS
        self.source = source  # the folder, or the transformers tokenizer, to save from
        self.bos_id = self._id("bos_token")
        self.pad_id = self._id("pad_token")
        self.eos_ids = self._eos(generation_config or {})

    def _id(self, name: str) -> int | None:
        token = self.named.get(name)
        return None if token is None else self.special_tokens.get(token)

    def _eos(self, generation_config: Mapping[str, Any]) -> tuple[int, ...]:
        """The tokenizer's own end-of-sequence first, then those at which the model's generation stops."""
        more = generation_config.get("eos_token_id")
        more = [] if more is None else [more] if isinstance(more, int) else list(more)
        return tuple(dict.fromkeys(index for index in [self._id("eos_token"), *more] if index is not None))

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids; special=True adds what the tokenizer adds to plain text by default, such as BOS."""
        ids = self.codec.ids(text)
        return [*self.prefix, *ids, *self.suffix] if special else ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """Token ids and, for each, the characters [start, end) of `text` it stands for. Adds no special tokens."""
        return self.codec.encode(text)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text, without any cleaning up of spaces. Ids beyond the vocabulary (padded models) become U+FFFD."""
        text, run = "", []
        for index in map(int, ids):
            if 0 <= index < self.vocab_size:
                run.append(index)
                continue
            text += self.codec.decode(run, skip_special) + "\ufffd"
            run = []
        return text + self.codec.decode(run, skip_special)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[Any] | None = None
    ) -> str:
        """The conversation as the model's own chat template writes it."""
        return self._render(messages, tools, add_generation_prompt, False)[0]

    def render_with_generation(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """As render, with the characters that the template puts between its {% generation %} markers."""
        return self._render(messages, tools, False, True)

    def has_generation_markers(self, tools: Sequence[Any] | None = None) -> bool:
        """Whether the template itself says what the model generates."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self._template(tools)) is not None

    def _template(self, tools: Sequence[Any] | None) -> str:
        if isinstance(self.chat_template, dict):
            name = "tool_use" if tools and "tool_use" in self.chat_template else "default"
            if name not in self.chat_template:
                raise UsageError(
                    f"the tokenizer has several chat templates ({', '.join(self.chat_template)}) and none is named "
                    f"'{name}': choose one with data.chat_template=FILE"
                )
            return self.chat_template[name]
        if self.chat_template is None:
            raise UsageError(
                "the tokenizer has no chat template, so messages cannot be rendered (base models often lack one): set "
                "data.chat_template to a jinja file or text, or give prompt/completion or text rows"
            )
        return self.chat_template

    def _render(self, messages: Sequence[Message], tools: Any, prompt: bool, mark: bool) -> tuple[str, Any]:
        import_transformers()
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._template(tools)
        named: dict[str, Any] = self.named
        # as transformers does: absent rather than null, since templates test for presence
        chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            with _RENDERING:
                texts, spans = render_jinja_template(
                    conversations=[chat],
                    tools=list(tools) if tools else None,
                    chat_template=template,
                    return_assistant_tokens_mask=mark,
                    add_generation_prompt=prompt,
                    **named,
                )
        except TemplateSyntaxError as error:
            raise UsageError(f"the chat template is not valid jinja: {error} (line {error.lineno})") from error
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise ValueError(f"the chat template refuses this conversation ({roles}): {error}") from error
        return texts[0], spans[0] if mark else []

    def with_chat_template(self, template: str) -> "Tokenizer":
        """The same tokenizer with another template: jinja text, or the path of a file that holds it."""
        if not any(mark in template for mark in ("{{", "{%", "\n")):
            path = Path(template).expanduser()
            if not path.is_file():
                raise UsageError(f"data.chat_template: '{template}' is neither jinja text nor an existing file")
            template = path.read_text(encoding="utf-8")
        other = copy.copy(self)
        other.chat_template = template
        return other

    def with_pad(self, index: int) -> "Tokenizer":
        """The same tokenizer that pads with another of its special tokens."""
        other = copy.copy(self)
        other.named = {**self.named, "pad_token": {i: token for token, i in self.special_tokens.items()}[index]}
        other.pad_id = index
        return other

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files that transformers and load_tokenizer read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.source, Path):
            for name in FILES:
                if (self.source / name).is_file() and self.source.resolve() != folder.resolve():
                    shutil.copyfile(self.source / name, folder / name)
        else:
            self.source.save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if config.get("tokenizer_class") == "TokenizersBackend":  # the name that transformers 4 knows, too
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if "pad_token" in self.named:
            _set_pad(config, self.named["pad_token"])
            if (others := folder / "special_tokens_map.json").is_file():
                named = json.loads(others.read_text(encoding="utf-8"))
                if "pad_token" in named:
                    _set_pad(named, self.named["pad_token"])
                others.write_text(json.dumps(named, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        if isinstance(self.chat_template, str) and config.get("chat_template") != self.chat_template:
            config.pop("chat_template", None)
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _set_pad(config: dict[str, Any], token: str) -> None:
    """Say which token pads, where a config says otherwise (a token may be written as an object)."""
    given = config.get("pad_token")
    if (given.get("content") if isinstance(given, dict) else given) != token:
        config["pad_token"] = token


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a local folder: tokenizer.json (preferred) or a sentencepiece tokenizer.model."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UsageError(f"tokenizer folder '{folder}' does not exist (or is no folder)")
    generation = _read_json(path / "generation_config.json")
    if (path / "tokenizer.json").is_file():
        fast = _quietly(lambda cls: cls.from_pretrained(str(path), local_files_only=True), path)
        return _from_fast(fast, generation, path)
    if (path / "tokenizer.model").is_file():
        return _from_pieces(path, generation)
    raise UsageError(f"'{folder}' holds no tokenizer: neither tokenizer.json nor a sentencepiece tokenizer.model")


def wrap_fast(backend: Any, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> Tokenizer:
    """A `tokenizers.Tokenizer` with the contents of a tokenizer_config.json (bos_token, chat_template, ...)."""
    settings = {key: value for key, value in config.items() if key not in ("tokenizer_class", "backend")}
    fast = _quietly(lambda cls: cls(tokenizer_object=backend, **settings), "the given tokenizer")
    return _from_fast(fast, generation_config, fast)


def _quietly(build: Any, what: object) -> Any:
    """Build a PreTrainedTokenizerFast; what is wrong with its files becomes one sentence."""
    cls = import_transformers().PreTrainedTokenizerFast
    try:
        return build(cls)
    except Exception as error:  # the Rust side raises bare Exception
        raise UsageError(f"{what}: the tokenizer files cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error


def _from_fast(fast: Any, generation_config: Mapping[str, Any] | None, source: Any) -> Tokenizer:
    backend = fast.backend_tokenizer
    added = {index: token for index, token in backend.get_added_tokens_decoder().items() if token.special}
    special = {token.content: index for index, token in added.items()}
    named = {name: str(token) for name, token in fast.special_tokens_map.items() if isinstance(token, str)}
    special |= {token: backend.token_to_id(token) for token in named.values()}
    probe = "a"
    plain, full = (backend.encode(probe, add_special_tokens=flag).ids for flag in (False, True))
    cut = next((at for at in range(len(full) - len(plain) + 1) if full[at : at + len(plain)] == plain), 0)
    ids = backend.get_vocab(with_added_tokens=True).values()
    return Tokenizer(
        FastCodec(backend),
        max(ids, default=-1) + 1,
        special,
        named,
        fast.chat_template,
        generation_config,
        (full[:cut], full[cut + len(plain) :]),
        source,
    )


def _from_pieces(folder: Path, generation_config: Mapping[str, Any]) -> Tokenizer:
    import sentencepiece

    config = _read_json(folder / "tokenizer_config.json")
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.Load(str(folder / "tokenizer.model"))
    except (RuntimeError, OSError) as error:
        raise UsageError(
            f"{folder / 'tokenizer.model'} is not a sentencepiece model (a tiktoken file, perhaps: convert it to "
            f"tokenizer.json first)"
        ) from error
    size = model.get_piece_size()
    special = {model.id_to_piece(index): index for index in range(size) if model.is_control(index)}
    added = {int(index): token for index, token in config.get("added_tokens_decoder", {}).items()}
    added |= {index: {"content": token} for token, index in _read_json(folder / "added_tokens.json").items()}
    special |= {token["content"]: index for index, token in added.items()}
    defaults = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "pad_token": model.pad_id()}
    named = {name: model.id_to_piece(index) for name, index in defaults.items() if index >= 0}
    for name, token in {**_read_json(folder / "special_tokens_map.json"), **config}.items():
        if name.endswith("_token") and isinstance(token, str | dict):
            named[name] = token if isinstance(token, str) else token["content"]
    bos, eos = (special.get(named.get(name, "")) for name in ("bos_token", "eos_token"))
    template = folder / "chat_template.jinja"
    return Tokenizer(
        PieceCodec(model, special),
        max([size - 1, *special.values()]) + 1,
        special,
        named,
        template.read_text(encoding="utf-8") if template.is_file() else _templates(config.get("chat_template")),
        generation_config,
        (
            [bos] if bos is not None and config.get("add_bos_token", True) else [],
            [eos] if eos is not None and config.get("add_eos_token", False) else [],
        ),
        folder,
    )


def _templates(value: Any) -> Templates:
    """tokenizer_config.json holds one template, or a list of named ones."""
    if isinstance(value, list):
        return {entry["name"]: entry["template"] for entry in value}
    return value
