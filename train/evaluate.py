"""The objective's own loss on held-out data."""

import math
from itertools import chain, islice
from typing import Any

import jax
import numpy as np

from data.examples import Examples
from data.loader import Loader
from sharding.place import place_batch
from train.setup import Job
from train.state import State
from train.step import merge_sums


def evaluate(job: Job, state: State, examples: Examples, name: str = "") -> dict[str, Any]:
    """{eval_<name><metric>: average over every row of the held-out data, or its first batches}: sums and weights are
    added, then divided once. Language models: bits per byte, too, of the text that carries loss."""
    loss, most = job.evaluate, job.run.train.eval_batches
    sums: dict[str, Any] = {}
    data = job.run.data.model_copy(update={"shuffle": False})
    processes = jax.process_index(), jax.process_count()
    loader = Loader(examples, data, job.run.train.batch_size, 0, *processes, epochs=1)
    for batch in islice(loader, most):
        made = loss(state, job.frozen, place_batch(batch, job.mesh, job.rules))
        more = jax.tree.map(lambda x: np.asarray(x, np.float64), made)
        sums = merge_sums(sums, more, np) if sums else more
    loader.close()
    found = {metric: (total / weight if weight else 0 * total).tolist() for metric, (total, weight) in sums.items()}
    if examples.kind == "lm" and (count := _bytes(loader, most)):
        found["bits_per_byte"] = float(sums["loss"][0]) / math.log(2) / count
    return {f"eval_{name}{metric}": value for metric, value in found.items()}


def _bytes(loader: Loader, most: int | None) -> int:
    """UTF-8 bytes that the loss of so many batches is about; counted once."""
    known = loader.examples.known_bytes
    if most not in known:
        rows = (row for row, _ in loader.walk())
        known[most] = loader.examples.bytes_of(chain.from_iterable(islice(rows, most and most * loader.batch_size)))
    return known[most]
