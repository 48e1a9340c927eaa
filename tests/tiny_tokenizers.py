"""Tokenizers of bytes with a chat template of the test's choice, made in a moment."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CHATML = (
    "{% for m in messages %}<|s|>{{ m['role'] }}\n"
    "{% if m.get('tool_calls') %}{% for c in m['tool_calls'] %}"
    "<call>{{ c['function']['name'] }} {{ c['function']['arguments'] }}</call>"
    "{% endfor %}{% endif %}"
    "{{ m['content'] }}<|e|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|s|>assistant\n{% endif %}"
)
TOOLS_FIRST = "{% if tools %}<|s|>tools\n{{ tools | tojson }}<|e|>\n{% endif %}" + CHATML


def tokenizer(template: str = TOOLS_FIRST, *, merge_newlines: bool = False) -> Any:
    """One id a byte; `<|s|>` and `<|e|>` are tokens; two line feeds are one where asked for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    newline = "Ċ"
    merges = [(newline, newline)] if merge_newlines else []
    for a, b in merges:
        vocabulary[a + b] = len(vocabulary)
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    special = [] if merge_newlines else ["<|s|>", "<|e|>"]
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    fast.chat_template = template
    return fast
