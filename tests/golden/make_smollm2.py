"""Make smollm2.npz and smollm2.json: what transformers computes with SmolLM2-135M-Instruct. Needs the extra `parity`.

    python tests/golden/make_smollm2.py FOLDER

FOLDER: the model as a Hugging Face folder, such as convert.hf writes it from the named model smollm2-135m-instruct (or
transformers' own reading of that GGUF, saved: the tensors are the same).
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

TOP = 20  # logits kept at each position
EVERY = 4  # positions of the left-padded batch whose logits are kept
STEPS = 64
TIE = 2e-4

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and nobody in the village was surprised.",
    "Water boils at 100 degrees Celsius at sea level; on Mount Everest it boils at about 71 degrees.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "In 1969, Apollo 11 landed on the Moon. 3.14159 * 2 = 6.28318, 1,000,000 - 1 = 999,999.",
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>\n",
    "春眠不觉晓，处处闻啼鸟。 naïve café, “quoted”, ℃ 🎉",
    "  spaces   and\ttabs\n\n\nand blank lines   ",
    "Yes",
    '{"name": "Ada", "born": 1815, "fields": ["mathematics", "computing"], "alive": false}',
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of "
    "foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it "
    "was the season of Darkness, it was the spring of hope, it was the winter of despair, we had everything "
    "before us, we had nothing before us, we were all going direct to Heaven, we were all going direct the "
    "other way - in short, the period was so far like the present period, that some of its noisiest "
    "authorities insisted on its being received, for good or for evil, in the "
    "superlative degree of comparison only.",
]
LEFT_PADDED = (0, 2, 5, 7)  # texts of one left-padded batch
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write a short poem about the sea.",
    "Explain why the sky is blue in one sentence.",
    "How do I sort a list in Python?",
]
OPENINGS = [
    "Once upon a time",
    "The three laws of motion are",
    "import numpy as np\n\ndef softmax(x):\n",
    "Dear Sir or Madam,",
    "The recipe needs two eggs,",
]


def main(folder: str) -> None:
    """Run the oracle and write both files beside this one."""
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    arrays: dict[str, np.ndarray] = {}
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    for i, row in enumerate(rows):
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0]
        add(arrays, f"text{i}", row, logits, 1)
    padded(arrays, model, [rows[i] for i in LEFT_PADDED])
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
        for q in QUESTIONS
    ]
    prompts, ties = [tokenizer(text)["input_ids"] for text in [*chats, *OPENINGS]], []
    for i, prompt in enumerate(prompts):
        tokens, gaps = greedy(model, prompt)
        arrays |= {f"prompt{i}": short(prompt), f"greedy{i}": short(tokens), f"gap{i}": np.float32(gaps)}
        ties += [{"prompt": i, "step": j, "gap": gap} for j, gap in enumerate(gaps) if gap < TIE]
    here = Path(__file__).parent
    np.savez_compressed(here / "smollm2.npz", **arrays)  # type: ignore[arg-type]
    about = {
        "made_with": {"transformers": transformers.__version__, "torch": torch.__version__, "dtype": "float32"},
        "texts": TEXTS,
        "left_padded": LEFT_PADDED,
        "every": EVERY,
        "prompts": [*chats, *OPENINGS],
        "near_ties": ties,
    }
    (here / "smollm2.json").write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"near ties (two best logits within {TIE}): {ties or 'none'}")


def short(ids: list[int]) -> np.ndarray:
    """Token ids in two bytes each: the vocabulary has 49152."""
    return np.asarray(ids, np.uint16)


def add(arrays: dict[str, np.ndarray], name: str, row: list[int], logits: torch.Tensor, every: int) -> None:
    """Tokens, chosen log-probs of every position (float64 log-softmax of the float32 logits), largest logits."""
    logprobs = torch.log_softmax(logits.double(), -1)[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0]
    values, ids = logits[::every].topk(TOP)
    arrays |= {
        f"{name}_tokens": short(row),
        f"{name}_logprobs": logprobs.float().numpy(),
        f"{name}_top": values.numpy(),
        f"{name}_ids": ids.numpy().astype(np.uint16),
    }


def padded(arrays: dict[str, np.ndarray], model: torch.nn.Module, rows: list[list[int]]) -> None:
    """One batch padded on the left, with the positions that generate gives."""
    longest = max(map(len, rows))
    tokens, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, longest - len(row) :], mask[i, longest - len(row) :] = torch.tensor(row), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask, position_ids=positions).logits
    for i, row in enumerate(rows):
        add(arrays, f"left{i}", row, logits[i, longest - len(row) :], EVERY)


def greedy(model: torch.nn.Module, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The new tokens (the end-of-sequence token included) and how far the best logit was ahead at each step."""
    ids = torch.tensor([prompt])
    out = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=STEPS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.stack(out.logits)[:, 0].topk(2).values
    return out.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist()


if __name__ == "__main__":
    main(sys.argv[1])
