"""What can be known before anything is compiled: the data as the model will see it, the counts, the memory."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console

from configs.errors import RunError, UsageError
from configs.schema import Run
from convert.load import Source, load_tokenizer
from convert.vocabulary import check_vocabulary
from data.chat import end_of_turn
from data.examples import Examples, open_examples
from data.formats import normalise
from data.loader import Loader, Ramp
from data.mixture import open_mixture
from data.pack import shifted
from data.pairs import CHOSEN, REJECTED
from data.show import show_data as show_rows
from data.show import trained_texts, trained_tokens
from data.stats import summarise
from model.architecture import Architecture
from model.tree import count
from sharding.platform import device_memory
from train.recipes import kind_of
from train.setup import Job, portion_of, source_of
from train.state import State

GIB = 2**30


def open_data(run: Run, source: Source) -> tuple[Loader, dict[str, Examples]]:
    """The training loader and the held-out sets by name; every held-out row has been tokenised and checked once."""
    tokenizer, kind = load_tokenizer(source), kind_of(run.objective)
    examples, mixture = open_mixture(tokenizer, run.data, kind)
    held_out = {
        name: open_examples(paths, examples.tokenizer, run.data, kind) for name, paths in run.data.held_out.items()
    }
    if run.train.eval_batches is None:  # else only some of them are ever needed
        for one in held_out.values():
            one.scan()
    processes = jax.process_index(), jax.process_count()
    train = run.train
    ramp = Ramp(train.batch_size, train.batch_warmup_start, train.batch_warmup_steps, portion_of(run).rows)
    loader = Loader(
        examples, run.data, train.batch_size, run.data.seed, *processes, epochs=train.epochs, mixture=mixture, ramp=ramp
    )
    check_tokens(loader, source.arch)
    return loader, held_out


def check_tokens(loader: Loader, arch: Architecture) -> None:
    """The tokenizer fits the model; where the data is chat, ends of turns are among the trained tokens."""
    tokenizer = loader.examples.tokenizer
    check_vocabulary(tokenizer, arch)
    if not tokenizer.eos_ids:
        raise UsageError("the tokenizer has no end-of-sequence token: a model trained with it could never stop")
    # the first row that gives an example: a malformed one is refused, or counted and skipped, as data.on_bad_row says
    kept = next((i for i in range(len(loader.examples)) if loader.examples[i] is not None), None)
    if kept is None:
        return loader.examples.check_not_empty()
    form = normalise(loader.examples.record(kept), loader.data.format)
    spoken = [value for key, value in form.items() if key != "tools" and isinstance(value, list)]
    if any(isinstance(turn, Mapping) for turns in spoken for turn in turns):
        check_ends(loader)


def check_ends(loader: Loader) -> None:
    """Raise UsageError when no end of turn is trained; of pairs, in the chosen or in the rejected completions."""
    examples, tokenizer = loader.examples, loader.examples.tokenizer
    ends = set(tokenizer.eos_ids)
    if (turn := end_of_turn(tokenizer)) in tokenizer.special_tokens:  # the template may end turns otherwise than EOS
        ends.add(tokenizer.special_tokens[turn])
    seen: set[int] = set()
    ended: set[int] = set()
    for columns in (shifted(e) for e in (examples[i] for i in range(len(examples))) if e is not None):
        branches, trained = columns.get("branches", np.zeros_like(columns["targets"])), columns["weights"] > 0
        seen |= set(branches[trained].tolist())
        ended |= set(branches[trained & np.isin(columns["targets"], list(ends))].tolist())
        if seen and seen == ended:
            return
    examples.check_not_empty()
    whose = {CHOSEN: " of a chosen completion", REJECTED: " of a rejected completion"}.get(min(seen - ended), "")
    names = ", ".join(repr(tokenizer.decode([i])) for i in sorted(ends))
    raise UsageError(
        f"no trained token{whose} is an end of turn ({names}): the model would never learn to stop; usual cause: "
        "data.chat_template ends its turns with another token, or data.max_length cuts every answer"
    )


def show_data(run: Run) -> None:
    """`purestep data show`: statistics, and the first rows with the tokens that carry loss in colour."""
    loader, _ = open_data(run, source_of(run))
    show_rows(loader, Console(), summary=summarise(loader))


def show_examples(job: Job, loader: Loader) -> None:
    """Print the data's statistics and what carries loss in the first row."""
    console = Console(stderr=True, highlight=False)
    tokenizer = loader.examples.tokenizer
    for line in summarise(loader).lines():
        console.print(line, markup=False)
    if next(loader.windows(0)):
        first = Loader(loader.examples, job.run.data, 1, loader.seed, epochs=1)
        batch = next(iter(first))
        first.close()
        texts = trained_texts({name: column[0] for name, column in batch.items()}, tokenizer)
        shown = " | ".join(text.strip() for text in texts)
        shown = shown[:300] + ("..." if len(shown) > 300 else "")
        console.print(f"first row, text that carries loss: {shown}", markup=False)
        if not trained_tokens(batch):
            console.print("first row: nothing in it carries loss")


