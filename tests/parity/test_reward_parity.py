"""Reward models against TRL's RewardTrainer and transformers: losses, every gradient, and exported folders' scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.load import load
from configs.objective import Objective
from configs.schema import Data
from convert.hf import write_folder
from convert.load import load_params, resolve
from data.pack import fill_row, pack_window
from data.rewards import fit_reward
from decode.load import load_model
from decode.reward import read_scores, score_rewards
from model.compute import Compute
from model.families import architecture_from_hf, hf_config_from
from model.transformer import init
from model.tree import flatten
from tests.golden import sft
from tests.golden.families import CONFIGS
from tests.parity.test_dpo_parity import rows
from tests.train import tiny
from train.loop import train
from train.recipes import make_recipe
from train.step import denominators, split_batch

pytestmark = pytest.mark.parity

T, PAD = 64, 3
LABELS = {
    1: {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}},
    2: {"architectures": ["LlamaForTokenClassification"], "id2label": {"0": "bad", "1": "good"}},
}
MARGINS = [0.5, 0.0, -0.25, 1.0, 2.0, 0.125, 0.0]  # TRL keeps them in float32
CASES = {
    "plain": (None, None),
    "margin": (MARGINS, None),
    "centred": (None, 0.01),
    "margin, centred": (MARGINS, 0.3),
}


@pytest.fixture(scope="module")
def oracle():
    from tests.golden import make_sft

    return make_sft


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("reward")
    return {n: tiny.make_model(where / str(n), seed=4, pad_token_id=PAD, **more) for n, more in LABELS.items()}


def torch_model(oracle, kind, folder, dtype):
    import torch

    model = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model.get_input_embeddings().padding_idx = None
    return oracle.in_double(model, folder) if dtype == "float64" else model


def gradients(model):
    return {name: p.grad.numpy() for name, p in model.named_parameters()}


def theirs(oracle, folder, dtype, margins, center, scratch):
    """(loss, gradients, metrics) of RewardTrainer's own collator and compute_loss."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    model = torch_model(oracle, AutoModelForSequenceClassification, folder, dtype)
    config = RewardConfig(
        str(scratch), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        center_rewards_coefficient=center,
    )  # fmt: skip
    made = [{"chosen_ids": [*p, *c], "rejected_ids": [*p, *r]} for p, c, r in rows()]
    if margins is not None:
        made = [{**row, "margin": margin} for row, margin in zip(made, margins, strict=True)]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    trainer = RewardTrainer(model, config, train_dataset=Dataset.from_list(made), processing_class=tokenizer)
    model.train()
    loss = trainer.compute_loss(model, trainer.data_collator(made))
    loss.backward()
    return loss.item(), gradients(model), {name: v[-1] for name, v in trainer._metrics["train"].items()}


def ours(folder, dtype, objective, filled, pieces=2):
    """The same of ours from packed rows, in micro-batches."""
    source = resolve(folder)
    params = load_params(source, dtype=np.dtype(dtype))
    batch = {name: jnp.asarray(np.stack([row[name] for row in filled])) for name in filled[0]}
    recipe = make_recipe(objective, source.arch, Compute(jnp.dtype(dtype), "reference", "full"))

    def loss(params):
        norms, parts = denominators(recipe.weights, batch), split_batch(batch, pieces)
        found = [recipe.loss(params, jax.tree.map(lambda x: x[i], parts), norms) for i in range(pieces)]  # noqa: B023
        return sum(one for one, _ in found), jax.tree.map(lambda *x: sum(x), *(sums for _, sums in found))

    (value, sums), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    metrics = {name: float(total / weight) for name, (total, weight) in sums.items()}
    return float(value), sft.named({p: np.asarray(g) for p, g in flatten(grads).items()}, source, False), metrics


def pack(made, more):
    plan = pack_window([len(e["tokens"]) for e in made], T, 0)
    plan += [[]] * (len(plan) % 2)
    return [fill_row([made[i] for i in row], T, more=more) for row in plan]


def report(case, dtype, value, want, grads, expected):
    far = sft.apart(grads, expected)
    worst = max(far, key=far.__getitem__)
    print(f"{case} {dtype}: loss {abs(value / want - 1):.1e} apart; worst gradient {far[worst]:.1e} ({worst})")
    return abs(value / want - 1), far[worst]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-9)])
