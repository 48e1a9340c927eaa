"""A conversation as a ledger of token ids: every turn finds all of the last, whatever it said."""

import torch
import transformers

from kvmem.context import ChatRenderer, Ledger, Undo
from kvmem.demo import model
from kvmem.engines.transformers import PrefixStore

folder = model.ensure()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
torch.manual_seed(1)

system = "You are a planner of long journeys. Answer in one short sentence. " * 10
ledger = Ledger.open(ChatRenderer.of(tokenizer), system=system, session_id="planner")
with PrefixStore(lm, host_gb=0.5) as store:
    for question in ("Where should we go?", "Why there?", "When?"):
        ledger.append({"role": "user", "content": question})
        prompt = ledger.request()["prompt"]  # the body of a request to vLLM; here only its ids
        answer = store.generate([prompt], max_new_tokens=40, do_sample=True)
        sampled = answer.tokens[0, len(prompt) :].tolist()
        ledger.commit({"prompt_token_ids": prompt, "choices": [{"token_ids": sampled}]})
        print(answer.report.explain())

print(ledger)
print(ledger.quote(Undo(1), prefill_tokens_s=900).explain())
