"""The command line. Heavy libraries are imported inside the commands: `purestep --help` answers at once."""

import os
import sys
from typing import Annotated, Any

import typer

from configs.errors import RunError, UsageError

app = typer.Typer(
    name="purestep",
    help="Train, decode and convert language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a bug shows its plain traceback
    rich_markup_mode="rich",
)
data_app = typer.Typer(help="Look at training data.", no_args_is_help=True)
app.add_typer(data_app, name="data")

MODEL_HELP = "Short name (smollm2-135m-instruct, gemma3-270m), hub id, Hugging Face folder, GGUF file or run folder."
RECIPE_HELP = "YAML file, run folder, or the name of a shipped recipe."
COMPLETION_FIELDS = ("tokens", "text", "logprobs", "score", "finish_reason")

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help=RECIPE_HELP)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe: optim.learning_rate=1e-4")
]
Input = Annotated[str | None, typer.Option("--input", "-i", metavar="FILE", help="JSON lines in; - is standard input.")]
Output = Annotated[str | None, typer.Option("--output", "-o", metavar="FILE", help="JSON lines out, written whole.")]
Json = Annotated[bool, typer.Option("--json", help="JSON lines on standard output instead of text.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest completion, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy: the likeliest token, always.")]
TopK = Annotated[int, typer.Option(help="Sample from the k likeliest tokens; 0 is off.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens that reach this probability; 1 is off.")]
Seed = Annotated[int, typer.Option(help="Prompt number i samples with seed + i.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows at a time.")]
Dtype = Annotated[str, typer.Option(help="auto, float32 or bfloat16; auto is bfloat16 on GPU and TPU.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt; default: the template's own.")]


def main() -> None:
    """Run the command line; exit code 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    quiet()
    try:
        app(prog_name="purestep")
    except UsageError as error:
        _fail(error, 2)
    except RunError as error:
        _fail(error, 1)


def _fail(error: Exception, code: int) -> None:
    print(f"purestep: {error}", file=sys.stderr)
    raise SystemExit(code)


def quiet() -> None:
    """Silence the log lines of libraries that a user can do nothing about; their errors still show."""
    for name, value in {
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }.items():
        os.environ.setdefault(name, value)


def _version(wanted: bool) -> bool:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"purestep {version('purestep')}")
        except PackageNotFoundError:
            print("purestep (not installed)")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, decode and convert language models."""


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    show: Annotated[bool, typer.Option("--show", help="Print the resolved config and stop.")] = False,
) -> None:
    """Train by a recipe; the same command resumes.

    purestep train sft_lora.yaml data.train=rows.jsonl optim.learning_rate=1e-4
    """
    from configs.load import dump, load

    run = load(recipe, overrides or [])
    if show:
        print(dump(run), end="")
        return
    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)  # orbax tells of every file
    from train.loop import train as train_run

    train_run(run)


