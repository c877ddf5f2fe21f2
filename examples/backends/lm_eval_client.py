"""lm-evaluation-harness: which of two sentences a model finds likelier, by the logprobs of the server's completions.

Its own tasks work in the same way, `tasks=["arc_easy"]`, where the hub of their data can be reached.
"""

import os
import sys

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

PAIRS = [("A spider has", " eight legs.", " eight wings."), ("Fish live in", " water.", " books.")]

model = LocalCompletionsAPI(
    model=sys.argv[1],
    base_url=f"{os.environ['OPENAI_BASE_URL']}/completions",
    tokenizer=sys.argv[1],  # the server's own, by HF_ENDPOINT
    tokenizer_backend="huggingface",
    num_concurrent=1,
    max_retries=1,
)
asked = [
    Instance("loglikelihood", {}, (question, answer), place)
    for place, (question, *answers) in enumerate(PAIRS)
    for answer in answers
]
found = [logprob for logprob, _is_greedy in model.loglikelihood(asked)]
for (question, right, wrong), first, second in zip(PAIRS, found[::2], found[1::2], strict=True):
    print(f"{question}{right} {first:.6f}{'  >' if first > second else '  <'}  {question}{wrong} {second:.6f}")
