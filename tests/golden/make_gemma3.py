"""Make gemma3.npz (a tiny Gemma 3 in float64) and gemma3_270m.npz and .json (the real one). Needs the extra `parity`.

    python -m tests.golden.make_gemma3 [tiny | real]

What is kept is what transformers computes; the real weights (Gemma terms of use) stay in the cache.
"""

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from convert.hf import write_folder
from convert.load import load_params, load_tokenizer, resolve
from model.architecture import Architecture
from model.families import architecture_from_hf
from model.rope import frequencies
from tests.golden import gemma3

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and nobody in the village was surprised.",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。人工智能正在改变世界，越来越多的企业开始使用大型语言模型。",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
]
PROMPTS = [
    "Once upon a time",
    "The three laws of motion are",
    "import numpy as np\n\ndef softmax(x):\n",
    "中国的首都是",
    "The recipe needs two eggs,",
]
LONG = 700  # tokens of the last text: more than the window of 512
STEPS, BEAM_STEPS, BEAMS, TIE = 48, 16, 4, 2e-4


def make_oracle(config: dict[str, Any] = gemma3.CONFIG, dtype: torch.dtype = torch.float64) -> Any:
    """transformers' Gemma 3 with the golden's weights."""
    config = transformers.Gemma3TextConfig(**{k: v for k, v in config.items() if k != "model_type"})
    model = transformers.Gemma3ForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    weights = {name: torch.tensor(value) for name, value in gemma3.tensors(config.to_dict()).items()}
    missing, surplus = model.load_state_dict(weights, strict=False)
    assert not surplus
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return in_double(model, architecture_from_hf(config.to_dict())) if dtype == torch.float64 else model


def in_double(model: Any, arch: Architecture) -> Any:
    """float64 throughout: transformers keeps the embedding's scale and computes RoPE's angles and RMSNorm in float32
    for double models too, so these are replaced; the float32 ones are checked first."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    model, rotary, scale = model.double(), model.model.rotary_emb, model.model.embed_tokens
    assert abs(float(scale.embed_scale) / math.sqrt(arch.d_model) - 1) < 1e-7
    scale.embed_scale.fill_(math.sqrt(arch.d_model))
    ropes = {"full_attention": arch.rope, "sliding_attention": arch.local_rope or arch.rope}
    known = {kind: torch.tensor(frequencies(rope, arch.head_dim)) for kind, rope in ropes.items()}
    for kind in rotary.layer_types:
        np.testing.assert_allclose(getattr(rotary, f"{kind}_inv_freq").double(), known[kind], rtol=1e-6)
        assert getattr(rotary, f"{kind}_attention_scaling") == 1

    def rotate(x, position_ids, layer_type):
        angles = position_ids[..., None].double() * known[layer_type]
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    def norm(module):
        def forward(x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.eps) * (1 + module.weight)

        return forward

    rotary.forward = rotate
    for module in model.modules():
        if isinstance(module, Gemma3RMSNorm):
            module.forward = norm(module)
    return model


def theirs(model: Any) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """(logits, mean loss, {name: gradient}) of the golden's batch. torch's Embedding would drop the padding token's
    gradient in the lookup; no padding carries loss here, and it is switched off."""
    b = {k: torch.tensor(v).long() for k, v in gemma3.batch().items()}
    model.get_input_embeddings().padding_idx = None
    out = model(b["tokens"], attention_mask=b["segments"], position_ids=b["positions"]).logits
    logp = torch.log_softmax(out, -1).gather(2, b["targets"][..., None])[..., 0]
    loss = -logp[b["weights"] > 0].sum() / b["weights"].sum()
    loss.backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return out.detach().numpy(), loss.item(), grads


def export_real(folder: Path) -> Path:
    """Gemma 3 270M as the folder we write."""
    source = resolve("gemma3-270m")
    tokenizer = load_tokenizer(source)
    write_folder(folder, load_params(source), source.arch, config=source.config,
                 generation_config=source.generation_config, tokenizer=tokenizer)  # fmt: skip
    return folder


def logprobs(model: Any, row: list[int]) -> np.ndarray:
    """Chosen log-probs: float64 log-softmax of the float32 logits."""
    with torch.no_grad():
        full = torch.log_softmax(model(torch.tensor([row])).logits[0].double(), -1)
    return full[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0].float().numpy()


def greedy(model: Any, prompt: list[int], steps: int) -> tuple[list[int], list[float]]:
    """The new tokens, and how far the best logit was ahead at each step."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=steps,
                         return_dict_in_generate=True, output_logits=True)  # fmt: skip
    best = torch.stack(out.logits)[:, 0].topk(2).values
    return out.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist()


def beams(model: Any, prompt: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(new tokens of all beams, best first, padded with the pad token; sequences_scores)."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=BEAM_STEPS,
                         num_beams=BEAMS, num_return_sequences=BEAMS, length_penalty=1.0, early_stopping=False,
                         return_dict_in_generate=True, output_scores=True)  # fmt: skip
    return out.sequences[:, len(prompt) :].numpy().astype(np.int32), out.sequences_scores.numpy()


def make_real() -> None:
    """Log-probs, greedy tokens and beams of the real model, by transformers from the folder we write."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = export_real(Path(scratch) / "gemma3")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    arrays: dict[str, Any] = {}
    long = (np.random.default_rng(0).permutation(np.repeat(tokenizer(TEXTS[0])["input_ids"][1:], 40))).tolist()
    rows = [*(tokenizer(text)["input_ids"] for text in TEXTS), [tokenizer.bos_token_id, *long[: LONG - 1]]]
    for i, row in enumerate(rows):
        arrays |= {f"text{i}_tokens": np.int32(row), f"text{i}_logprobs": logprobs(model, row)}
    nll = [-float(np.mean(logprobs(model, rows[0]))), -float(np.mean(logprobs(model, rows[0][1:])))]
    prompts, ties = [tokenizer(text)["input_ids"] for text in PROMPTS], []
    for i, prompt in enumerate(prompts):
        tokens, gaps = greedy(model, prompt, STEPS)
        arrays |= {f"prompt{i}": np.int32(prompt), f"greedy{i}": np.int32(tokens), f"gap{i}": np.float32(gaps)}
        ties += [{"prompt": i, "step": j, "gap": gap} for j, gap in enumerate(gaps) if gap < TIE]
    for i in range(3):
        arrays[f"beam{i}_tokens"], arrays[f"beam{i}_scores"] = beams(model, prompts[i])
    file = gemma3.FILE.with_name("gemma3_270m.npz")
    np.savez_compressed(file, **arrays)
    about = {
        "made_with": {"transformers": transformers.__version__, "torch": torch.__version__, "dtype": "float32"},
        "texts": TEXTS,
        "nll_with_and_without_bos": nll,
        "prompts": PROMPTS,
        "near_ties": ties,
        "beams": {"prompts": [0, 1, 2], "num_beams": BEAMS, "num_return_sequences": BEAMS, "length_penalty": 1.0,
                  "early_stopping": False, "max_new_tokens": BEAM_STEPS},
    }  # fmt: skip
    file.with_suffix(".json").write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{file}: {file.stat().st_size / 1e3:.0f} kB; NLL {nll}; near ties: {ties or 'none'}")


def make_tiny() -> None:
    """Logits, loss and gradients of the tiny model."""
    np.savez_compressed(gemma3.FILE, **gemma3.digest(*theirs(make_oracle())))
    print(f"{gemma3.FILE}: {gemma3.FILE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    torch.set_num_threads(2)
    for what in sys.argv[1:] or ("tiny", "real"):
        {"tiny": make_tiny, "real": make_real}[what]()