def show_model(job: Job, state: State) -> None:
    """Print how many parameters are trained, on what, and the memory that it should take."""
    console = Console(stderr=True, highlight=False)
    trained, total = count(state.params), count(job.params(state))
    mesh = ", ".join(f"{axis} {size}" for axis, size in job.mesh.shape.items() if size > 1) or "1 device"
    console.print(f"{trained:,} of {total:,} parameters are trained ({trained / total:.1%}); {job.steps} steps; {mesh}")
    parts = estimate_memory(job, state)
    limit = device_memory()
    known = f" of {limit / GIB:.1f}" if limit else ""
    text = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    console.print(f"memory per device, estimated: {sum(parts.values()) / GIB:.2f}{known} GiB ({text})")


def estimate_memory(job: Job, state: State) -> dict[str, int]:
    """Bytes per device by part. Weights, state and gradients are exact; activations and logits a formula.

    Activations: what remat keeps (a block's input with 'full', its products' results with 'dots', about twice that with
    'none') for every layer, plus one block's working set.
    """
    arch, run, compute = job.arch, job.run, job.compute

    def shard(tree: Any) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)

    shape = job.mesh.shape
    split, within = math.prod(shape[a] for a in job.rules.axes("batch")), shape["tensor"]
    tokens = job.portion.rows // split * run.data.max_length // math.prod(shape[a] for a in job.rules.axes("seq"))
    heads = (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim
    e = arch.experts
    products = heads + 2 * arch.d_model + 2 * (arch.d_ff if e is None else e.top_k * e.d_ff + e.shared_d_ff)
    scores = arch.num_heads * min(run.data.max_length, 2048)
    kept = {"full": arch.d_model, "dots": products, "none": 2 * products + 2 * scores}[compute.remat]
    width = np.dtype(compute.dtype).itemsize
    trainable, stages = shard(state.params), shape["stage"]
    flowing = 3 * stages * arch.d_model * (stages > 1)  # a pipeline's micro-batches, before and behind its layers
    return {
        "weights": trainable + shard(job.frozen),
        "optimizer": shard(state.opt),
        "gradients": trainable * (1 if job.portion.microbatches == 1 else 2),
        # of its layers a stage keeps all stages' tokens: as much as of all layers its own
        "activations": tokens * width * (arch.num_layers * kept + 2 * products + 2 * scores + flowing) // within,
        "logits": 3 * 4 * min(run.objective.loss_chunk, tokens) * (arch.num_labels or arch.vocab_size) // within,
    }


def check_memory(job: Job, state: State) -> None:
    """Raise RunError when what must be there at the same time (weights, optimizer, gradients) exceeds the device."""
    parts, limit = estimate_memory(job, state), device_memory()
    needed = parts["weights"] + parts["optimizer"] + parts["gradients"]
    if limit and needed > limit:
        raise RunError(
            f"weights, optimizer and gradients need {needed / GIB:.1f} GiB per device, there are {limit / GIB:.1f}: "
            "more devices on mesh.fsdp, tune.method=lora, or optim.state_dtype=bfloat16"
        )
