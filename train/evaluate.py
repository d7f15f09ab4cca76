"""The objective's own loss on held-out data."""

from typing import Any

import jax
import numpy as np

from data.examples import Examples
from data.loader import Loader
from sharding.place import place_batch
from train.setup import Job
from train.state import State
from train.step import merge_sums


def evaluate(job: Job, state: State, examples: Examples) -> dict[str, Any]:
    """{eval_<metric>: average over every row of the held-out data}: sums and weights are added, then divided once."""
    loss = job.evaluate
    sums: dict[str, Any] = {}
    data = job.run.data.model_copy(update={"shuffle": False})
    processes = jax.process_index(), jax.process_count()
    for batch in Loader(examples, data, job.run.train.batch_size, 0, *processes, epochs=1):
        made = loss(state, job.frozen, place_batch(batch, job.mesh, job.rules))
        more = jax.tree.map(lambda x: np.asarray(x, np.float64), made)
        sums = merge_sums(sums, more, np) if sums else more
    return {
        f"eval_{name}": (total / weight if weight else 0 * total).tolist() for name, (total, weight) in sums.items()
    }
