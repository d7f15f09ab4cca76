"""The sources that are trained on, opened, in the shares that the configuration wants."""

from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import UsageError
from data.examples import Examples
from data.mix import Mixture, Part
from data.sources import Records, open_source
from data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from configs.schema import Data


def open_mixture(tokenizer: Tokenizer, data: "Data", kind: str = "lm") -> tuple[Examples, Mixture]:
    """The examples of all sources that are trained on, one source after the other, and how they are mixed."""
    if data.chat_template is not None:
        tokenizer = tokenizer.with_chat_template(data.chat_template)
    opened = {name: open_source(source.train, data.format) for name, source in data.sources.items()}
    records = Records([file for one in opened.values() for file in one.files])
    examples = Examples(records, tokenizer, data, kind)
    ends = list(accumulate(len(one) for one in opened.values()))
    parts, begin = [], 0
    for (name, source), row in zip(data.sources.items(), ends, strict=True):
        end = examples.first_of(row)
        if begin == end:
            if len(opened) == 1:
                examples.check_not_empty()
            raise UsageError(f"{_key(data, name)}: no example in its {len(opened[name])} rows")
        linear = data.mix_schedule == "linear"
        parts.append(Part(name, begin, end - begin, epochs=source.epochs, linear=linear))
        begin = end
    weighted = [
        _weigh(part, source.weight, examples) for part, source in zip(parts, data.sources.values(), strict=True)
    ]
    return examples, Mixture(weighted, data.seed, data.shuffle, data.on_exhausted == "drop")


def _weigh(part: Part, weight: Any, examples: Examples) -> Part:
    """A part with its weight in examples: what is given, to the power of the temperature, over its examples' length
    where shares are of tokens."""
    data = examples.data
    mean = 1.0
    if data.mix_by == "tokens" and len(data.sources) > 1:
        mean = float(np.mean([examples.length(i) for i in range(part.start, part.start + part.size)])) or 1.0
    steps = weight if isinstance(weight, dict) else {0: part.size * mean if weight is None else weight}
    power = 1 / data.mix_temperature
    return replace(part, weights=tuple((step, steps[step] ** power / mean) for step in sorted(steps)))


def _key(data: "Data", name: str) -> str:
    return f"data.mix.{name}.train" if data.mix else f"data.{name}"
