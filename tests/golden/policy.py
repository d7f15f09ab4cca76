"""What the goldens of learning by reward are about: policies, samples with rewards, settings; and our side. No torch
here."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.objective import Objective
from configs.sample import Sample
from convert.load import load_params, resolve
from data.pack import pack_window
from data.pairs import join_branches
from model.compute import Compute
from model.tree import flatten, join, split
from tests.golden import sft
from train.losses import packed
from train.recipes import make_recipe
from train.step import denominators, split_batch, with_columns

FILE = Path(__file__).with_name("policy.npz")
T, LONGEST, TEMPERATURE = 64, 10, 0.7
PROMPTS, GENERATIONS, END = 3, 3, 2
FUNCTIONS = {"right": 1.0, "short": 0.5}


def make_policies(folder: Path) -> tuple[Path, Path, Path]:
    """The policy, what it was when it wrote the samples, and the reference, as Hugging Face folders."""
    from safetensors.numpy import load_file, save_file

    policy = sft.make_tiny(folder / "policy")
    made = [policy]
    for name, seed, scale in (("old", 21, 0.02), ("reference", 22, 0.04)):
        rng = np.random.default_rng(seed)
        shutil.copytree(policy, folder / name)
        tensors = load_file(policy / "model.safetensors")
        moved = {
            key: (x + scale * rng.standard_normal(x.shape)).astype(np.float32) for key, x in sorted(tensors.items())
        }
        save_file(moved, folder / name / "model.safetensors", metadata={"format": "pt"})
        made.append(folder / name)
    return made[0], made[1], made[2]


def samples(prompts: int = PROMPTS, generations: int = GENERATIONS, seed: int = 5, vocabulary: int = 300) -> Any:
    """Completions of uneven length, some without an end; rewards by two functions, some not judged: a completion by
    neither; the sampler's log-probs."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(4, vocabulary, rng.integers(low, high)).tolist()  # noqa: E731
    asked = [draw(1, 7) for _ in range(prompts)]
    groups = np.repeat(np.arange(prompts), generations)
    completions = [draw(1, LONGEST) for _ in groups]
    finished = rng.random(len(groups)) < 0.6
    completions = [[*one, END] if ended else one for one, ended in zip(completions, finished, strict=True)]
    rewards = np.stack([rng.integers(0, 2, len(groups)), rng.random(len(groups))], 1).astype(np.float64)
    rewards[1], rewards[-1, 0] = np.nan, np.nan
    said = [-5.6 + 0.3 * rng.standard_normal(len(one)) for one in completions]
    return SimpleNamespace(
        prompts=[asked[i] for i in groups], groups=groups, completions=completions, finished=finished, rewards=rewards,
        said=said,
    )  # fmt: skip


BASE = {"epsilon": 0.1, "num_iterations": 2, "beta": 0.06}
SCALES = ("group", "batch", "none")
HIGH = {"cispo": {"epsilon_high": 1.05}, "dapo": {"epsilon_high": 0.2}}
CASES: dict[str, dict[str, Any]] = {
    f"{loss} {level}": {
        **BASE, **HIGH.get(loss, {}), "loss_type": loss, "importance_sampling_level": level,
        "scale_rewards": SCALES[i % 3],
    }
    for i, loss in enumerate(("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"))
    for level in ("token", "sequence")
}  # fmt: skip
CASES |= {
    "aligned": {"beta": 0.06},
    "aligned, kl not corrected": {"beta": 0.06, "use_bias_correction_kl": False, "loss_type": "grpo"},
    "no reference": {"beta": 0.0, "num_iterations": 2, "epsilon": 0.1},
    "kl not corrected": {**BASE, "use_bias_correction_kl": False},
    "delta": {**BASE, "delta": 1.15, "scale_rewards": "batch"},
    "gdpo": {**BASE, "multi_objective_aggregation": "normalize_then_sum"},
    "off policy": {**BASE, "off_policy_mask_threshold": 0.02, "loss_type": "grpo"},
    "entropy": {**BASE, "entropy_coef": 0.3, "loss_type": "grpo"},
    "top entropy": {**BASE, "top_entropy_quantile": 0.3, "entropy_coef": 0.3},
    "sampler off policy": {**BASE, "sampler": "token_truncate", "off_policy_mask_threshold": 0.1},
    "sampler vespo": {**BASE, "sampler": "token_mask", "low": 0.8, "loss_type": "vespo"},
    **{
        f"sampler {mode}": {**BASE, "sampler": mode, "low": 0.7, "high": 1.3, "loss_type": loss}
        for mode, loss in (
            ("token_truncate", "dapo"), ("token_mask", "grpo"), ("sequence_truncate", "dr_grpo"),
            ("sequence_mask", "cispo"),
        )
    },
    **{
        f"truncated {name}": {**CASES[name], "mask_truncated_completions": True}
        for name in ("grpo token", "dapo token", "dr_grpo token", "luspo sequence", "sapo sequence", "vespo token")
    },
    "rloo": {"advantage": "rloo", "beta": 0.2, "epsilon": 0.1},
    "rloo normalized": {
        "advantage": "rloo", "beta": 0.2, "epsilon": 0.1, "normalize_advantages": True,
        "reward_clip_range": (0.2, 1.1),
    },
}  # fmt: skip
CASES["sampler sequence_mask"] |= {"epsilon_high": 1.05}
RLOO = {
    "importance_sampling_level": "sequence_sum",
    "loss_type": "grpo",
    "kl_in_reward": True,
}


