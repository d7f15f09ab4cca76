"""Where batches come from: stored examples, or rollouts of the policy itself. The loop sees no difference."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh

from configs.errors import UsageError
from configs.schema import Run
from convert.load import Source
from data.examples import Examples
from data.loader import Loader
from data.pack import Columns
from data.tokenizer import Tokenizer
from sharding.rules import Rules
from train.evaluate import evaluate
from train.marks import data_marks
from train.preflight import open_data, show_examples
from train.recipes import kind_of
from train.score import score_reference
from train.setup import Job, Portion, portion_of
from train.state import State

Say = Callable[[str], None]


@runtime_checkable
class Feed(Protocol):
    """What the loop asks of a source of batches."""

    portion: Portion

    @property
    def tokenizer(self) -> Tokenizer:
        """That of the data, with its template."""
        ...

    @property
    def evaluates(self) -> bool:
        """Whether there is held-out data."""
        ...

    def steps(self, epochs: float) -> int:
        """Batches that so many passes over the data take."""
        ...

    def show(self, job: Job) -> None:
        """Tell what will be trained on, before it is."""
        ...

    def begin(self, job: Job, state: State) -> None:
        """Whatever is made of the weights as they are at the start, whether or not the run goes on from later ones."""
        ...

    def next(self, job: Job, state: State, step: int, say: Say) -> tuple[Columns, Mapping[str, Any]]:
        """This process's rows of the batch of a step, and more numbers to log with it."""
        ...

    def evaluate(self, job: Job, state: State) -> dict[str, Any]:
        """Numbers on held-out data."""
        ...

    def marks(self) -> dict[str, Any]:
        """What tells whether the data is still the same."""
        ...

    def position(self) -> dict[str, Any]:
        """Where the next batch begins; JSON-able."""
        ...

    def restore(self, position: dict[str, Any], step: int) -> None:
        """Go on after so many steps, at a position that position() gave."""
        ...

    def close(self) -> None:
        """Let go of threads and files."""
        ...


@dataclass
class Stored:
    """Examples of files, in their seeded order."""

    loader: Loader
    held_out: dict[str, Examples]
    portion: Portion

    @property
    def tokenizer(self) -> Tokenizer:
        return self.loader.examples.tokenizer

    @property
    def evaluates(self) -> bool:
        return bool(self.held_out)

    def steps(self, epochs: float) -> int:
        return self.loader.steps(epochs)

    def show(self, job: Job) -> None:
        show_examples(job, self.loader)

    def begin(self, job: Job, state: State) -> None:
        if len(self.loader.mixture.parts) > 1:
            for line in self.loader.foresee(job.steps):
                if job.run.log.preflight and jax.process_index() == 0:
                    print(f"mixture: {line}", file=sys.stderr)
        score_reference(job, job.params(state), self.loader.examples, *self.held_out.values())

    def next(self, job: Job, state: State, step: int, say: Say) -> tuple[Columns, Mapping[str, Any]]:
        batch = next(self.loader)
        return batch, {f"mix/{name}": share for name, share in self.loader.shares().items()}

    def evaluate(self, job: Job, state: State) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, examples in self.held_out.items():
            found |= evaluate(job, state, examples, f"{name}_" if name else "")
        return found

    def marks(self) -> dict[str, Any]:
        return data_marks(self.loader)

    def position(self) -> dict[str, Any]:
        return self.loader.state()

    def restore(self, position: dict[str, Any], step: int) -> None:
        self.loader.restore(position)

    def close(self) -> None:
        self.loader.close()


def open_feed(run: Run, source: Source, mesh: Mesh, rules: Rules) -> Feed:
    """The feed of a run; its data is read and checked."""
    for name in ("eval_every", "eval_on_start"):
        if (given := getattr(run.train, name)) and not run.data.eval:
            raise UsageError(f"train.{name} is {given}, but data.eval is empty: nothing to evaluate on")
    if kind_of(run.objective) == "rollout":
        from train.rollout import open_rollouts

        return open_rollouts(run, source, mesh, rules)
    loader, held_out = open_data(run, source)
    return Stored(loader, held_out, portion_of(run))
