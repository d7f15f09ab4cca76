"""Make gemma3_270m.npz and .json: the real Gemma 3 (make_families.py has a tiny one). Needs the extra `parity`.

    python -m tests.golden.make_gemma3

What is kept is what transformers computes; the real weights (Gemma terms of use) stay in the cache.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from convert.hf import write_folder
from convert.load import load_params, load_tokenizer, resolve
from tests.golden.families import FOLDER

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
    file = FOLDER.with_name("gemma3_270m.npz")
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


if __name__ == "__main__":
    torch.set_num_threads(2)
    make_real()
