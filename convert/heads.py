"""What a model predicts: tokens, or scores by a head of its own."""

from dataclasses import replace

import numpy as np

from configs.errors import UsageError
from convert.source import Source
from model.architecture import Architecture


def with_scores(source: Source, num_labels: int, token_labels: bool, seed: int) -> Source:
    """The source as a reward model: with its own score head, which must be such a one, or with a new one."""
    if not source.arch.causal:
        check_language(source)
    arch = replace(source.arch, num_labels=num_labels, token_labels=token_labels)
    if source.arch.num_labels:
        if source.arch != arch:
            raise UsageError(
                f"MODEL '{source.name}' scores {describe_scores(source.arch)}, wanted are {describe_scores(arch)}: "
                "start from the language model for a new head"
            )
        return source
    weight = np.random.default_rng(seed).normal(0, arch.init_std, (arch.d_model, num_labels)).astype(np.float32)
    fresh = {"score/weight": weight}
    if token_labels:
        fresh["score/bias"] = np.zeros(num_labels, np.float32)
    return replace(source, arch=arch, fresh={**source.fresh, **fresh})


def describe_scores(arch: Architecture) -> str:
    """What a reward model scores, in words."""
    return "tokens (steps of a process)" if arch.token_labels else f"sequences with {arch.num_labels} head(s)"


def check_language(source: Source) -> None:
    """Raise UsageError for a model that does not predict the next token."""
    if not source.arch.causal:
        raise UsageError(
            f"MODEL '{source.name}' is an encoder ({source.arch.family}): model/encoder.py has what it computes, and "
            "`purestep convert` and `purestep inspect` take it; it generates nothing and no objective trains it"
        )
    if source.arch.num_labels:
        raise UsageError(
            f"MODEL '{source.name}' is a reward model: it scores {describe_scores(source.arch)} and has no "
            "language-model head. `purestep score` and `purestep eval` take it, objective.type=reward trains it"
        )
