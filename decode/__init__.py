"""Sampling, scoring, chat.

from decode.load import load_model
from decode.generate import Sampling, generate
from decode.score import perplexity, score

model = load_model("smollm2-135m-instruct")
for completion in generate(model, ["The sky is", "Water boils at"], Sampling(max_new_tokens=32, temperature=0.7)):
    print(completion.text, completion.score, completion.finish_reason)
"""

from configs import check_siblings

check_siblings()
