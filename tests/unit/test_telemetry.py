"""What goes over the bus is counted once, within bounds, and reads the same in every form."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvmem import events
from kvmem.errors import ConfigError
from kvmem.telemetry import logs
from kvmem.telemetry.live import Histogram, Sample, Snapshot, Tier
from kvmem.telemetry.logs import EventLog
from kvmem.telemetry.meter import Meter
from kvmem.telemetry.metrics import METRICS, MOST_SERIES, OTHER, metric
from kvmem.telemetry.pump import Pump

pytest.importorskip("prometheus_client")


def answered(n: int = 0, session: str = "s", **more: Any) -> events.Answered:
    told = {
        "request_id": f"r{n}", "session": session, "prompt": 100, "device": 10, "host": 20,
        "disk": 30, "computed": 40, "began_s": 1.0, "ended_s": 2.0, "disk_s": 0.5, "load_s": 0.01,
        "store_s": 0.001, **more,
    }  # fmt: skip
    return events.Answered(**told)


def missed(n: int, reason: str, tokens: int, was: str = "") -> events.Missed:
    return events.Missed(
        request_id=f"r{n}", reason=reason, first=0, tokens=tokens, ms=tokens * 1.0, was=was
    )


EVENTS: list[tuple[events.Event, str, tuple[str, ...], float]] = [
    (answered(), "kvmem_requests_total", (), 1),
    (answered(), "kvmem_prompt_tokens_total", ("disk",), 30),
    (answered(), "kvmem_prompt_tokens_total", ("computed",), 40),
    (answered(far=50, far_s=0.2), "kvmem_prompt_tokens_total", ("far",), 50),
    (missed(0, "evicted", 7), "kvmem_missed_tokens_total", ("evicted",), 7),
    (missed(0, "evicted", 7), "kvmem_missed_seconds_total", ("evicted",), 0.007),
    (
        missed(0, "tools_changed", 7, "input_changed"),
        "kvmem_renamed_tokens_total", ("input_changed", "tools_changed"), 7,
    ),
    (
        events.Stored(request_id="r", blocks=3, bytes=30, seconds=0.1),
        "kvmem_moved_bytes_total", ("host", "in"), 30,
    ),
    (
        events.Loaded(request_id="r", blocks=3, bytes=30, seconds=0.1),
        "kvmem_moved_blocks_total", ("host", "out"), 3,
    ),
    (
        events.Evicted(blocks=5, tier="disk", cause="demote"),
        "kvmem_evicted_blocks_total", ("disk", "demote"), 5,
    ),
    (
        events.Quarantined(key="00", blocks=2, reason="scrub"),
        "kvmem_quarantined_blocks_total", ("host", "scrub"), 2,
    ),
    (
        events.Refused(request_id="r", blocks=2, reason="no_room"),
        "kvmem_refused_blocks_total", ("no_room",), 2,
    ),
    (events.Cleared(blocks=9, reason="reset"), "kvmem_cleared_blocks_total", ("reset",), 9),
    (
        events.Shadowed(request_id="r", blocks=9, equal=5, bad=1, worst=0.1),
        "kvmem_shadowed_blocks_total", ("close",), 3,
    ),
    (events.Proof(tier="disk", error="x"), "kvmem_proofs_total", ("disk", "failed"), 1),
    (events.Proof(tier="host", error=""), "kvmem_proofs_total", ("host", "passed"), 1),
    (events.TierOff(tier="disk", error="x"), "kvmem_tier_changes_total", ("disk", "off"), 1),
    (events.TierOn(tier="disk", seconds=1.0), "kvmem_tier_changes_total", ("disk", "on"), 1),
    (events.Failure(where="load", error="x"), "kvmem_failures_total", ("load",), 1),
]  # fmt: skip


@pytest.mark.parametrize(("event", "name", "labels", "value"), EVENTS)
def test_an_event_is_counted_where_the_catalogue_says(
    event: events.Event, name: str, labels: tuple[str, ...], value: float
) -> None:
    bus = events.Bus()
    meter = Meter(bus)
    bus.emit(event)
    bus.emit(event)
    assert Sample(name, labels, 2 * value) in meter.samples()
    for sample in meter.samples():
        assert len(sample.labels) == len(metric(sample.name).labels)


def test_durations_are_counted_in_the_bucket_that_they_fit_in() -> None:
    bus = events.Bus()
    meter = Meter(bus)
    bounds = metric("kvmem_load_seconds").buckets
    for seconds in (0.0, bounds[0], bounds[0] * 1.01, 1e9):
        bus.emit(events.Loaded(request_id="r", blocks=1, bytes=1, seconds=seconds))
    (told,) = [s.value for s in meter.samples() if s.name == "kvmem_load_seconds"]
    assert isinstance(told, Histogram)
    assert told.counts == (2, 1, *[0] * (len(bounds) - 2), 1)
    assert told.sum == pytest.approx(1e9, rel=1e-6)


def test_a_renamed_miss_moves_in_its_session() -> None:
    bus = events.Bus()
    meter = Meter(bus)
    bus.emit(answered())
    bus.emit(missed(0, "input_changed", 40))
    bus.emit(missed(0, "tools_changed", 40, "input_changed"))
    (session,), n = meter.sessions(10)
    assert (session.missed, n) == ({"input_changed": 0, "tools_changed": 40}, 1)
    assert session.missed_ms == 40.0


# -- bounds (I7) ---------------------------------------------------------------------------------


def test_no_flood_of_labels_makes_more_series_than_the_bound() -> None:
    bus = events.Bus()
    meter = Meter(bus)
    for n in range(10 * MOST_SERIES):
        bus.emit(events.Failure(where=f"place {n}", error="x"))
    told = [s for s in meter.samples() if s.name == "kvmem_failures_total"]
    assert len(told) == MOST_SERIES
    assert sum(s.value for s in told if not isinstance(s.value, Histogram)) == 10 * MOST_SERIES
    assert OTHER in {s.labels[0] for s in told}


def test_no_label_takes_what_a_client_chooses() -> None:
    bus = events.Bus()
    meter = Meter(bus)
    secret = "a-session-or-a-request"
    bus.emit(answered(session=secret, request_id=secret))
    bus.emit(events.Missed(request_id=secret, reason="evicted", first=0, tokens=1))
    bus.emit(events.Stored(request_id=secret, blocks=1, bytes=1, seconds=1.0))
    bus.emit(events.Evicted(blocks=1, request_id=secret))
    assert not [s for s in meter.samples() if secret in s.labels]


def test_the_sessions_used_last_are_remembered() -> None:
    bus = events.Bus()
    meter = Meter(bus, most_sessions=3)
    for n in (0, 1, 2, 0, 3):
        bus.emit(answered(n, session=f"s{n}"))
    told, n = meter.sessions(10)
    assert [one.session for one in told] == ["s3", "s0", "s2"]
    assert n == 3
    assert [one.session for one in meter.sessions(1)[0]] == ["s3"]


def test_events_beyond_the_queue_are_dropped_and_counted() -> None:
    bus = events.Bus()
    meter = Meter(bus, most_waiting=10)
    for n in range(25):
        bus.emit(answered(n))
    assert Sample("kvmem_requests_total", (), 10) in meter.samples()
    assert meter.dropped == 15


def test_a_reader_that_was_away_gets_the_last_events_and_can_tell_what_it_missed() -> None:
    bus = events.Bus()
    meter = Meter(bus)
    for n in range(300):
        bus.emit(events.Evicted(blocks=n))
    told = meter.events(0)
    assert len(told) < meter.n_events == 300
    assert told[-1] == {"event": "evicted", **told[-1]}
    assert told[-1]["blocks"] == 299
    assert [one["blocks"] for one in meter.events(298)] == [298, 299]
    assert meter.events(300) == []


def test_threads_that_emit_and_read_at_once_lose_nothing() -> None:
    bus = events.Bus()
    meter = Meter(bus, most_waiting=10**6)
    writers = [
        threading.Thread(target=lambda: [bus.emit(answered(n)) for n in range(2000)])
        for _ in range(4)
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        meter.samples()
    assert Sample("kvmem_requests_total", (), 8000) in meter.samples()


# -- a slow reader -------------------------------------------------------------------------------


def test_a_pump_drops_what_a_slow_reader_leaves_and_says_how_much() -> None:
    bus = events.Bus()
    told: list[tuple[int, int]] = []
    pump = Pump(
        bus, lambda some, dropped: told.append((len(some), dropped)), name="t",
        clock=lambda: 0.0, most=3,
    )  # fmt: skip
    with pump._turn:  # the reader is at work
        for n in range(5):
            bus.emit(answered(n))
    pump.close()
    bus.emit(answered(6))
    assert told == [(3, 2)]
    assert pump.dropped == 2


def test_a_reader_that_raises_misses_events_and_stops_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bus, told = events.Bus(), list[int]()

    def reader(some: list[Any], dropped: int) -> None:
        told.append(len(some))
        if len(told) == 1:
            raise RuntimeError("a full disk")

    pump = Pump(bus, reader, name="t", clock=lambda: 0.0)
    bus.emit(answered(0))
    pump._safely()
    bus.emit(answered(1))
    pump.close()
    assert told == [1, 1]
    assert len(caplog.records) == 1


# -- log lines -----------------------------------------------------------------------------------


def test_a_log_is_turned_over_at_its_bound(tmp_path: Path) -> None:
    path, bus = tmp_path / "events.jsonl", events.Bus()
    log = EventLog(path, most_bytes=500)
    log.follow(bus)
    for n in range(20):
        bus.emit(answered(n))
        log.flush()
    log.close()
    former = path.with_name("events.jsonl.1")
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, former.name]
    assert former.stat().st_size < 1000
    assert former.stat().st_mode & 0o777 == path.stat().st_mode & 0o777 == 0o600
    last = [json.loads(line) for line in (former.read_text() + path.read_text()).splitlines()][-1]
    assert (last["request_id"], last["at"][-1]) == ("r19", "Z")


def test_a_log_that_cannot_be_turned_over_writes_into_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, bus = tmp_path / "events.jsonl", events.Bus()
    log = EventLog(path, most_bytes=100)
    log.follow(bus)

    def refuse(_: Path) -> int:
        raise OSError(errno.EMFILE, "no more")

    monkeypatch.setattr(logs, "_open", refuse)
    bus.emit(answered(0))
    with pytest.raises(OSError, match="no more"):  # the pump's thread tells of it
        log.flush()
    with (tmp_path / "another").open("wb") as other:  # would have the number that was let go
        monkeypatch.undo()
        bus.emit(answered(1))
        log.flush()
        assert os.fstat(other.fileno()).st_size == 0
    log.close()
    told = "".join(file.read_text() for file in tmp_path.iterdir())
    assert "r0" in told
    assert "r1" in told


def test_a_log_is_no_way_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="event_log"):
        EventLog(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


# -- Prometheus ----------------------------------------------------------------------------------


def snapshot(samples: list[Sample], pid: int = 1) -> Snapshot:
    tier = Tier(name="host", on=True, blocks=0, bytes=0, capacity_bytes=1)
    return Snapshot(
        at_s=0.0, model="m", pid=pid, arena="a", block_tokens=16, block_bytes=1,
        prefill_s_per_token=0.0, tiers=(tier,), samples=tuple(samples),
    )  # fmt: skip


def test_prometheus_reads_what_was_counted() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    from kvmem.telemetry.prometheus import exposition

    bus = events.Bus()
    meter = Meter(bus)
    for event, *_ in EVENTS:
        bus.emit(event)
    told = meter.samples()
    text = exposition([snapshot(told), snapshot(told, 2)]).decode()
    found = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }

    def at(name: str, pid: int = 1, **labels: str) -> float:
        return found[name, frozenset({"model_name": "m", "engine": str(pid), **labels}.items())]

    assert at("kvmem_prompt_tokens_total", source="disk") == 120
    assert at("kvmem_prompt_tokens_total", 2, source="disk") == 120
    assert at("kvmem_load_seconds_bucket", le="0.1") == 1
    assert at("kvmem_load_seconds_bucket", le="0.05") == 0
    assert at("kvmem_load_seconds_bucket", le="+Inf") == 1
    assert at("kvmem_load_seconds_sum") == pytest.approx(0.1)
    for one in told:
        if not isinstance(one.value, Histogram):
            labels = dict(zip(metric(one.name).labels, one.labels, strict=True))
            assert at(one.name, **labels) == one.value


def test_a_snapshot_crosses_a_process_whole() -> None:
    bus = events.Bus()
    meter = Meter(bus)
    for event, *_ in EVENTS:
        bus.emit(event)
    one = snapshot(meter.samples())
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(one), type=Snapshot) == one


def test_names_and_labels_are_as_prometheus_wants_them() -> None:
    for one in METRICS:
        assert one.name.startswith("kvmem_")
        assert one.name.endswith("_total") == (one.kind == "counter")
        assert (one.buckets == ()) == (one.kind != "histogram")
        assert not {"session", "session_id", "request_id", "salt"} & set(one.labels)
    assert len({one.name for one in METRICS}) == len(METRICS)