def settings(case: str) -> tuple[Objective, Sample]:
    """Our sections for a case."""
    options = dict(CASES[case])
    if options.get("advantage") == "rloo":
        options |= RLOO
    if "sampler" in options:
        options["importance_sampling_correction"] = options.pop("sampler")
        options["importance_sampling_clip_max"] = options.pop("high", 3.0)
        options["importance_sampling_clip_min"] = options.pop("low", None)
    level = options.pop("importance_sampling_level", "token")
    # what is refused has a meaning in TRL all the same: luspo of tokens, vespo with the KL times a sequence's ratio
    legal = {"luspo": "sequence", "vespo": "token"}.get(options.get("loss_type", "dapo"), level)
    objective = Objective(type="grpo", loss_chunk=32, importance_sampling_level=legal, **options)
    sample = Sample(temperature=TEMPERATURE, max_new_tokens=LONGEST + 1, num_generations=GENERATIONS)
    return objective.model_copy(update={"importance_sampling_level": level}), sample


@contextmanager
def one_compile() -> Iterator[None]:
    """The model is compiled once, with a gradient of the entropy; what follows it runs operation by operation."""
    import pytest

    static = ("arch", "compute", "chunk", "temperature", "learn")
    both = jax.jit(packed.policy_logprobs_and, static_argnums=0, static_argnames=static)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "policy_logprobs", lambda *given, **more: both("entropy", *given, **more, learn=True)[0])
        patch.setattr(packed, "policy_logprobs_and", lambda *given, **more: both(*given, **{**more, "learn": True}))
        yield


def row_of(examples: list[dict[str, np.ndarray]], length: int) -> dict[str, np.ndarray]:
    """One row of examples' columns, whatever these are, in their own precision."""
    counted = [{**one, "segments": np.full(len(one["tokens"]), i, np.int32)} for i, one in enumerate(examples, 1)]
    columns = {name: np.concatenate([one[name] for one in counted]) for name in counted[0]}
    return {name: np.pad(column, (0, length - len(column))) for name, column in columns.items()}


def batch_of(
    given: Any, advantages: list[np.ndarray], masked: bool = False, share: bool = True, length: int = T, rows: int = 1
) -> dict[str, np.ndarray]:
    """Packed rows of samples; each prompt once, or with each of its completions; the last of a multiple of `rows` are
    empty. masked: nothing is learnt from completions without an end. The column `sample` counts samples from 1."""
    sides: dict[int, list[dict[str, np.ndarray]]] = {}
    for i, (prompt, completion) in enumerate(zip(given.prompts, given.completions, strict=True)):
        columns = {
            "weights": np.full(len(completion), float(given.finished[i] or not masked)),
            "advantages": advantages[i],
            "sampler_logprobs": given.said[i],
            "sample": np.full(len(completion), i + 1),
        }
        side = {name: np.concatenate([np.zeros(len(prompt), x.dtype), x]) for name, x in columns.items()}
        side["tokens"] = np.asarray([*prompt, *completion], np.int32)
        sides.setdefault(int(given.groups[i]) if share else i, []).append(side)
    examples = [join_branches(of, int((of[0]["sample"] == 0).sum())) for of in sides.values()]
    plan = pack_window([len(one["tokens"]) for one in examples], length, 0)
    filled = [row_of([examples[i] for i in row], length) for row in plan]
    filled += [{name: np.zeros_like(column) for name, column in filled[0].items()}] * (-len(filled) % rows)
    return {name: np.stack([row[name] for row in filled]) for name in filled[0]}


