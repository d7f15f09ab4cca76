"""The command line's options for decoding, made from Sampling's fields: one declaration of each parameter."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Annotated, Any

import typer

from configs.errors import UsageError
from decode.sampling import Sampling

PYTHON_ONLY = ("prefix_allowed_tokens", "processors")
NAMES = {"stop_token_ids": "--stop-token-id", "suppress_tokens": "--suppress-token", "logit_bias": "--logit-bias",
         "begin_suppress_tokens": "--begin-suppress-token", "allowed_token_ids": "--allowed-token-id"}  # fmt: skip
MANY = ("stop", "logit_bias", "bad_words_ids", *(name for name in NAMES if name != "logit_bias"))  # may be repeated
TEXT = {"logit_bias": "ID=BIAS", "bad_words_ids": "ID,ID,...", "exponential_decay_length_penalty": "START,FACTOR",
        "early_stopping": "true|false|never", "negative_prompt": "TEXT", "stop": "TEXT"}  # fmt: skip
WHOLE = ("max_new_tokens", "max_length", "best_of", "forced_bos_token_id", "forced_eos_token_id")
GROUPS = {
    "temperature": "Which tokens are likely", "repetition_penalty": "What was said before",
    "logit_bias": "What may be said", "stop": "When to stop", "seed": "How many, and which",
    "logprobs": "What is told", "num_beams": "Beam search", "penalty_alpha": "Other searches",
}  # fmt: skip


def with_sampling(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with an option for each field of Sampling, in place of its parameter `sampling`.

    defaults: where the command's differ from Sampling's.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command).parameters
        made, panel = [], "Length"
        for one in fields(Sampling):
            panel = GROUPS.get(one.name, panel)
            if one.name not in PYTHON_ONLY:
                made.append(_parameter(one, panel, defaults))
        taken = {parameter.name for parameter in made}

        def run(**given: Any) -> None:
            chosen = {name: value for name in taken if (value := _value(name, given.pop(name))) is not None}
            command(sampling=Sampling(**chosen), **given)

        kept = [p.replace(kind=p.KEYWORD_ONLY) for name, p in own.items() if name != "sampling"]
        run.__signature__ = inspect.Signature([*kept, *made])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*kept, *made)}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _parameter(one: Any, panel: str, defaults: dict[str, Any]) -> inspect.Parameter:
    """One field as a typer option."""
    name, default = one.name, defaults.get(one.name, {} if one.default is MISSING else one.default)
    flag = NAMES.get(name, "--" + name.replace("_", "-"))
    kind: Any = type(default)
    if name in MANY:
        kind, default = list[int] | None if name in NAMES and name != "logit_bias" else list[str] | None, None
    elif name in TEXT:
        kind, default = str | None, None
    elif name in WHOLE:
        kind = int | None
    repeated = " May be repeated." if name in MANY else ""
    option = typer.Option(
        flag, help=one.metadata["help"] + repeated, rich_help_panel=panel, metavar=TEXT.get(name)
    )  # fmt: skip
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _value(name: str, text: Any) -> Any:
    """An option's value as Sampling takes it; None: not given."""
    if text is None or name not in TEXT or name == "negative_prompt":
        return tuple(text) if isinstance(text, list) else text
    try:
        if name == "logit_bias":
            return {int(k): float(v) for k, v in (pair.split("=") for pair in text)}
        if name == "bad_words_ids":
            return tuple(tuple(map(int, word.split(","))) for word in text)
        if name == "exponential_decay_length_penalty":
            start, factor = text.split(",")
            return int(start), float(factor)
    except ValueError as error:
        raise UsageError(f"{name} is {text!r}, allowed: {TEXT[name]}") from error
    if name == "early_stopping":
        return {"true": True, "false": False}.get(text, text)
    return tuple(text)
