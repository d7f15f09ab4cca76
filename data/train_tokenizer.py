"""Train a tokenizer: byte-level BPE (tokenizers), or sentencepiece's BPE and unigram. Equal text, equal files."""

import hashlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import RunError, UsageError
from data.formats import normalise
from data.sources import Records, open_source
from data.tokenizer import Tokenizer, load_tokenizer, wrap_fast

KINDS = ("byte_bpe", "bpe", "unigram")
BYTES = 256
BYTE_SPECIALS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"}
PIECE_SPECIALS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# where Llama 3 cuts text into words, within which BPE merges; {digits} is how many stay together
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
RECORD = "training.json"  # what a folder was made of
SENTENCE = 4000  # sentencepiece drops what is longer than 4192 bytes
THREADS = 16  # its sums depend on them, so not on the machine's cores
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Training:
    """What to train: kind, size with all special tokens in it, and what text it sees."""

    kind: str
    vocab_size: int
    special_tokens: tuple[str, ...] = ()  # besides bos, eos, pad
    chat_template: str | None = None
    digits: bool = True  # each digit by itself
    limit_bytes: int | None = None
    column: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"--kind '{self.kind}': allowed are {', '.join(KINDS)}")
        tokens = self.tokens
        twice = next((token for i, token in enumerate(tokens) if token in tokens[:i] or not token.strip()), None)
        if twice is not None:
            raise UsageError(f"special token '{twice}' is empty or there twice; each must be one of its own: {tokens}")
        least = BYTES + len(tokens)
        if self.vocab_size <= least:
            raise UsageError(
                f"--vocab-size {self.vocab_size} is too small: {BYTES} bytes and {len(tokens)} special tokens leave "
                f"nothing to learn, so more than {least} are needed"
            )

    @property
    def named(self) -> dict[str, str]:
        """The special tokens that have a task."""
        return BYTE_SPECIALS if self.kind == "byte_bpe" else PIECE_SPECIALS

    @property
    def tokens(self) -> tuple[str, ...]:
        """All special tokens, in the order of their ids."""
        return (*self.named.values(), *self.special_tokens)


def train_tokenizer(
    files: Sequence[str], output: Path, training: Training, advance: Advance | None = None
) -> tuple[Tokenizer, bool]:
    """The tokenizer trained on files of text, written to a new folder; an equal earlier result there is reused, which
    the second value says. `advance` is told of the bytes read."""
    records = open_source(files, None)
    digest, size = hashlib.sha256(), 0
    for text in texts_of(records, training):  # also finds what is wrong with the rows, before the long part
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)
        size += len(raw)
        if advance is not None:
            advance(len(raw))
    if not size:
        raise UsageError(f"no text in {', '.join(map(str, files))}")
    made_of = {**asdict(training), "special_tokens": list(training.special_tokens), "bytes": size}
    made_of["sha256"] = digest.hexdigest()
    if _is_there(output, made_of):
        return load_tokenizer(output), True
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as beside:
        folder = Path(beside) / output.name
        folder.mkdir()
        write = _write_byte_bpe if training.kind == "byte_bpe" else _write_pieces
        write(records, training, folder)
        if training.chat_template is not None:
            (folder / "chat_template.jinja").write_text(training.chat_template, encoding="utf-8")
        tokenizer = load_tokenizer(folder)
        _check(tokenizer, training)
        hashes = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
        (folder / RECORD).write_text(json.dumps({**made_of, "files": hashes}, indent=2) + "\n", encoding="utf-8")
        if output.is_dir():
            output.rmdir()  # empty, as _is_there has seen
        shutil.move(folder, output)
    return load_tokenizer(output), False


def _is_there(output: Path, made_of: Mapping[str, Any]) -> bool:
    """Whether the folder holds the same result already; UsageError when it holds anything else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    why = "is not empty and no tokenizer that this command made"
    if (output / RECORD).is_file():
        try:
            before = json.loads((output / RECORD).read_text(encoding="utf-8"))
            files = before.pop("files")
            changed = [key for key in made_of if before.get(key) != made_of[key]]
            changed += [
                name for name in files if not (output / name).is_file() or _sha256(output / name) != files[name]
            ]
        except (ValueError, AttributeError, KeyError):
            changed = [RECORD]
        if not changed:
            return True
        why = f"holds a tokenizer made otherwise (different: {', '.join(changed)})"
    raise UsageError(f"--output '{output}' {why}: choose another folder, or delete it")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def texts_of(records: Records, training: Training) -> Iterator[str]:
    """The texts of the rows: a column, or text, messages' contents, prompts and completions; the first limit_bytes."""
    left = training.limit_bytes
    for index in range(len(records)):
        try:
            parts = _parts(records[index], training.column)
        except ValueError as error:
            where = records.where(index)
            raise UsageError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error
        for text in filter(None, parts):
            if left is not None:
                raw = text.encode("utf-8", "surrogatepass")[:left]
                text, left = raw.decode("utf-8", "ignore"), left - len(raw)
            if text:
                yield text
            if left == 0:
                return


