"""Live comparison with transformers: a tiny model in float64, and the real one in float32. The extra `parity`."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import RunError
from convert.tables import rows as table
from decode.generate import Sampling, generate
from decode.load import Model, load_model
from decode.logits import Context, Temperature, TopK, TopP, process
from decode.score import score
from model.compute import Compute
from model.families import architecture_from_hf
from model.head import head_of, logits
from model.rope import frequencies
from model.transformer import forward, nest

pytestmark = pytest.mark.parity

TINY = {
    "vocab_size": 128, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
VARIANTS = {
    "tied": {"tie_word_embeddings": True},
    "untied, biases": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "llama3": {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
    "linear": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}},
    "one kv head, gelu": {"num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"},
}


def make_oracle(variant, seed=0):
    """A random LlamaForCausalLM in double, norms and biases random too."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(**{**TINY, **VARIANTS[variant]}, attn_implementation="sdpa")
    oracle = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, weight in oracle.named_parameters():
            if weight.ndim == 1:
                weight.add_(0.2 * torch.randn_like(weight))
            assert weight.std() > 0 or "norm" in name
    return oracle


def ours_of(oracle, dtype):
    """Architecture and parameters, through the config and the table that convert uses."""
    arch = architecture_from_hf(oracle.config.to_dict())
    tensors = {name: tensor.numpy() for name, tensor in oracle.state_dict().items()}
    flat = {}
    for row in table(arch):
        parts = [row.to_ours(tensors[name], arch) for name in row.names(arch)]
        flat[row.ours] = jnp.asarray(np.stack(parts) if row.stacked else parts[0], dtype)
    return arch, nest(flat)


def widen(oracle, arch):
    """transformers computes RoPE's angles and RMSNorm (and eager attention's softmax) in float32 for double models too,
    1e-6 off: give it double ones. The frequencies are checked against its own first.
    """
    import torch
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    rotary = oracle.model.rotary_emb
    frequency = torch.tensor(frequencies(arch.rope, arch.head_dim))
    np.testing.assert_allclose(rotary.inv_freq.double(), frequency, rtol=1e-6)
    assert rotary.attention_scaling == 1.0

    def in_double(x, position_ids, layer_type=None):
        angles = position_ids[..., None].double() * frequency
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    rotary.forward = in_double
    for module in oracle.modules():
        if isinstance(module, LlamaRMSNorm):
            double = torch.nn.RMSNorm(arch.d_model, module.variance_epsilon, dtype=torch.float64)
            double.weight = module.weight
            module.forward = double.forward


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64(variant):
    import torch

    with jax.enable_x64(True):
        oracle = make_oracle(variant)
        arch, params = ours_of(oracle, jnp.float64)
        widen(oracle, arch)
        tokens = np.random.default_rng(0).integers(0, arch.vocab_size, (2, 90))
        with torch.no_grad():
            theirs = oracle(torch.tensor(tokens)).logits.numpy()
        assert theirs.dtype == np.float64
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        for attention in ("reference", "chunked"):
            compute = Compute(dtype=jnp.float64, attention=attention)
            hidden = forward(arch, compute, params, jnp.asarray(tokens), positions, jnp.ones_like(positions))
            ours = np.asarray(logits(hidden, head_of(arch, params)))
            assert ours.dtype == np.float64
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
    assert np.abs(theirs).max() > 1


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.0, 20, 1.0), (1.0, 0, 0.8), (1.5, 50, 0.9)]
)
def test_processors_give_transformers_distribution(temperature, top_k, top_p):
    import torch
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerationMixin

    scores = 4 * np.random.default_rng(1).standard_normal((4, 5000)).astype(np.float32)
    config = GenerationConfig(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
    chain = GenerationMixin._get_logits_processor(_Bare(), config, device="cpu")
    theirs = torch.softmax(chain(torch.zeros(4, 1, dtype=torch.long), torch.tensor(scores)), -1).numpy()
    context = Context(jnp.zeros((4, 1), jnp.int32), jnp.ones(4, jnp.int32), jnp.ones(4, jnp.int32))
    processors = (Temperature(temperature), TopK(top_k), TopP(top_p))
    ours = jax.nn.softmax(process(processors, jnp.asarray(scores), context), axis=-1)
    assert ((theirs > 0) == (np.asarray(ours) > 0)).all()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


class _Bare:
    """As much of a model as transformers' list of processors asks for."""

    config = None

    def _merge_criteria_processor_list(self, default, custom):
        return default


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Our model, and transformers' of the folder that we write."""
    import torch
    from transformers import AutoModelForCausalLM

    from convert.hf import write_folder
    from convert.load import resolve

    try:
        source = resolve("smollm2-135m-instruct")
    except RunError as error:
        pytest.skip(str(error))
    model = load_model("smollm2-135m-instruct", dtype="float32")
    folder = tmp_path_factory.mktemp("export") / "smollm2"
    write_folder(
        folder, model.params, model.arch, config=source.config, generation_config=source.generation_config,
        tokenizer=model.tokenizer,
    )  # fmt: skip
    return model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


TEXTS = (
    "The Nile is the longest river in Africa.",
    "for i in range(10):\n    print(i ** 2)",
    "“Non, merci”, said she; 你好!",
)


def test_full_logits_and_scores(real):
    import torch

    model, oracle = real
    for text, scored in zip(TEXTS, score(model, TEXTS), strict=True):
        ids = torch.tensor([model.tokenizer.encode(text)])
        with torch.no_grad():
            theirs = oracle(ids).logits[0]
        tokens = jnp.asarray(ids.numpy(), jnp.int32)
        segments = jnp.ones_like(tokens)
        hidden = forward(model.arch, model.compute, model.params, tokens, jnp.arange(tokens.shape[1])[None], segments)
        ours = np.asarray(logits(hidden, head_of(model.arch, model.params))[0])
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=2e-4)
        full = torch.log_softmax(theirs.double(), -1)
        np.testing.assert_allclose(jax.nn.log_softmax(ours, axis=-1), full.numpy(), rtol=0, atol=2e-4)
        chosen = full[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()
        np.testing.assert_allclose(scored.logprobs, chosen, rtol=0, atol=1e-4)


def test_a_left_padded_batch_generates_the_same_tokens(real):
    import torch

    model, oracle = real
    rows = [model.tokenizer.encode(text) for text in TEXTS]
    longest = max(map(len, rows))
    ids, mask = np.full((len(rows), longest), 2), np.zeros((len(rows), longest), int)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
    out = oracle.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), do_sample=False, max_new_tokens=24,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    ours = generate(model, ids, Sampling(max_new_tokens=24), attention_mask=mask)
    best = torch.stack(out.logits, 1).topk(2).values
    for i, done in enumerate(ours):
        theirs = out.sequences[i, longest:].tolist()[: len(done.tokens)]
        if differ := [j for j, (a, b) in enumerate(zip(done.tokens, theirs, strict=True)) if a != b]:
            gap = float(best[i, differ[0], 0] - best[i, differ[0], 1])
            print(f"near tie: row {i}, step {differ[0]}, gap {gap}")
            assert gap < 2e-4


def test_the_model_can_be_used_without_load_model(real):
    model, _ = real
    other = Model(model.arch, replace(model.compute, attention="xla"), model.params, model.tokenizer, model.eos_ids)
    first, second = (generate(m, [TEXTS[0]], Sampling(max_new_tokens=8))[0] for m in (model, other))
    assert first.tokens == second.tokens
