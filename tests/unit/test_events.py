"""The bus: every subscriber is told, and none can harm the engine."""

from __future__ import annotations

import pytest

from kvmem.events import Bus, Event, Evicted, Failure


def test_subscribers_are_told_in_order_until_they_leave() -> None:
    bus, told = Bus(), list[Event]()
    leave = bus.subscribe(told.append)
    bus.emit(Evicted(blocks=1))
    leave()
    bus.emit(Evicted(blocks=2))
    assert told == [Evicted(blocks=1)]


def test_a_subscriber_that_raises_is_dropped_and_the_others_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bus, told = Bus(), list[Event]()

    def broken(event: Event) -> None:
        raise RuntimeError("broken subscriber")

    bus.subscribe(broken)
    bus.subscribe(told.append)
    bus.emit(Failure(where="here", error="x"))
    bus.emit(Failure(where="there", error="y"))
    assert len(told) == 2
    assert len(caplog.records) == 1


def test_only_the_last_events_are_kept() -> None:
    bus = Bus(keep=2)
    for n in range(5):
        bus.emit(Evicted(blocks=n))
    assert bus.recent() == (Evicted(blocks=3), Evicted(blocks=4))
