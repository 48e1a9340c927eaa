"""The guard: off without a share, silent where KV is right, heard where it changes an answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks._models import make, prompt  # noqa: E402
from kvmem import events  # noqa: E402
from kvmem.blame.guard import Guard  # noqa: E402
from kvmem.engines.transformers import PrefixStore  # noqa: E402
from kvmem.engines.transformers.scoring import PackedScorer  # noqa: E402
from kvmem.errors import ConfigError, EngineError  # noqa: E402


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackedScorer]:
    import transformers

    folder = make("llama", tmp_path_factory.mktemp("model"))  # every token of a prompt shows
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with PrefixStore(model.eval(), host_gb=0.02, max_tokens=256) as store:
        yield PackedScorer(store)


def test_nothing_is_looked_at_until_a_share_is_given() -> None:
    bus = events.Bus()
    guard = Guard(None, bus)  # type: ignore[arg-type]
    assert guard.look([1], session="s", turn=0) is None
    assert bus.recent() == ()


def test_a_share_of_the_turns_is_looked_at_the_same_ones_every_time() -> None:
    one, two = (Guard(None, events.Bus(), share=0.2) for _ in range(2))  # type: ignore[arg-type]
    chosen = [turn for turn in range(2000) if one.wants("s", turn)]
    assert 300 < len(chosen) < 500
    assert chosen == [turn for turn in range(2000) if two.wants("s", turn)]
    assert all(Guard(None, events.Bus(), share=1.0).wants("s", t) for t in range(9))  # type: ignore[arg-type]


def test_exact_kv_is_not_called_wrong(scorer: PackedScorer) -> None:
    bus = events.Bus()
    guard = Guard(scorer, bus, share=1.0)
    for turn in range(8):
        found = guard.look(prompt(120, seed=turn), session="s", turn=turn)
        assert found is not None
        assert not found.changed
    assert bus.recent() == ()


def test_a_changed_answer_raises_an_event_without_its_text(scorer: PackedScorer) -> None:
    bus = events.Bus()
    guard = Guard(scorer, bus, share=1.0)
    found = [
        guard.look(prompt(120, seed=turn), session="s", turn=turn, kv="int2") for turn in range(8)
    ]
    changed = [turn for turn, one in enumerate(found) if one is not None and one.changed]
    assert changed  # two bits are few
    told = [e for e in bus.recent() if isinstance(e, events.AnswerChanged)]
    assert [e.turn for e in told] == changed
    for event in told:
        one = found[event.turn]
        assert one is not None
        assert (event.session, event.at, event.nats) == ("s", one.at, one.nats)


def test_an_engine_that_fails_costs_an_event_and_no_turn() -> None:
    class Broken:
        def sample(self, *_: Any, **__: Any) -> Any:
            raise EngineError("gone")

    bus = events.Bus()
    guard = Guard(Broken(), bus, share=1.0)  # type: ignore[arg-type]
    assert guard.look([1], session="s", turn=0) is None
    (event,) = bus.recent()
    assert isinstance(event, events.Failure)
    assert event.where == "guard"


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="share"):
        Guard(None, events.Bus(), share=share)  # type: ignore[arg-type]
