"""The commands generate, score and chat. Heavy libraries are imported inside them: --help answers at once."""

import sys
from typing import Annotated, Any

import typer

from configs.errors import UsageError
from decode.options import with_sampling
from decode.sampling import Sampling

MODEL_HELP = "Short name (smollm2-135m-instruct), hub id, Hugging Face folder, GGUF file or run folder."
FIELDS = ("tokens", "text", "logprobs", "score", "finish_reason")
MORE = ("top_logprobs", "prompt_tokens", "prompt_logprobs", "prompt_top_logprobs")  # where they were asked for

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Input = Annotated[str | None, typer.Option("--input", "-i", metavar="FILE", help="JSON lines in; - is standard input.")]
Output = Annotated[str | None, typer.Option("--output", "-o", metavar="FILE", help="JSON lines out, written whole.")]
Json = Annotated[bool, typer.Option("--json", help="JSON lines on standard output instead of text.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows at a time; a finished row's place is taken by the next.")]
Dtype = Annotated[str, typer.Option(help="auto, float32 or bfloat16; auto is bfloat16 on GPU and TPU.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt; default: the template's own.")]
Rows = list[tuple[str, str, Any]]  # where it stands, its key, its value


@with_sampling(max_new_tokens=256)
def generate(
    model: ModelName,
    sampling: Sampling,
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
    batch_size: BatchSize = 8,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds; what is not done then ends as it is.")] = None,
    cache_dtype: Annotated[str | None, typer.Option(help="KV cache: bfloat16, int8; default: as computed.")] = None,
    draft: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A smaller model that guesses ahead; same result, sooner.")
    ] = None,
    dtype: Dtype = "auto",
) -> None:
    """Complete prompts: from arguments, standard input (one prompt), or JSON lines.

    Prompts from arguments and standard input go through the model's chat template if it has one
    (--raw: never, --chat: it must have one).

    Rows of --input say what they are: {"prompt": raw text}, {"messages": [...]} or {"tokens": [...]}.
    Each gives {"completions": [{"tokens", "text", "logprobs", "score", "finish_reason"}, ...]}, and "top_logprobs",
    "prompt_logprobs" where asked for.
    """
    from decode.jsonl import check_writable, dump_row, write_rows

    if input is not None and (prompts or chat is not None or system is not None):
        raise UsageError("--input is given: its rows say what they are, so no PROMPTS, --chat, --raw or --system")
    check_writable(output)
    rows = _prompt_rows(prompts, input)
    loaded = load(model, dtype)
    more = {"timeout": timeout, "cache_dtype": cache_dtype, "draft": None if draft is None else load(draft, dtype)}
    if input is None:
        rows = _as_questions(loaded, rows, chat, system)
    plain = not any(value is not None for value in more.values()) and sampling.num_beams == sampling.samples == 1
    single = len(rows) == 1 and sampling.num_return_sequences == 1 and input is None and output is None and not json
    if single and plain and not sampling.penalty_alpha and sampling.guidance_scale == 1 and sys.stdout.isatty():
        _stream(loaded, rows, sampling)
        return
    results = _complete(loaded, rows, sampling, batch_size, more)
    lines = [{"completions": [_row(c, sampling) for c in row]} for row in results]
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


def _row(completion: Any, sampling: Sampling) -> dict[str, Any]:
    """A completion as JSON: what is always told, and what was asked for."""
    from decode.jsonl import as_row

    names = [name for name in MORE if getattr(completion, name) is not None]
    return as_row(completion, (*FIELDS, *(n for n in names if n != "prompt_tokens" or sampling.prompt_logprobs)))


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


def _complete(model: Any, rows: Rows, sampling: Sampling, batch_size: int, more: dict[str, Any]) -> list[list[Any]]:
    """All completions of each row."""
    from decode.generate import check_fits
    from decode.generate import generate as complete
    from decode.jsonl import rows_bar, token_rows

    tokens = token_rows(rows, model.tokenizer, model.arch.vocab_size, model.arch.max_position)
    for (where, key, _), row in zip(rows, tokens, strict=True):
        check_fits(model, row, sampling, f"{where}: '{key}'")
    each = sampling.num_return_sequences
    size = min(batch_size, len(tokens) * max(sampling.samples, sampling.num_beams))
    with rows_bar("generating", len(tokens) * each) as progress:
        flat = complete(model, tokens, sampling, batch_size=size, progress=progress, **more)
    return [flat[i : i + each] for i in range(0, len(flat), each)]


def _stream(model: Any, rows: Rows, sampling: Sampling) -> None:
    """One completion, shown as it comes."""
    from decode.jsonl import token_rows
    from decode.stream import stream

    row = token_rows(rows, model.tokenizer, model.arch.vocab_size, model.arch.max_position)[0]
    if sampling.echo:
        print(model.tokenizer.decode(row, skip_special=True), end="")
    for piece in stream(model, row, sampling):
        print(piece, end="", flush=True)
    print()


