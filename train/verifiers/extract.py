"""What a completion says in the end: its text, its answer, the numbers and the blocks of code in it."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

Where = Literal["auto", "tag", "boxed", "hash", "number", "all"]
_SIGN, _POWER = r"(?:(?<![\w)])[-+−])?", r"(?:[eE][-+]?\d{1,3})?"
NUMBER = rf"{_SIGN}(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?{_POWER}|{_SIGN}\.\d+{_POWER}"
_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d{1,30})\}\{(\d{1,30})\}")
_TAIL = 10_000  # characters from the end in which a number is looked for


def text_of(value: Any) -> str:
    """The text of a prompt or completion: one message's content, or a conversation with its roles."""
    if isinstance(value, str):
        return value
    if len(value) == 1:
        return str(value[0].get("content") or "")
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in value)


def answer_of(text: str, where: Where = "auto") -> str | None:
    """The final answer in a text, or None.

    tag: in the last <answer>..</answer>; boxed: in the last \\boxed{..}; hash: behind the last "####" (GSM8K's form),
    to the end of its line; number: the last number; all: the whole text. auto: the first of tag, boxed and hash that is
    there, looked for in the tag as well.
    """
    match where:
        case "tag":
            end = text.rfind("</answer>")
            begin = text.rfind("<answer>", 0, max(end, 0))
            return None if end < 0 or begin < 0 else text[begin + len("<answer>") : end].strip()
        case "boxed":
            return _boxed(text)
        case "hash":
            _, found, rest = text.rpartition("####")
            return rest.strip().partition("\n")[0].strip() if found else None
        case "number":
            numbers = numbers_of(text)
            return numbers[-1] if numbers else None
        case "all":
            return text.strip()
    tagged = answer_of(text, "tag")
    inside = text if tagged is None else tagged
    found = next((one for how in ("boxed", "hash") if (one := answer_of(inside, how)) is not None), None)
    return tagged if found is None else found


def _boxed(text: str) -> str | None:
    for name in ("\\boxed{", "\\fbox{"):
        begin = text.rfind(name)
        depth = 0
        for at in range(begin + len(name) - 1, len(text)) if begin >= 0 else ():
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                return text[begin + len(name) : at].strip()
    return None


def numbers_of(text: str) -> list[str]:
    """The numbers in the end of a text, as written, a percent sign or a denominator included."""
    text = _FRACTION.sub(r"\1/\2", text[-_TAIL:].replace("\\%", "%"))
    return [one.group() for one in re.finditer(rf"(?:{NUMBER})(?:\s?/\s?\d{{1,30}}(?![\d.])|\s?%)?", text)]


def values_of(number: str) -> list[float]:
    """What a number as written may mean: 1,234.5; 3/4; 12% is both 0.12 and 12."""
    plain = number.replace(",", "").replace("−", "-").replace(" ", "")
    try:
        if plain.endswith("%"):
            values = [float(plain[:-1]) / 100, float(plain[:-1])]
        elif "/" in plain:
            over, under = plain.split("/")
            values = [float(over) / float(under)]
        else:
            values = [float(plain)]
    except (ValueError, ZeroDivisionError):
        return []
    return [value for value in values if math.isfinite(value)]


def reference_of(columns: Mapping[str, Sequence[Any]], names: str | Sequence[str], count: int) -> list[Any]:
    """For each row what the first of these columns holds that the row has; None where it has none."""
    names = [names] if isinstance(names, str) else names
    have: list[Iterable[Any]] = [columns[name] for name in names if name in columns]
    rows = zip(*have, strict=True) if have else [()] * count
    return [next((one for one in row if one is not None), None) for row in rows]


def block_of(text: str, language: str) -> str:
    """The last fenced block of this language, else the last of any, else the whole text."""
    blocks, kind, lines = [], None, list[str]()
    for line in text.splitlines():
        fence = line.strip()
        if not fence.startswith("```"):
            lines.append(line)
        elif kind is None:
            kind, lines = fence.strip("`").strip().lower(), []
        else:
            blocks.append((kind, "\n".join(lines)))
            kind, lines = None, []
    if kind is not None:  # cut off before its end
        blocks.append((kind, "\n".join(lines)))
    same = [body for kind, body in blocks if kind.startswith(language)]
    return (same or [body for _, body in blocks] or [text])[-1]
