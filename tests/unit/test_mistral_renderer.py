"""Mistral's own tokenizers, out of their package: what holds, what the probe says does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

mistral_common = pytest.importorskip("mistral_common")

from kvmem.context import Ledger, MistralRenderer, probe  # noqa: E402
from kvmem.errors import PrefixBroken  # noqa: E402

DATA = Path(mistral_common.__file__).parent / "data"
V7 = DATA / "mistral_instruct_tokenizer_241114.model.v7"
V3 = DATA / "mistral_instruct_tokenizer_240323.model.v3"
TEKKEN = DATA / "tekken_240911.json"
END = [2]

pytestmark = pytest.mark.skipif(
    not all(file.is_file() for file in (V7, V3, TEKKEN)), reason="the package has other tokenizers"
)


def play(ledger: Ledger, renderer: MistralRenderer) -> list[dict[str, Any]]:
    """Two turns and a question, the answers sampled as the tokenizer would write them."""
    for question, said in (("One?", "größe 🙂"), ("Two?", "2")):
        ledger.append({"role": "user", "content": question})
        sent = ledger.request()["prompt"]
        sampled = renderer.encode(said) + END
        ledger.commit({"prompt_token_ids": sent, "choices": [
            {"token_ids": sampled, "message": {"role": "assistant", "content": said}}
        ]})  # fmt: skip
    ledger.append({"role": "user", "content": "Three?"})
    return ledger.messages()


@pytest.mark.parametrize(
    ("file", "system"), [(V7, "You are exact."), (V7, None), (V3, None), (TEKKEN, None)],
    ids=["v7 with system", "v7", "v3", "tekken v3"],
)  # fmt: skip
def test_the_ids_are_those_of_mistral_s_package(file: Path, system: str | None) -> None:
    renderer = MistralRenderer.of(file)
    ledger = Ledger.open(renderer, system=system, accept=["refused", "trimmed"])
    messages = play(ledger, renderer)
    assert ledger.request()["prompt"] == renderer.whole(messages)


def test_what_it_loses_or_refuses_is_named() -> None:
    renderer = MistralRenderer.of(V7)
    assert {b.rule for b in probe(renderer, tools=False)} == {"refused", "trimmed"}
    with pytest.raises(PrefixBroken, match=r"refused, trimmed|trimmed, refused"):
        Ledger.open(renderer, system="You are exact.")


def test_tools_that_move_to_the_last_user_message_are_found_out() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "F.",
                                               "parameters": {"type": "object"}}}]  # fmt: skip
    for file in (V7, V3):
        with pytest.raises(PrefixBroken) as raised:
            Ledger.open(MistralRenderer.of(file), tools=tools, accept=["refused", "trimmed"])
        assert "rewritten" in raised.value.rules


def test_a_system_prompt_that_moves_with_the_last_message_is_found_out() -> None:
    with pytest.raises(PrefixBroken, match="into a user's message"):
        Ledger.open(MistralRenderer.of(V3), system="You are exact.", accept=["refused", "trimmed"])


def test_a_renderer_is_known_by_its_file() -> None:
    assert MistralRenderer.of(V7).digest == MistralRenderer.of(V7).digest
    assert MistralRenderer.of(V7).digest != MistralRenderer.of(V3).digest
