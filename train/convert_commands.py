"""The commands `convert` and `inspect`. Heavy libraries are imported inside them."""

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.errors import UsageError

if TYPE_CHECKING:
    from convert.conversion import Written

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
MODEL_HELP = "Hub id, Hugging Face folder, GGUF file, run folder, adapter folder, or short name."


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help=MODEL_HELP)],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A folder, or a file that ends in .gguf.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16, float64; q8_0 for GGUF. Default: as stored."),
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="Write the adapters alone, as a PEFT folder.")] = False,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Of a safetensors file: 5GB, 500MiB.")] = "5GB",
    verify: Annotated[
        bool, typer.Option("--verify", help="Read back what was written; compare every tensor bit for bit.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there.")] = False,
) -> None:
    """Write a model as a Hugging Face folder, adapters merged, or as GGUF; whole or not at all.

    purestep convert runs/sft_lora merged --dtype bfloat16 --verify

    purestep convert meta-llama/Llama-3.2-1B llama.gguf --dtype q8_0
    """
    limit, began = read_size(max_shard_size), time.perf_counter()
    to_gguf = destination.suffix == ".gguf"
    if adapter and to_gguf:
        raise UsageError("--adapter writes a PEFT folder: give a folder, or leave it out for merged weights in GGUF")
    from convert.load import resolve

    found = resolve(source)
    if to_gguf:
        from convert.gguf_write import convert_to_gguf

        made = convert_to_gguf(found, destination, dtype=dtype, verify=verify, overwrite=overwrite)
    elif adapter:
        from convert.conversion import convert_adapter

        made = convert_adapter(found, destination, dtype=dtype, verify=verify, overwrite=overwrite)
    else:
        from convert.conversion import convert as convert_to_folder

        made = convert_to_folder(
            found, destination, dtype=dtype, max_shard_bytes=limit, verify=verify, overwrite=overwrite
        )
    print(_summary(made, time.perf_counter() - began))


def _summary(made: "Written", seconds: float) -> str:
    size = f"{made.nbytes / 1e9:.2f} GB" if made.nbytes >= 1e8 else f"{made.nbytes / 1e6:.2f} MB"
    proof = "; read back: every tensor bit for bit as meant" if made.verified else ""
    files = f" in {made.files} files" if made.files > 1 else ""
    return f"{made.path}: {made.tensors} tensors, {' and '.join(made.dtypes)}, {size}{files}, {seconds:.1f} s{proof}"


def read_size(text: str) -> int:
    """Bytes of '5GB', '500 MiB' or '1000'; UsageError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) * unit < 1:
        raise UsageError(f"--max-shard-size '{text}': a size such as 5GB, 500MB or 2GiB is expected")
    return int(float(found[1]) * unit)


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    json: Annotated[bool, typer.Option("--json", help="JSON on standard output instead of text.")] = False,
    template: Annotated[bool, typer.Option("--template", help="Also print the chat template.")] = False,
) -> None:
    """Tell what a model is: family, layers, parameters, memory, tokenizer, files; no weights are read.

    Exit code 1 where the model is not supported: then it tells why, and what could be told all the same.
    """
    from convert.inspection import inspect as look

    found = look(model)
    if json:
        from json import dumps

        print(dumps(found, ensure_ascii=False))
    else:
        from convert.inspection import render

        print(render(found, template))
    if found["problems"]:
        raise typer.Exit(1)