def test_pairs(oracle, folder, tmp_path, case, dtype, tolerance):
    margins, center = CASES[case]
    want, expected, told = theirs(oracle, folder[1], dtype, margins, center, tmp_path)
    made = []
    for (prompt, *completions), margin in zip(rows(), margins or [0.0] * len(rows()), strict=True):
        sides = [
            {"tokens": np.asarray([*prompt, *c], np.int32), "weights": np.repeat([0.0, 1.0], [len(prompt), len(c)])}
            for c in completions
        ]
        made.append(fit_reward((*sides, margin), Data(train=("x",), max_length=T))[0])
    objective = Objective(type="reward", center_rewards_coefficient=center or 0.0)
    with jax.enable_x64(dtype == "float64"):
        value, grads, metrics = ours(folder[1], dtype, objective, pack(made, ("branches", "margins")))
    loss, gradient = report(case, dtype, value, want, grads, expected)
    assert loss < tolerance
    assert gradient < tolerance
    for name in ("margin", "mean_reward", "accuracy"):
        assert metrics[name] == pytest.approx(told[name], rel=10 * max(tolerance, 1e-6), abs=1e-6), name


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-9)])
def test_steps(oracle, folder, dtype, tolerance):
    """transformers' token classification with labels at the ends of steps: what TRL's PRMTrainer minimises."""
    import torch
    from transformers import AutoModelForTokenClassification

    rng, made = np.random.default_rng(0), []
    for n in rng.integers(5, 30, 6):
        tokens = rng.integers(4, 300, n).astype(np.int32)
        columns = {"tokens": tokens, "targets": tokens, "positions": np.arange(n)}
        ends, weights = rng.choice(n, 3, replace=False), np.zeros(n, np.float32)
        weights[ends] = 1
        made.append({**columns, "weights": weights, "labels": weights * rng.integers(0, 2, n)})
    model = torch_model(oracle, AutoModelForTokenClassification, folder[2], dtype).eval()
    rows = [torch.tensor(e["tokens"], dtype=torch.long) for e in made]
    labels = [torch.tensor(np.where(e["weights"] > 0, e["labels"], -100), dtype=torch.long) for e in made]
    pad = lambda lists, value: torch.nn.utils.rnn.pad_sequence(lists, True, value)  # noqa: E731
    mask = pad([torch.ones_like(row) for row in rows], 0)
    logits = model(input_ids=pad(rows, PAD), attention_mask=mask).logits
    # as transformers' loss, but for its cast to float32
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 2), pad(labels, -100).reshape(-1))
    loss.backward()
    with jax.enable_x64(dtype == "float64"):
        value, grads, _ = ours(folder[2], dtype, Objective(type="process_reward"), pack(made, ("labels",)))
    apart, gradient = report("steps", dtype, value, loss.item(), grads, gradients(model))
    assert apart < tolerance
    assert gradient < tolerance


def test_an_exported_reward_model_scores_the_same(tmp_path):
    """With its tokenizer's padding, though the language model's pads with the end of a turn."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = tiny.make_model(tmp_path / "tiny", pad_token_id=2)
    path = model / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"<pad>"', '"<|im_end|>"'))
    chats = [row["messages"] for row in tiny.make_chats(12)]
    pairs = [{"chosen": chat, "rejected": [*chat[:1], {"role": "assistant", "content": "zz"}]} for chat in chats]
    data = tiny.write_rows(tmp_path / "pairs.jsonl", pairs)
    more = ("tune.method=lora", "export.merge=true", "train.steps=3", "data.max_length=64")
    train(load("reward", tiny.overrides(tmp_path / "run", model, data, "objective.num_labels=3", *more)))
    folder = tmp_path / "run" / "export"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = [tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n") for chat in chats]
    batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    assert batch["attention_mask"].min() == 0
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    assert type(theirs).__name__ == "LlamaForSequenceClassification"
    with torch.no_grad():
        want = theirs(**batch).logits.numpy()
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    np.testing.assert_allclose(score_rewards(load_model(str(folder), rewards=True), tokens), want, atol=1e-5)


def test_gemma3_scores_the_same(tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification

    arch = architecture_from_hf({**CONFIGS["gemma3"], "architectures": ["Gemma3TextForSequenceClassification"]})
    assert arch.num_labels == 2
    params = init(arch, jax.random.key(0))
    write_folder(tmp_path / "m", params, arch, config=hf_config_from(arch, pad_token_id=0))
    tiny.make_tokenizer().save(tmp_path / "m")
    theirs = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "m", dtype=torch.float32, local_files_only=True
    )
    assert type(theirs).__name__ == "Gemma3TextForSequenceClassification"
    row = np.random.default_rng(0).integers(1, arch.vocab_size, 17).tolist()
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor([row])).logits.numpy()
    (read,) = read_scores(load_model(str(tmp_path / "m"), rewards=True), [row])
    np.testing.assert_allclose(read[-1:], want, atol=1e-5)