def apart(column: Any, batch: Any) -> list[np.ndarray]:
    """A column's values on each sample's tokens."""
    numbers = np.asarray(batch["sample"])
    return [np.asarray(column)[numbers == i + 1] for i in range(numbers.max())]


def weights_of(case: str, given: Any) -> list[bool]:
    """Which samples are learnt from."""
    return [bool(ended) or not CASES[case].get("mask_truncated_completions") for ended in given.finished]


def prepare(
    folders: tuple[Path, Path, Path], case: str, dtype: Any, given: Any, share: bool = True
) -> tuple[Any, dict[str, Any], list[np.ndarray]]:
    """(recipe, batch, advantages) of a case: what a rollout makes of the samples."""
    objective, sample = settings(case)
    source = resolve(folders[0])
    recipe = make_recipe(objective, source.arch, Compute(dtype, "reference", "full"), sample)
    blank = [np.zeros(len(one)) for one in given.completions]
    masked = objective.mask_truncated_completions
    batch = {name: jnp.asarray(x) for name, x in batch_of(given, blank, masked, share).items()}

    def said(folder: Path) -> Any:
        params = load_params(resolve(folder), dtype=np.dtype(dtype))
        model = {"arch": source.arch, "compute": Compute(dtype, "reference", "full"), "chunk": 32}
        return packed.policy_logprobs(params, batch, **model, temperature=TEMPERATURE)

    columns: dict[str, Any] = {}
    if objective.num_iterations > 1 or objective.kl_in_reward:
        columns["old_logprobs"] = said(folders[1])
    if objective.needs_reference:
        columns["ref_logprobs"] = said(folders[2])
    ratios = None
    if objective.kl_in_reward:
        ratios = apart(columns["old_logprobs"] - columns["ref_logprobs"], batch)
        columns.pop("ref_logprobs")
    assert recipe.advantages is not None
    advantages = recipe.advantages(
        given.rewards, list(FUNCTIONS.values()), given.groups, [len(one) for one in blank], ratios
    )
    batch |= {"advantages": jnp.asarray(batch_of(given, advantages, masked, share)["advantages"]), **columns}
    if "sampler" not in CASES[case]:
        del batch["sampler_logprobs"]
    batch = {name: x.astype(dtype) if x.dtype.kind == "f" else x for name, x in batch.items()}
    return recipe, batch, advantages


def ours(
    folders: tuple[Path, Path, Path], case: str, dtype: Any, given: Any, pieces: int = 1, share: bool = True,
    jit: Any = jax.jit,
) -> tuple[float, dict[str, np.ndarray], dict[str, float], list[np.ndarray], dict[str, Any]]:  # fmt: skip
    """(loss, {transformers' name: gradient}, metrics, advantages, batch) of a case."""
    recipe, batch, advantages = prepare(folders, case, dtype, given, share)
    batch = {name: jnp.pad(x, ((0, -len(x) % pieces), (0, 0))) for name, x in batch.items()}
    source = resolve(folders[0])
    trainable, frozen = split(load_params(source, dtype=np.dtype(dtype)), lambda _: True)

    def loss(trainable: Any) -> Any:
        params = join(trainable, frozen)
        whole, _ = with_columns(recipe.columns, trainable, frozen, {}, batch, pieces)
        norms, parts, total, sums = denominators(recipe.weights, whole), split_batch(whole, pieces), 0.0, []
        for i in range(pieces):
            part, metrics = recipe.loss(params, jax.tree.map(lambda x: x[i], parts), norms)  # noqa: B023
            total, sums = total + part, [*sums, metrics]
        return total, jax.tree.map(lambda *x: sum(x), *sums)

    (value, sums), grads = jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    metrics = {name: float(total / weight) for name, (total, weight) in sums.items()}
    named = sft.named({path: np.asarray(g) for path, g in flatten(grads).items()}, source, False)
    return float(value), named, metrics, advantages, batch
