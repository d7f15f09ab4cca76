"""Google Tunix as a worker of the training benchmark: `python -m tests.bench.stack_tunix tunix MODEL DUMP`.

Its PeftTrainer's own jitted step on full rows, all weights, float32, AdamW and clipping as in the bare torch loop.
"""

import sys
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.sft import utils
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

from tests.bench import rows
from tests.bench.decode_tunix import load
from tests.bench.duel import peak_gib, reply, serve, timed


def main(_: str, path: str, dump: str) -> None:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5, b2=0.999, eps=1e-8, weight_decay=0.0))
    trainer = PeftTrainer(load(path), optimizer, TrainingConfig(eval_every_n_steps=10**9, max_steps=10**6))

    def columns(x: Any) -> dict[str, Any]:
        return {
            "input_tokens": x.input_tokens, "input_mask": x.input_mask,
            "positions": utils.build_positions_from_mask(x.input_mask),
            "attention_mask": utils.make_causal_attn_mask(x.input_mask),
        }  # fmt: skip

    step, _ = trainer.with_gen_model_input_fn(columns).jit_train_and_eval_step(cache_nnx_graph=True)
    tokens = np.stack([e["tokens"] for e in rows.full()]).astype(np.int32)
    data, taken = np.split(tokens, len(tokens) // rows.ROWS), [0]

    def one() -> dict[str, float]:
        ids = data[taken[0] % len(data)]
        if not taken[0]:
            np.savez(dump, input_ids=ids, labels=ids)
        taken[0] += 1
        loss = step(TrainingInput(input_tokens=jnp.asarray(ids), input_mask=jnp.ones(ids.shape, bool)))[0]
        return {"loss": float(loss), "tokens": float(ids[:, 1:].size)}

    def gemm() -> dict[str, float]:
        from tests.bench.stack_ours import gemm

        return gemm()

    reply({"tunix": version("google-tunix"), "tunix_jax": jax.__version__})
    serve({"step": lambda: timed(one), "gemm": gemm, "memory": peak_gib})


if __name__ == "__main__":
    main(*sys.argv[1:])