def _parts(row: Mapping[str, Any], column: str | None) -> list[str]:
    if column is not None:
        if not isinstance(row.get(column), str):
            raise ValueError(f"the row has no text in --column '{column}' (its keys: {', '.join(row) or 'none'})")
        return [row[column]]
    form = normalise(row)
    if "tokens" in form:
        raise ValueError("the row holds token ids, not text")
    found = []
    for value in (form.get(key) for key in ("text", "prompt", "messages", "completion", "chosen", "rejected")):
        turns = value if isinstance(value, list) else [{"content": value}]
        found += [turn.get("content") for turn in turns if isinstance(turn, Mapping)]
    return [text for text in found if isinstance(text, str)]


def _write_byte_bpe(records: Records, training: Training, folder: Path) -> None:
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    words = Regex(WORDS.replace("{digits}", "" if training.digits else "{1,3}"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.post_processor = processors.ByteLevel(trim_offsets=False)  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=training.vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in training.tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(texts_of(records, training), trainer)
    found = backend.get_vocab_size()
    if found < training.vocab_size:
        raise UsageError(
            f"--vocab-size {training.vocab_size} is too large for this text, which gives {found} tokens: take at most "
            "that, or more text"
        )
    wrap_fast(backend, training.named).save(folder)


def _write_pieces(records: Records, training: Training, folder: Path) -> None:
    import sentencepiece

    model = io.BytesIO()
    names: dict[str, Any] = {f"{name.removesuffix('_token')}_piece": token for name, token in training.named.items()}
    ids: dict[str, Any] = {f"{name.removesuffix('_token')}_id": i for i, name in enumerate(training.named)}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts_of(records, training)),
            model_writer=model,
            model_type=training.kind,
            vocab_size=training.vocab_size,
            control_symbols=list(training.special_tokens),
            byte_fallback=True,
            split_digits=training.digits,
            # the text comes back as it was, code's spaces included
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            num_threads=THREADS,
            minloglevel=2,
            **names,
            **ids,
        )
    except RuntimeError as error:
        said = str(error).rpartition("] ")[2] or str(error)
        if "ocabulary size" in said:
            raise UsageError(f"--vocab-size {training.vocab_size} does not fit this text: {said}") from error
        raise RunError(f"sentencepiece failed: {error}") from error
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    if training.kind == "unigram":
        return _write_unigram(model.getvalue(), training, folder)
    added = {str(i): {"content": token, "special": True, **PLAIN} for i, token in enumerate(training.tokens)}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        **training.named,
        "added_tokens_decoder": added,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_unigram(model: bytes, training: Training, folder: Path) -> None:
    """A tokenizer.json beside it: transformers takes a bare tokenizer.model for BPE."""
    import sentencepiece
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Backend

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)  # pyright: ignore[reportCallIssue]
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    backend = Backend(models.Unigram(vocabulary, unk_id=pieces.unk_id(), byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", SPACE)  # type: ignore[assignment]
    backend.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in training.tokens])
    wrap_fast(backend, training.named).save(folder)


SPACE = "\u2581"  # sentencepiece writes it for a space
PLAIN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def _sentences(texts: Iterator[str]) -> Iterator[str]:
    """Lines, as sentencepiece wants them: not too long."""
    for text in texts:
        for line in text.splitlines(keepends=True):
            step = SENTENCE if line.isascii() else SENTENCE // 4
            yield from (line[at : at + step] for at in range(0, len(line), step))


def _check(tokenizer: Tokenizer, training: Training) -> None:
    """Every special token is one id, the text comes back, and the template can be rendered."""
    for token in training.tokens:
        if token in training.special_tokens or token != PIECE_SPECIALS["unk_token"]:
            if tokenizer.encode(token) != [tokenizer.special_tokens.get(token)]:
                raise RunError(f"special token '{token}' does not come back as one id: {tokenizer.encode(token)}")
    text = "  def f(x):\n\treturn 'é中🙂' \r\n\n"
    if (back := tokenizer.decode(tokenizer.encode(text))) != text:
        raise RunError(f"the tokenizer does not give text back: {text!r} became {back!r}")
    if training.chat_template is not None:
        tokenizer.render([{"role": "user", "content": "a"}], add_generation_prompt=True)
