"""transformers with a KV cache that outlives a call: the second answer computes almost nothing."""

import transformers

from kvmem.demo import model  # SmolLM2-135M; any model of full attention will do
from kvmem.engines.transformers import PrefixStore

folder = model.ensure()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
instructions = "You are one of a team of agents that share these instructions. " * 40

with PrefixStore(lm, host_gb=0.5) as store:  # disk_gb=... keeps it over restarts
    for question in ("Who are you?", "Who are you?", "What do you do?"):
        ids = tokenizer(instructions + question, return_tensors="pt").input_ids
        answer = store.generate(ids, max_new_tokens=8, do_sample=False)
        print(answer.report.explain())