def score(
    model: ModelName,
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXTS", help="Texts; none: --input.")] = None,
    input: Input = None,
    output: Output = None,
    json: Json = False,
    top: Annotated[int, typer.Option(min=0, help="Tell so many likeliest tokens at each place too.")] = 0,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
) -> None:
    """Per-token log-probs and perplexity of texts or token ids; rewards, if MODEL is a reward model.

    Rows of --input are {"text": ...} or {"tokens": [...]}. Each gives {"tokens": [...], "logprobs": [...]}:
    logprobs[i] = log p(tokens[i+1] | tokens[..i]) in nats; with --top also "top_logprobs".

    Without --output or --json: one line of perplexity a row.

    A reward model gives {"tokens", "rewards": [by each head], "reward": their mean}. It takes {"messages": [...]} too.
    One of processes takes {"prompt", "completions": [steps]} and gives the log-odds of each step and the least of them.
    """
    from decode.jsonl import SCORE_KEYS, as_row, check_writable, read_rows, rows_bar, token_rows

    if (input is None) == (not texts):
        raise UsageError("give either TEXTS or --input FILE")
    check_writable(output)
    texts = texts or []
    rows = (
        read_rows(input, SCORE_KEYS)
        if input is not None
        else [(f"text {i}", "text", t) for i, t in enumerate(texts, 1)]
    )
    loaded = load(model, dtype, rewards=True)
    if loaded.arch.num_labels:
        _tell_rewards(loaded, rows, batch_size, output, json)
        return
    if wrong := [where for where, key, _ in rows if key not in ("text", "tokens")]:
        raise UsageError(f"{wrong[0]}: a language model scores {{'text': ...}} or {{'tokens': [...]}}")
    from decode.score import perplexity
    from decode.score import score as score_rows

    tokens = token_rows(rows, loaded.tokenizer, loaded.arch.vocab_size, loaded.arch.max_position)
    with rows_bar("scoring", len(tokens)) as progress:
        results = score_rows(loaded, tokens, batch_size=min(batch_size, len(tokens)), top=top, progress=progress)
    names = ("tokens", "logprobs", "top_logprobs") if top else ("tokens", "logprobs")
    texts = [f"perplexity {perplexity([result]):.4f}  {len(result.logprobs)} predicted tokens" for result in results]
    _tell([as_row(result, names) for result in results], texts, output, json)
    count = sum(len(result.logprobs) for result in results)
    print(f"all rows: perplexity {perplexity(results):.4f}  {count} predicted tokens", file=sys.stderr)


def _tell_rewards(model: Any, rows: Rows, batch_size: int, output: str | None, json: bool) -> None:
    """Judge and show."""
    from decode.jsonl import as_row, rows_bar
    from decode.reward import judge

    with rows_bar("judging", len(rows)) as progress:
        results = judge(model, rows, batch_size=min(batch_size, len(rows)), progress=progress)
    texts = []
    for result in results:
        more = " of " + ", ".join(f"{reward:.4f}" for reward in result.rewards) if len(result.rewards) > 1 else ""
        texts.append(f"reward {result.reward:.4f}{more}  {len(result.tokens)} tokens")
    _tell([as_row(result, ("tokens", "rewards", "reward")) for result in results], texts, output, json)


def _tell(lines: list[dict[str, Any]], texts: list[str], output: str | None, json: bool) -> None:
    """Rows to a file, to standard output as JSON, or as text."""
    from decode.jsonl import dump_row, write_rows

    if output is not None:
        write_rows(output, lines)
    if json or output is None:
        for line, text in zip(lines, texts, strict=True):
            print(dump_row(line) if json else text)


def evaluate(
    model: ModelName,
    data: Annotated[list[str], typer.Option("--data", metavar="FILE", help="JSONL or Parquet of preferences.")],
    json: Json = False,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
) -> None:
    """How often a model prefers the better of two answers: held-out pairs {"prompt", "chosen", "rejected"}.

    A reward model by its reward; a language model by the sum and by the mean of the answer's log-probs. Also by length:
    a model that only likes length is right where the better answer is longer, and wrong where it is shorter.
    """
    loaded = load(model, dtype, rewards=True)
    from dataclasses import asdict

    from decode.jsonl import dump_row, rows_bar
    from decode.reward import compare, read_pairs

    pairs = read_pairs(loaded, data)
    with rows_bar("comparing", 2 * len(pairs)) as progress:
        found = compare(loaded, pairs, batch_size=min(batch_size, 2 * len(pairs)), progress=progress)
    if json:
        print(dump_row({name: asdict(result) for name, result in found.items()}))
        return
    for name, result in found.items():
        values = f"mean margin {result.margin:.4f}, values {result.lowest:.4f} to {result.highest:.4f}"
        print(f"{name}: {result.accuracy:.1%} of {result.pairs} pairs right, {values}")
        for group, (share, count) in result.by_length.items():
            if count:
                print(f"  {group.replace('_', ' ')}: {share:.1%} of {count}")


@with_sampling(max_new_tokens=512, temperature=0.7, top_p=0.9)
def chat(model: ModelName, sampling: Sampling, system: System = None, dtype: Dtype = "auto") -> None:
    """Talk to a model in the terminal; /help lists the commands there."""
    from decode.stream import check_single

    check_single(sampling)
    loaded = load(model, dtype)
    from decode.chat import run_chat

    run_chat(loaded, sampling, system)


def load(name: str, dtype: str, rewards: bool = False) -> Any:
    """Load a MODEL, compiled programs kept on disk; rewards: it may be a reward model."""
    from sharding.compile_cache import enable_compilation_cache

    enable_compilation_cache()
    from decode.load import load_model

    return load_model(name, dtype=dtype, rewards=rewards)
