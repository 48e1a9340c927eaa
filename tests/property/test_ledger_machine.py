"""Ledgers against plain lists: whatever is done, what was sent and sampled stays a prefix (I8)."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

pytest.importorskip("transformers")

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from kvmem.context import ChatRenderer, Drop, Ledger, Replace, Undo
from kvmem.errors import PrefixBroken
from tests.tiny_tokenizers import tokenizer

RENDERER = ChatRenderer.of(tokenizer())
TEXTS = st.text(st.sampled_from("ab \nö🙂<>|"), max_size=8)
END = RENDERER.encode("<|e|>")


class Ledgers(RuleBasedStateMachine):
    """Each ledger beside the list of ids that it must be, and the messages that it must tell."""

    ledgers = Bundle("ledgers")

    def __init__(self) -> None:
        super().__init__()
        self.wanted: dict[int, tuple[Ledger, list[int], list[dict[str, Any]]]] = {}

    def add(self, ledger: Ledger, ids: list[int], messages: list[dict[str, Any]]) -> int:
        number = len(self.wanted)
        self.wanted[number] = (ledger, ids, messages)
        return number

    @initialize(target=ledgers, system=TEXTS)
    def begin(self, system: str) -> int:
        one = Ledger.open(RENDERER, system=system, seal=False)
        told = [{"role": "system", "content": system}]
        return self.add(one, one.tokens(), told)

    @rule(number=ledgers, texts=st.lists(TEXTS, min_size=1, max_size=3),
          role=st.sampled_from(["user", "tool", "system", "assistant"]))  # fmt: skip
    def append(self, number: int, texts: list[str], role: str) -> None:
        one, ids, told = self.wanted[number]
        one.append(*({"role": role, "content": text} for text in texts))
        assert one.tokens()[: len(ids)] == ids
        ids[:] = one.tokens()
        told += [{"role": role, "content": text} for text in texts]

    @rule(number=ledgers, text=TEXTS, ended=st.booleans())
    def ask(self, number: int, text: str, ended: bool) -> None:
        one, ids, told = self.wanted[number]
        sent = one.request()["prompt"]
        assert sent[: len(ids)] == ids
        sampled = RENDERER.encode(text) + (END if ended else [])
        message = {"role": "assistant", "content": text}
        one.commit(
            {"prompt_token_ids": sent, "choices": [{"token_ids": sampled, "message": message}]}
        )
        ids[:] = sent + sampled
        told.append(message)

    @rule(number=ledgers)
    def ask_in_vain(self, number: int) -> None:
        one, ids, _ = self.wanted[number]
        sent = one.request()["prompt"]
        with pytest.raises(PrefixBroken):
            one.commit({"prompt_token_ids": sent[:-1], "choices": [{"token_ids": [1]}]})
        with pytest.raises(PrefixBroken):
            one.append({"role": "user", "content": "now"})
        one.retract()
        assert one.tokens() == ids

    @rule(target=ledgers, number=ledgers)
    def fork(self, number: int) -> int:
        one, ids, told = self.wanted[number]
        return self.add(one.fork("f"), list(ids), list(told))

    @rule(target=ledgers, number=ledgers, data=st.data())
    def rewrite(self, number: int, data: Any) -> int:
        one, ids, told = self.wanted[number]
        n = len(one.spans) - 1
        if n == 0:
            return number
        first = data.draw(st.integers(1, n))
        last = data.draw(st.integers(first, n))
        new = one.rewrite(Drop(first, last))
        assert one.tokens() == ids
        assert new.supersedes == one.digest
        price = one.quote(Drop(first, last), prefill_tokens_s=100, block_tokens=4)
        kept = price.tokens_kept
        assert new.tokens()[:kept] == ids[:kept]
        assert one.spans[first - 1].stop <= kept
        return self.add(new, new.tokens(), told[:first] + told[last + 1 :])

    @rule(target=ledgers, number=ledgers, text=TEXTS, data=st.data())
    def replace(self, number: int, text: str, data: Any) -> int:
        one, ids, told = self.wanted[number]
        n = len(one.spans) - 1
        if n == 0:
            return number
        first = data.draw(st.integers(1, n))
        last = data.draw(st.integers(first, n))
        message = {"role": "user", "content": text}
        new = one.rewrite(Replace(first, last, message))
        assert one.tokens() == ids
        return self.add(new, new.tokens(), [*told[:first], message, *told[last + 1 :]])

    @rule(target=ledgers, number=ledgers)
    def keep(self, number: int) -> int:
        one, ids, told = self.wanted[number]
        with TemporaryDirectory() as folder:
            path = Path(folder) / "ledger"
            one.save(path)
            back = Ledger.load(path, RENDERER)
        assert back.digest == one.digest
        return self.add(back, list(ids), list(told))

    @rule(number=ledgers)
    def undo_too_much(self, number: int) -> None:
        one = self.wanted[number][0]
        turns = sum(span.role == "user" for span in one.spans)
        with pytest.raises(PrefixBroken):
            one.rewrite(Undo(turns + 1))

    @invariant()
    def all_are_what_they_must_be(self) -> None:
        for one, ids, told in self.wanted.values():
            assert one.tokens() == ids
            assert one.n_tokens == len(ids)
            assert one.messages() == told
            assert one.check(told) == []
            # The same as the template over all of it, but for an end that the model left out.
            whole = RENDERER.encode(RENDERER.text(told))
            assert whole[: len(ids)] == ids


TestLedgers = Ledgers.TestCase
TestLedgers.settings = settings(max_examples=40, stateful_step_count=25)