@data_app.command("show")
def data_show(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print the first batch as the model will see it: tokens, roles, which of them carry loss."""
    from configs.load import load

    run = load(recipe, overrides or [])
    from train.preflight import show_data

    show_data(run)


@app.command()
def generate(
    model: ModelName,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPTS", help="Texts; none: standard input.")] = None,
    input: Input = None,
    output: Output = None,
    json: Json = False,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw", help="Prompts are questions (chat template) or text to go on with.", show_default=False
        ),
    ] = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    num_return_sequences: Annotated[int, typer.Option(help="Samples per prompt.")] = 1,
    stop_token_id: Annotated[list[int] | None, typer.Option(help="Ends a completion too; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not stop at end-of-sequence tokens.")] = False,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
) -> None:
    """Complete prompts: from arguments, standard input (one prompt), or JSON lines.

    Prompts from arguments and standard input go through the model's chat template if it has one
    (--raw: never, --chat: it must have one).

    Rows of --input say what they are: {"prompt": raw text}, {"messages": [...]} or {"tokens": [...]}.
    Each gives {"completions": [{"tokens", "text", "logprobs", "score", "finish_reason"}, ...]}.
    """
    from decode.generate import Sampling
    from decode.jsonl import as_row, check_writable, dump_row, write_rows

    stops = tuple(stop_token_id or ())
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        num_return_sequences=num_return_sequences, stop_token_ids=stops, ignore_eos=ignore_eos,
    )  # fmt: skip
    if input is not None and (prompts or chat is not None or system is not None):
        raise UsageError("--input is given: its rows say what they are, so no PROMPTS, --chat, --raw or --system")
    check_writable(output)
    rows = _prompt_rows(prompts, input)
    loaded = _load(model, dtype)
    if input is None:
        rows = _as_questions(loaded, rows, chat, system)
    single = len(rows) == 1 and num_return_sequences == 1 and input is None and output is None and not json
    if single and sys.stdout.isatty():
        _stream(loaded, rows, sampling)
        return
    results = _complete(loaded, rows, sampling, batch_size)
    lines = [{"completions": [as_row(c, COMPLETION_FIELDS) for c in row]} for row in results]
    if output is not None:
        write_rows(output, lines)
    if json or (input is not None and output is None):
        for line in lines:
            print(dump_row(line))
    elif output is None:
        for i, row in enumerate(results, 1):
            for j, one in enumerate(row, 1):
                label = "" if single else f"[{i}] " if len(row) == 1 else f"[{i}.{j}] "
                print(label + one.text)


Rows = list[tuple[str, str, Any]]  # where it stands, its key, its value


def _prompt_rows(prompts: list[str] | None, path: str | None) -> Rows:
    """What to complete, before any model is loaded."""
    if path is not None:
        from decode.jsonl import GENERATE_KEYS, read_rows

        return read_rows(path, GENERATE_KEYS)
    if not prompts:
        if sys.stdin.isatty():
            raise UsageError("no prompt: give PROMPTS, --input FILE, or text on standard input")
        prompts = [sys.stdin.read().rstrip("\n")]
    return [(f"prompt {i}", "prompt", text) for i, text in enumerate(prompts, 1)]


def _as_questions(model: Any, rows: Rows, chat: bool | None, system: str | None) -> Rows:
    """Arguments as user messages where the chat template is to be used."""
    if chat is None:
        chat = model.tokenizer.chat_template is not None
    if not chat:
        if system is not None:
            raise UsageError("--system needs the chat template: this model has none, or --raw switches it off")
        return rows
    first = [] if system is None else [{"role": "system", "content": system}]
    return [(where, "messages", [*first, {"role": "user", "content": text}]) for where, _, text in rows]


def _complete(model: Any, rows: Rows, sampling: Any, batch_size: int) -> list[list[Any]]:
    """All completions of each row."""
    from decode.generate import generate
    from decode.jsonl import rows_bar, token_rows

    limits = model.arch.vocab_size, model.arch.max_position, sampling.limit(0)
    tokens = token_rows(rows, model.tokenizer, *limits)
    each = sampling.num_return_sequences
    size = min(batch_size, len(tokens) * each)
    with rows_bar("generating", len(tokens) * each) as progress:
        flat = generate(model, tokens, sampling, batch_size=size, progress=progress)
    return [flat[i : i + each] for i in range(0, len(flat), each)]


def _stream(model: Any, rows: Rows, sampling: Any) -> None:
    """One completion, shown as it comes."""
    from decode.jsonl import token_rows
    from decode.stream import stream

    limits = model.arch.vocab_size, model.arch.max_position, sampling.limit(0)
    for piece in stream(model, token_rows(rows, model.tokenizer, *limits)[0], sampling):
        print(piece, end="", flush=True)
    print()


@app.command()
def score(
    model: ModelName,
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXTS", help="Texts; none: --input.")] = None,
    input: Input = None,
    output: Output = None,
    json: Json = False,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
) -> None:
    """Per-token log-probs and perplexity of texts or token ids.

    Rows of --input are {"text": ...} or {"tokens": [...]}. Each gives {"tokens": [...], "logprobs": [...]}:
    logprobs[i] = log p(tokens[i+1] | tokens[..i]) in nats.

    Without --output or --json: one line of perplexity a row.
    """
    from decode.jsonl import SCORE_KEYS, as_row, check_writable, dump_row, read_rows, rows_bar, token_rows, write_rows

    if (input is None) == (not texts):
        raise UsageError("give either TEXTS or --input FILE")
    check_writable(output)
    texts = texts or []
    rows = (
        read_rows(input, SCORE_KEYS)
        if input is not None
        else [(f"text {i}", "text", t) for i, t in enumerate(texts, 1)]
    )
    loaded = _load(model, dtype)
    from decode.score import perplexity
    from decode.score import score as score_rows

    tokens = token_rows(rows, loaded.tokenizer, loaded.arch.vocab_size, loaded.arch.max_position)
    with rows_bar("scoring", len(tokens)) as progress:
        results = score_rows(loaded, tokens, batch_size=min(batch_size, len(tokens)), progress=progress)
    lines = [as_row(result, ("tokens", "logprobs")) for result in results]
    if output is not None:
        write_rows(output, lines)
    if json:
        for line in lines:
            print(dump_row(line))
    elif output is None:
        for result in results:
            print(f"perplexity {perplexity([result]):.4f}  {len(result.logprobs)} predicted tokens")
    count = sum(len(result.logprobs) for result in results)
    print(f"all rows: perplexity {perplexity(results):.4f}  {count} predicted tokens", file=sys.stderr)


@app.command()
def chat(
    model: ModelName,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.9,
    seed: Seed = 0,
    dtype: Dtype = "auto",
) -> None:
    """Talk to a model in the terminal; /help lists the commands there."""
    from decode.generate import Sampling

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    loaded = _load(model, dtype)
    from decode.chat import run_chat

    run_chat(loaded, sampling, system)


def _load(name: str, dtype: str) -> Any:
    """Load a MODEL, compiled programs kept on disk."""
    from sharding.compile_cache import enable_compilation_cache

    enable_compilation_cache()
    from decode.load import load_model

    return load_model(name, dtype=dtype)


if __name__ == "__main__":
    main()
