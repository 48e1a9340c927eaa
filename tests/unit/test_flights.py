"""Loads that several requests share."""

from __future__ import annotations

from kvmem.engines.vllm.flights import PATIENCE_S, Flights


def flights() -> tuple[Flights, list[float]]:
    now = [0.0]
    return Flights(lambda: now[0]), now


def test_who_comes_second_waits_and_the_first_does_not() -> None:
    one, _ = flights()
    one.begin("a", [b"1", b"2"])
    assert one.waits("b", b"1")
    assert one.waits("b", b"2")
    assert not one.waits("a", b"1")
    assert not one.waits("b", b"3")
    one.end("a")
    assert not one.waits("b", b"1")
    assert one.n_waited == 1


def test_nobody_waits_for_ever() -> None:
    one, now = flights()
    one.begin("a", [b"1"])
    assert one.waits("b", b"1")
    now[0] = PATIENCE_S
    assert not one.waits("b", b"1")
    one.forget("b")
    assert one.waits("b", b"1")


def test_a_block_belongs_to_the_first_of_two_loads() -> None:
    one, _ = flights()
    one.begin("a", [b"1"])
    one.begin("b", [b"1", b"2"])
    one.end("b")
    assert one.is_coming(b"1")
    assert not one.is_coming(b"2")
    one.forget("a")
    assert not one.is_coming(b"1")
