"""Learning by reward against TRL's GRPOTrainer and RLOOTrainer: their own way from rewards to advantages, old and
reference log-probs, to the loss; values, metrics and the gradient of every parameter."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import policy, sft
from tests.parity.test_dpo_parity import gradients, policy_of

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def oracle():
    from tests.golden import make_sft

    return make_sft


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return policy.make_policies(tmp_path_factory.mktemp("policies"))


@pytest.fixture(autouse=True, scope="module")
def _one_compile():
    with policy.one_compile():
        yield


def theirs(oracle, folders, case, dtype, given):
    """(loss, {name: gradient}, metrics, what the trainer made of the samples). The samples are given, their generation
    is left out; between samples and loss the model becomes what several steps have made of it."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # else theirs takes some numbers in float32: Bessel's correction, temperatures
    try:
        return _theirs(oracle, folders, case, dtype, given)
    finally:
        torch.set_default_dtype(before)


def _theirs(oracle, folders, case, dtype, given):
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.trainer import utils

    options = dict(policy.CASES[case])
    rloo = options.pop("advantage", None) == "rloo"
    sampler = options.pop("sampler", None)
    low, high = options.pop("low", None), options.pop("high", 3.0)
    count = len(given.completions)
    config = (trl.RLOOConfig if rloo else trl.GRPOConfig)(
        str(folders[0].with_name("scratch")), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        per_device_train_batch_size=count, num_generations=policy.GENERATIONS, temperature=policy.TEMPERATURE,
        max_completion_length=policy.LONGEST + 1, reward_weights=list(policy.FUNCTIONS.values()), **options,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folders[0], local_files_only=True)

    def reward(name):
        def function(**_):
            return [0.0] * count

        function.__name__ = name
        return function

    model, after, reference = (
        policy_of(oracle, folder, None, dtype) for folder in (folders[1], folders[0], folders[2])
    )
    trainer = (trl.RLOOTrainer if rloo else trl.GRPOTrainer)(
        model, [reward(name) for name in policy.FUNCTIONS], args=config, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * count),
    )  # fmt: skip
    utils.add_fused_lm_head(reference, policy.TEMPERATURE, outputs=("log_probs", "entropy"))
    if trainer.beta:
        trainer.ref_model = reference
    texts = ["a"] * count
    if rloo:
        made = given.prompts, given.completions, texts
    else:
        said = [x.tolist() for x in given.said] if sampler else None
        made = given.prompts, given.completions, None, texts, said, {}, None, []
    trainer._generate = lambda prompts: made
    # theirs are float32 always
    trainer._calculate_rewards = lambda *_: torch.tensor(given.rewards, dtype=dtype)
    trainer.reward_weights = trainer.reward_weights.to(dtype)
    if sampler:
        trainer.use_vllm = True
        trainer.vllm_importance_sampling_mode = sampler
        trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max = low, high
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    kernel = oracle.ExactLogProbs if dtype == torch.float64 else utils._ChunkedLogProbFunction
    with mock.patch.object(utils, "_ChunkedLogProbFunction", kernel):
        inputs = trainer._generate_and_score_completions([{"prompt": "a"}] * count)
        model.load_state_dict(after.state_dict())
        loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), gradients(model), metrics, inputs


COLUMNS = {"old_logprobs": "old_per_token_logps", "ref_logprobs": "ref_per_token_logps"}
# of sequences in which nothing counts, TRL reports a ratio of 1 too
UNLIKE = {
    "truncated luspo sequence": ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
    "truncated vespo token": ("vespo/phi_seq_mean",),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-9)])
@pytest.mark.parametrize("case", policy.CASES)
def test_policy(oracle, folders, case, dtype, tolerance):
    import torch

    given = policy.samples()
    want, expected, told, inputs = theirs(oracle, folders, case, getattr(torch, dtype), given)
    with jax.enable_x64(dtype == "float64"):
        value, grads, metrics, advantages, batch = policy.ours(folders, case, jnp.dtype(dtype), given, jit=lambda f: f)
    far = sft.apart(grads, expected)
    worst = max(far, key=far.__getitem__)
    print(f"{case} {dtype}: loss {abs(value - want):.1e} apart; worst gradient {far[worst]:.1e} ({worst})")
    close = lambda a, b, what: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=what)  # noqa: E731
    for ours, each in zip(advantages, inputs["advantages"].numpy(), strict=True):
        close(ours, np.full(len(ours), each), "advantages")
    for name, key in COLUMNS.items():
        if name in batch and inputs.get(key) is not None:
            rows = zip(
                policy.apart(batch[name], batch), inputs[key].numpy(), policy.weights_of(case, given), strict=True
            )
            for column, row, weight in rows:
                close(column, np.where(weight, row[: len(column)], 0), name)
    assert abs(value - want) < tolerance * max(1, abs(want))
    assert far[worst] < tolerance, worst
    shared = [name for name in metrics if name in told and name not in UNLIKE.get(case, ())]
    assert "entropy" in shared
    for name in shared:
        single = 1e-6 if name.startswith(("clip", "cispo")) else 0  # shares are float32 there
        assert metrics[name] == pytest.approx(told[name], rel=tolerance, abs=tolerance + single), name
