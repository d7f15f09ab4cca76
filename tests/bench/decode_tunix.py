"""Google Tunix as a worker of the decoding benchmark: `python -m tests.bench.decode_tunix MODEL`."""

import functools
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama
from tunix.models.llama3.params import create_model_from_safe_tensors

from tests.bench.decode_jobs import JOBS, NEW, PROMPT, prompts
from tests.bench.duel import peak_gib, reply, serve, timed


class Ids:
    """A tokenizer whose texts are lists of ids; no token begins, ends or pads: -1 is none."""

    def encode(self, ids: list[int]) -> list[int]:
        return ids

    def decode(self, ids: list[int]) -> list[int]:
        return ids

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return -1

    def pad_id(self) -> int:
        return -1


def config_of(path: str) -> llama.ModelConfig:
    c = json.loads((Path(path) / "config.json").read_text())
    return llama.ModelConfig(
        num_layers=c["num_hidden_layers"], vocab_size=c["vocab_size"], embed_dim=c["hidden_size"],
        hidden_dim=c["intermediate_size"], num_heads=c["num_attention_heads"], head_dim=c["head_dim"],
        num_kv_heads=c["num_key_value_heads"], rope_theta=int(c["rope_theta"]), norm_eps=c["rms_norm_eps"],
        weight_tying=c["tie_word_embeddings"],
    )  # fmt: skip


def load(path: str) -> Any:
    """The model in float32."""
    config = config_of(path)
    # llama3 of Tunix 0.1.7 calls this without its config's rope_theta: the default, 1e6, whatever the model
    llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=config.rope_theta)
    return create_model_from_safe_tensors(path, config, dtype=jnp.float32)


def main(path: str) -> None:
    config, model = config_of(path), load(path)

    @functools.cache
    def sampler(new: int) -> Sampler:
        return Sampler(model, Ids(), CacheConfig(PROMPT + new, config.num_layers, config.num_kv_heads, config.head_dim))

    def generate(job: str, new: int = NEW) -> list[list[int]]:
        """The tokens. The sampler's loop makes one step more than asked and drops its token: part of its time."""
        count, beams, sampled = JOBS[job]
        how: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0} if sampled else {}
        how |= {"beam_size": beams} if beams > 1 else {}
        out = sampler(new)(prompts(count), max_generation_steps=new, max_prompt_length=PROMPT, **how)
        return [tokens.tolist() for tokens in out.tokens]

    def run(job: str, new: int = NEW) -> dict[str, float]:
        made = [0]

        def work() -> None:
            made[0] = sum(len(tokens) for tokens in generate(job, new))

        result = timed(work)
        assert made[0] == JOBS[job][0] * new
        return {**result, "tokens": made[0]}

    reply({"jax": jax.__version__, "tunix": version("google-tunix")})
    serve({"job": run, "tokens": generate, "memory": peak_gib})


if __name__ == "__main__":
    main(sys.argv[1])
