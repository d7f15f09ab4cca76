"""DPO on whole models against TRL's DPOTrainer: its collator, its forward pass, its loss; every gradient."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.schema import Data, Objective
from convert.load import load_params, resolve
from data.pack import fill_row, pack_window
from data.pairs import fit_pair
from model.transformer import Compute
from model.tree import flatten, join, split
from tests.golden import sft
from train.recipes import make_recipe
from train.step import denominators, split_batch, with_columns

pytestmark = pytest.mark.parity

T = 48


@pytest.fixture(scope="module")
def oracle():
    from tests.golden import make_sft

    return make_sft


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, and an adapter on it: with the adapter it is the policy, without it the reference."""
    folder = sft.make_tiny(tmp_path_factory.mktemp("dpo") / "tiny")
    return folder, sft.make_adapter(folder.with_name("adapter"), folder)


def rows(vocabulary=300, seed=3, count=7):
    """(prompt, chosen, rejected) of very uneven lengths."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(4, vocabulary, rng.integers(low, high)).tolist()  # noqa: E731
    return [(draw(1, 9), draw(1, 14), draw(1, 14)) for _ in range(count)]


def theirs(oracle, folder, adapter, pairs, dtype, **options):
    """(loss, {name: gradient}, metrics): DPOTrainer on the adapter, the reference is the model without it."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import utils

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model.get_input_embeddings().padding_idx = None
    if dtype == torch.float64:
        model = oracle.in_double(model, folder)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True, autocast_adapter_dtype=False).to(dtype)
    config = DPOConfig(
        str(adapter.with_name("scratch")), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        per_device_train_batch_size=len(pairs), **options,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    blank = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = DPOTrainer(model, args=config, train_dataset=blank, processing_class=tokenizer)
    # a copy named "ref" would be made of an adapter given as it is: here the reference is the base
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
    batch = trainer.data_collator([{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in pairs])
    model.train()
    kernel = oracle.ExactLogProbs if dtype == torch.float64 else utils._ChunkedLogProbFunction
    with mock.patch.object(utils, "_ChunkedLogProbFunction", kernel):
        loss = trainer._compute_loss(model, batch, False)
    loss.backward()
    grads = {
        name.replace(".default.weight", ".weight"): p.grad.numpy()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return loss.item(), grads, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def ours(adapter, pairs, dtype, pieces=2, jit=jax.jit, **options):
    """The same of ours: packed rows, prompts shared, two micro-batches."""
    source = resolve(adapter)
    params = load_params(source, dtype=np.dtype(dtype))
    trainable, frozen = split(params, lambda path: path.endswith(("/a", "/b")))
    data = Data(train=("x",), max_length=T)
    examples = []
    for prompt, *completions in pairs:
        sides = []
        for completion in completions:
            weights = np.concatenate([np.zeros(len(prompt)), np.ones(len(completion))])
            sides.append({"tokens": np.asarray([*prompt, *completion], np.int32), "weights": weights})
        examples.append(fit_pair(tuple(sides), data)[0])
    plan = pack_window([len(e["tokens"]) for e in examples], T, 0)
    plan += [[]] * (-len(plan) % pieces)
    filled = [fill_row([examples[i] for i in row], T, more=("branches",)) for row in plan]
    batch = {name: jnp.asarray(np.stack([row[name] for row in filled])) for name in filled[0]}
    batch["weights"] = batch["weights"].astype(dtype)
    objective = Objective(type="dpo", reference="adapterless", loss_chunk=32, **options)
    recipe = make_recipe(objective, source.arch, Compute(dtype, "reference", "full"))

    def loss(trainable):
        params = join(trainable, frozen)
        whole = with_columns(recipe.score, recipe.gather, params, batch, pieces)
        norms, parts, total, sums = denominators(recipe.weights, whole), split_batch(whole, pieces), 0.0, []
        for i in range(pieces):
            part, metrics = recipe.loss(params, jax.tree.map(lambda x: x[i], parts), norms)  # noqa: B023
            total, sums = total + part, [*sums, metrics]
        return total, jax.tree.map(lambda *x: sum(x), *sums)

    (value, sums), grads = jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    metrics = {name: float(total / weight) for name, (total, weight) in sums.items()}
    return float(value), sft.named({p: np.asarray(g) for p, g in flatten(grads).items()}, source, True), metrics


CASES = {
    **{
        name: {"loss_type": [name]}
        for name in "sigmoid sigmoid_norm hinge ipo nca_pair bco_pair sppo_hard aot aot_unpaired apo_zero apo_down "
        "discopop".split()
    },
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.2},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.1},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 0.7]},
    "js": {"f_divergence_type": "js_divergence"},
    "ld": {"ld_alpha": 0.3},
}


def as_ours(options):
    """Our names for TRL's options."""
    mine = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    if "sft" in mine.get("loss_type", ()):  # a loss type of TRL's, a weight of ours
        kinds, weights = mine.pop("loss_type"), mine.pop("loss_weights")
        at = kinds.index("sft")
        mine |= {"loss_type": kinds[:at], "loss_weights": weights[:at], "sft_weight": weights[at]}
    return mine


@pytest.mark.parametrize(
    ("dtype", "tolerance", "case"),
    # TRL takes exo_pair's log(label_smoothing) in float32 always: 3e-8 off in float64
    [("float32", 1e-5, case) for case in CASES] + [("float64", 1e-9, case) for case in CASES if case != "exo_pair"],
)
def test_tiny(oracle, models, case, dtype, tolerance):
    import torch

    options, pairs = {"beta": 0.3, **CASES[case]}, rows()
    want, expected, told = theirs(oracle, *models, pairs, getattr(torch, dtype), **options)
    with jax.enable_x64(dtype == "float64"):
        value, grads, metrics = ours(models[1], pairs, jnp.dtype(dtype), **as_ours(options))
    far = sft.apart(grads, expected)
    worst = max(far, key=far.__getitem__)
    print(f"{case} {dtype}: loss {abs(value / want - 1):.1e} apart; worst gradient {far[worst]:.1e} ({worst})")
    assert abs(value / want - 1) < tolerance
    assert far[worst] < tolerance, worst
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert metrics[name] == pytest.approx(told[name], rel=10 * tolerance, abs=10 * tolerance), name
    assert metrics["rewards/accuracies"] == pytest.approx(told["rewards/accuracies"], abs=1e-6)  # TRL's is a float32
