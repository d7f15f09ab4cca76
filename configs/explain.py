"""Refusals in words: what was given, what is allowed, where it was written, which key was probably meant."""

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from configs.schema import SECTIONS, knobs
from configs.section import Section
from configs.source import KeyPath, Place, Places, show

FIELDS: dict[str, FieldInfo] = dict(knobs())

# What other stacks call it. Only for error messages: each knob has one name here.
ELSEWHERE = {
    "lr": "optim.learning_rate",
    "lr_scheduler_type": "optim.schedule",
    "warmup": "optim.warmup_steps",
    "adam_beta1": "optim.b1",
    "adam_beta2": "optim.b2",
    "adam_epsilon": "optim.eps",
    "grad_clip": "optim.max_grad_norm",
    "optimizer": "optim.name",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.microbatches",
    "eval_steps": "train.eval_every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "logging_steps": "log.every",
    "output_dir": "output",
    "model_name_or_path": "model.source",
    "tokenizer_name_or_path": "model.tokenizer",
    "resize_token_embeddings": "model.resize_vocab",
    "bf16": "model.dtype",
    "gradient_checkpointing": "model.remat",
    "attn_implementation": "model.attention",
    "max_seq_length": "data.max_length",
    "num_return_sequences": "sample.num_generations",
    "reward_funcs": "sample.reward",
    "max_completion_length": "sample.max_new_tokens",
    "max_seq_len": "data.max_length",
    "dataset": "data.train",
    "train_file": "data.train",
    "assistant_only_loss": "data.train_on",
    "completion_only_loss": "data.completion_only",
    "packing_strategy": "data.packing",
    "lora": "tune.method",
    "lora_r": "tune.r",
    "rank": "tune.r",
    "alpha": "tune.lora_alpha",
    "loss_type": "objective.type",
    "adv_estimator": "objective.advantage",
    "kl_coef": "objective.beta",
    "vllm_importance_sampling_mode": "objective.importance_sampling_correction",
    "merge_adapter": "export.merge",
}


def nearest(dotted: str) -> str | None:
    """The knob or section that an unknown dotted name probably means."""
    section, _, leaf = dotted.rpartition(".")
    if leaf in ELSEWHERE:
        return ELSEWHERE[leaf]
    names = [*FIELDS, *SECTIONS]
    same = [name for name in names if name.rpartition(".")[2] == leaf]
    if same:
        return difflib.get_close_matches(dotted, same, n=1, cutoff=0)[0]
    neighbours = [name for name in FIELDS if name.startswith(f"{section}.")]
    for pool, cutoff in ((neighbours, 0.6), (names, 0.6)):
        found = difflib.get_close_matches(dotted, pool, n=1, cutoff=cutoff)
        # 'optim.zzz' is close to 'optim.eps' only by the section they share.
        if found and difflib.SequenceMatcher(None, leaf, found[0].rpartition(".")[2]).ratio() >= 0.5:
            return found[0]
    tails = {name.rpartition(".")[2]: name for name in reversed(names)}
    found = difflib.get_close_matches(leaf, tails, n=1, cutoff=0.6)
    return tails[found[0]] if found else None


def unknown_key(dotted: str, place: Place) -> str:
    """The sentence for a key that does not exist."""
    if dotted in FIELDS:
        section, _, leaf = dotted.partition(".")
        return f"{place}: '{dotted}' is written nested in a recipe: the section '{section}:' and '{leaf}:' in it"
    hint = nearest(dotted)
    section = dotted.partition(".")[0]
    if hint:
        return f"{place}: unknown key '{dotted}'; the nearest is '{hint}'"
    if section in SECTIONS:
        return f"{place}: unknown key '{dotted}'; known in {section}: {', '.join(SECTIONS[section].model_fields)}"
    return f"{place}: unknown key '{dotted}'; known: base, output, {', '.join(SECTIONS)}"


def allowed(field: FieldInfo) -> str:
    """The values a knob takes, in words: 'a whole number, at least 1, or null'."""
    words, nullable = _words(field.annotation, field.metadata)
    return f"{words}, or null" if nullable else words


