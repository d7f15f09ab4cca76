"""The commands `tokenizer train` and `data build`. Heavy libraries are imported inside them."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from configs.errors import UsageError

tokenizer_app = typer.Typer(help="Make tokenizers.", no_args_is_help=True)

FILES_HELP = "JSONL, Parquet, Arrow, ArrayRecord, texts, folders, patterns, python_stdlib, hf://datasets/ORG/NAME."
Files = Annotated[list[str], typer.Argument(metavar="FILES", help=FILES_HELP)]


@tokenizer_app.command("train")
def train(
    files: Files,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="A new folder.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens in all, special ones included.")],
    kind: Annotated[str, typer.Option(help="byte_bpe (tokenizers), bpe or unigram (sentencepiece).")] = "byte_bpe",
    special_token: Annotated[list[str] | None, typer.Option(metavar="TOKEN", help="One more; repeatable.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(metavar="FILE", help="A jinja file, or chatml (which brings its special tokens).")
    ] = None,
    fim: Annotated[bool, typer.Option("--fim", help="Special tokens for filling in the middle.")] = False,
    digits: Annotated[bool, typer.Option(help="Each digit is a token of its own.")] = True,
    limit_bytes: Annotated[int | None, typer.Option(min=1, help="Use the first so many bytes of text.")] = None,
    column: Annotated[str | None, typer.Option(help="The rows' text; default: text, or messages' contents.")] = None,
) -> None:
    """Train a tokenizer; the same text and options make the same files.

    purestep tokenizer train python_stdlib --vocab-size 4096 --output tokenizer
    """
    from data.train_tokenizer import CHATML, FIM, Training, train_tokenizer

    special = [*(FIM if fim else ()), *(special_token or ())]
    template = None
    if chat_template == "chatml":
        template = CHATML
        special = [*(token for token in ("<|im_start|>", "<|im_end|>") if token not in special), *special]
    elif chat_template is not None:
        if not Path(chat_template).is_file():
            raise UsageError(f"--chat-template '{chat_template}' is neither chatml nor a file")
        template = Path(chat_template).read_text(encoding="utf-8")
    training = Training(kind, vocab_size, tuple(special), template, digits, limit_bytes, column)
    with _bar("reading text", None, "bytes") as advance:
        tokenizer, reused = train_tokenizer(files, output, training, advance)
    print(f"{output}: {kind}, {tokenizer.vocab_size} tokens{', made before from the same' if reused else ''}")


def build(
    files: Annotated[list[str], typer.Argument(metavar="RECIPE|FILES", help=f"{FILES_HELP} Or a recipe's YAML file.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="A new or unfinished folder.")],
    tokenizer: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A MODEL or a tokenizer's folder; default: the recipe's model.")
    ] = None,
    shards: Annotated[int | None, typer.Option(min=1, help="Default: 16, or one for 256 MiB.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes; the result is the same.")] = 1,
    add_eos: Annotated[
        bool | None, typer.Option("--add-eos/--no-add-eos", help="End texts with EOS; default: as the recipe, or yes.")
    ] = None,
    on_bad_row: Annotated[str, typer.Option(help="error, or skip: leave malformed rows out, counted.")] = "error",
) -> None:
    """Tokenise documents once, into a folder that data.train takes; the same command goes on where it stopped.

    purestep data build --tokenizer tokenizer --output shards python_stdlib?part=train --workers 8

    A recipe's key=value changes may follow it.
    """
    import time

    from convert.load import open_tokenizer
    from data.build import Settings
    from data.build import build as build_shards

    if on_bad_row not in ("error", "skip"):
        raise UsageError(f"--on-bad-row '{on_bad_row}': allowed are error, skip")
    command = shlex.join(["purestep", *sys.argv[1:]])
    if Path(files[0]).suffix in (".yaml", ".yml"):
        from configs.load import load

        run = load(files[0], files[1:])
        files = [file for source in run.data.sources.values() for file in source.train]
        tokenizer = tokenizer or run.model.tokenizer or run.model.source
        add_eos = run.data.add_eos if add_eos is None else add_eos
    if tokenizer is None:
        raise UsageError("--tokenizer is missing: a MODEL, or a tokenizer's folder")
    settings = Settings(add_eos is not False, on_bad_row, shards)  # type: ignore[arg-type]
    began = time.perf_counter()
    with _bar("tokenising", None, "rows") as advance:
        told = lambda rows, tokens: advance(rows)  # noqa: E731
        made = build_shards(files, open_tokenizer(tokenizer), tokenizer, output, settings, workers, command, told)
    took = time.perf_counter() - began
    left_out = "".join(f", {made[why]} {why} left out" for why in ("empty", "malformed") if made[why])
    print(
        f"{output}: {made['documents']} documents, {made['tokens']} tokens in {len(made['shards'])} shards{left_out}; "
        f"{took:.1f} s"
    )


@contextmanager
def _bar(what: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """A function that takes how much more is done; shown on a terminal only."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description} {task.completed:,.0f} " + unit), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda more: bar.advance(task, more)
