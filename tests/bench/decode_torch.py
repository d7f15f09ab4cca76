"""transformers as a worker of the decoding benchmark: `python -m tests.bench.decode_torch dynamic | static MODEL`."""

import os
import sys

import torch
from transformers import AutoModelForCausalLM

from tests.bench.decode_jobs import JOBS, NEW, prompts
from tests.bench.duel import peak_gib, reply, serve, timed

torch.set_num_threads(len(os.sched_getaffinity(0)))


def main(cache: str, path: str) -> None:
    import transformers

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
    more = {"cache_implementation": "static"} if cache == "static" else {}

    def run(job: str, new: int = NEW) -> dict[str, float]:
        count, beams, sampled = JOBS[job]
        ids = torch.tensor(prompts(count))
        made = [0]

        def work() -> None:
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, num_beams=beams,
                do_sample=sampled, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=2, **more,
            )  # fmt: skip
            made[0] = out.shape[0] * (out.shape[1] - ids.shape[1])

        result = timed(work)
        assert made[0] == count * new
        return {**result, "tokens": made[0]}

    reply({"torch": torch.__version__, "transformers": transformers.__version__, "cache": cache})
    serve({"job": run, "memory": peak_gib})


if __name__ == "__main__":
    main(*sys.argv[1:])