def _words(kind: Any, metadata: list[Any]) -> tuple[str, bool]:
    if get_origin(kind) is Annotated:
        kind, *inner = get_args(kind)
        return _words(kind, [*inner, *metadata])
    members = get_args(kind)
    if get_origin(kind) is Literal:
        return _either([str(m) for m in members]), False
    if get_origin(kind) is tuple:
        item, _ = _words(members[0], [])
        empty = "a non-empty list" if _limit(metadata, "min_length") else "a list"
        return f"{empty} of {item}", False
    if get_origin(kind) is dict:
        if get_origin(members[1]) is tuple:
            axes = "data, fsdp, tensor, context, expert, stage, a list of them, or null"
            return f"a mapping of logical axis to {axes}", False
        return f"a mapping of {_words(members[0], [])[0]} to {_words(members[1], [])[0]}", False
    if isinstance(kind, type) and issubclass(kind, Section):
        return f"a mapping with the keys {', '.join(kind.model_fields)}", False
    if members and (get_origin(kind) is Union or type(kind).__name__ == "UnionType"):
        parts = [_words(m, metadata)[0] for m in members if m is not type(None)]
        return " or ".join(parts), type(None) in members
    noun = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, str(kind))
    limits = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
    bounds = [f"{word} {bound:g}" for name, word in limits if (bound := _limit(metadata, name)) is not None]
    return ", ".join([noun, " and ".join(bounds)] if bounds else [noun]), False


def _limit(metadata: list[Any], name: str) -> Any:
    for item in metadata:
        if isinstance(item, FieldInfo):
            inner = _limit(item.metadata, name)
            if inner is not None:
                return inner
        elif getattr(item, name, None) is not None:
            return getattr(item, name)
    return None


def _either(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


def refusal(error: ValidationError, given: Mapping[str, Any], places: Places) -> str:
    """One sentence for each knob that the schema refuses."""
    sentences: dict[str, str] = {}
    for one in error.errors(include_url=False):
        loc = tuple(str(part) for part in one["loc"])
        path = loc[:2] if loc[:1] and loc[0] in SECTIONS else loc[:1]
        key = ".".join(path)
        if one["type"] == "value_error":
            sentences.setdefault(one["msg"], _relation(one["msg"].removeprefix("Value error, "), places))
        elif one["type"] == "missing":
            sentences.setdefault(key, _missing(key))
        else:
            inside = f"; at {'.'.join(loc)}: {one['msg']}" if isinstance(_value(path, given), Mapping) else ""
            sentences.setdefault(key, _refused(path, given, places) + inside)
    return "\n".join(sentences.values())


def _missing(key: str) -> str:
    names = [n for n, field in FIELDS.items() if (n == key or n.startswith(f"{key}.")) and field.is_required()]
    return "\n".join(
        f"{name} is missing ({FIELDS[name].description}): set it in the recipe or give {name}=... on the command line"
        for name in names
    )


def _relation(message: str, places: Places) -> str:
    """A refusal of several knobs together names them; their places follow."""
    named = [tuple(name.split(".")) for name in re.findall(r"\b[a-z]+\.\w+", message)]
    where = dict.fromkeys(str(places[path]) for path in named if path in places)
    return f"{message} ({', '.join(where)})" if where else message


def _value(path: KeyPath, given: Mapping[str, Any]) -> Any:
    value: Any = given
    for part in path:
        value = value[part]
    return value


def _refused(path: KeyPath, given: Mapping[str, Any], places: Places) -> str:
    value = _value(path, given)
    field = FIELDS[".".join(path)]
    sentence = f"{'.'.join(path)} is {show(value)}, allowed: {allowed(field)}"
    extra = field.json_schema_extra
    if isinstance(extra, dict):
        sentence += f" ({extra['why']})"
    options = [str(option) for option in _options(field.annotation)]
    texts = (
        [value]
        if isinstance(value, str)
        else [v for v in value if isinstance(v, str)]
        if isinstance(value, list)
        else []
    )
    for text in texts:
        close = difflib.get_close_matches(text, options, n=1)
        if text not in options and close:
            sentence += f"; did you mean {close[0]}?"
    if isinstance(value, str) and re.fullmatch(r"[-+.\deE]+", value) and "number" in allowed(field):
        sentence += "; it is text here: remove the quotes"
    place = places.get(path) or places.get(path[:1])
    return f"{place}: {sentence}" if place else sentence


def _options(kind: Any) -> list[Any]:
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [option for inner in get_args(kind) for option in _options(inner)]
