"""What an engine tells of itself, on vLLM's own schedulers: the figures of what happened."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import prometheus_client
import pytest

from kvmem.errors import ConfigError, NotAnswered
from kvmem.store import Arena
from kvmem.store.desk import ask
from kvmem.store.live import snapshots
from kvmem.telemetry.live import Snapshot
from tests.scheduling.engine import Engine, InjectedError, running
from tests.scheduling.forward import BLOCK
from tests.scheduling.test_steps import PROMPT, WHOLE, stored

pytestmark = pytest.mark.engine


@pytest.fixture
def engine(config: Any, arena_name: str) -> Iterator[Engine]:
    with running(config, asynchronous=True, arena=arena_name, n_host=40) as engine:
        yield engine


def snapshot(engine: Engine) -> Snapshot:
    """As another process gets it."""
    (found,) = snapshots(arena=engine.half.arena.path.name, events_since=0)
    return found


def test_the_snapshot_says_what_was_stored_found_and_missed(engine: Engine) -> None:
    stored(engine, session="s")
    engine.generate(PROMPT, session="s")
    told = snapshot(engine)
    assert told.total("kvmem_requests_total") == 2
    assert told.total("kvmem_prompt_tokens_total", "host") == WHOLE * BLOCK
    assert told.total("kvmem_prompt_tokens_total") == 2 * len(PROMPT)
    assert told.total("kvmem_missed_tokens_total", "first_time") == WHOLE * BLOCK
    assert told.total("kvmem_moved_blocks_total", "host", "in") == WHOLE
    assert told.total("kvmem_moved_blocks_total", "host", "out") == WHOLE
    host = told.tier("host")
    assert host is not None
    assert (host.on, host.blocks, host.capacity_blocks, host.leased) == (True, WHOLE, 40, 0)
    (session,) = told.sessions
    assert (session.session, session.requests, session.host) == ("s", 2, WHOLE * BLOCK)
    assert session.missed["first_time"] == WHOLE * BLOCK
    assert [turn.host for turn in told.turns] == [0, WHOLE * BLOCK]
    assert told.n_events == len(told.events)
    assert {one["event"] for one in told.events} >= {"stored", "loaded", "answered", "missed"}
    assert {cause.reason for cause in told.causes} == {"first_time", "block_floor"}


def test_a_telemetry_that_fails_costs_a_figure_and_no_request(engine: Engine) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise InjectedError("telemetry")

    engine.faulted = True
    engine.half.telemetry._emit = failing
    stored(engine)
    assert engine.generate(PROMPT).receipt["tokens"]["host"] == WHOLE * BLOCK
    engine.half.misses.settle()
    assert "behind: InjectedError" in engine.half.page.last_failure
    assert snapshot(engine).total("kvmem_failures_total", "explain") == 2


def test_an_answer_that_fails_is_told_to_who_asked_and_to_the_engine(engine: Engine) -> None:
    def failing(asked: dict[str, Any]) -> Any:
        raise InjectedError("live")

    engine.faulted = True
    engine.half.telemetry._desk.answers["live"] = failing
    with pytest.raises(NotAnswered, match="InjectedError"):
        ask(engine.half.arena.path, "live")
    assert "desk" in engine.half.page.last_failure
    with pytest.raises(NotAnswered, match="nobody here knows"):
        ask(engine.half.arena.path, "what is this")
    raw = ask(engine.half.arena.path, "session", session="s")
    assert msgspec.msgpack.decode(raw)["session"] is None


# -- spans and log lines -------------------------------------------------------------------------


def test_a_request_is_a_span_in_its_callers_trace(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as names

    from kvmem.telemetry import spans

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(spans.trace, "get_tracer", provider.get_tracer)
    stored(engine, session="s")
    assert exporter.get_finished_spans() == ()  # its caller sent no trace
    i = engine.add(PROMPT, session="s")
    trace_id, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    engine.scheduler.requests[i].trace_headers = {"traceparent": f"00-{trace_id}-{parent}-01"}
    engine.drain()
    engine.half.misses.settle()
    (span,) = exporter.get_finished_spans()
    assert f"{span.context.trace_id:032x}" == trace_id
    assert f"{span.parent.span_id:016x}" == parent
    told = span.attributes
    assert told[names.GEN_AI_USAGE_INPUT_TOKENS] == len(PROMPT)
    assert told[names.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS] == WHOLE * BLOCK
    assert told[names.GEN_AI_CONVERSATION_ID] == "s"
    assert told[names.GEN_AI_RESPONSE_ID] == i
    assert told[names.GEN_AI_REQUEST_MODEL] == engine.half.page.model
    assert told[names.GEN_AI_PROVIDER_NAME] == "vllm"
    assert told["kvmem.tokens.host"] == WHOLE * BLOCK
    assert span.start_time < span.end_time
    assert [dict(one.attributes)["kvmem.miss.reason"] for one in span.events] == ["block_floor"]


def test_events_are_lines_of_json_in_a_private_file(
    config: Any, arena_name: str, tmp_path: Path
) -> None:
    path = tmp_path / "logs" / "events.jsonl"
    with running(
        config, asynchronous=True, arena=arena_name, n_host=40, event_log=str(path)
    ) as engine:
        stored(engine)
        engine.generate(PROMPT)
        engine.half.misses.settle()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["event"] for line in lines} >= {"stored", "loaded", "answered", "missed"}
    assert all(datetime.fromisoformat(line["at"]) for line in lines)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_log_that_cant_be_written_stops_the_start_and_leaves_nothing(
    config: Any, arena_name: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="event_log"):
        Engine(config, asynchronous=True, arena=arena_name, event_log=str(tmp_path))
    assert not Arena.path_of(arena_name).is_symlink()


# -- in vLLM's own metrics -----------------------------------------------------------------------


@pytest.fixture
def served(engine: Engine, config: Any) -> Iterator[Any]:
    """What vLLM's front end does with what its scheduler tells: the stats cross a process as vLLM
    encodes them, and are observed by the metrics that the connector's class makes."""
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.metrics.loggers import KVConnectorProm
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    labels = {0: ["tiny", "0"]}
    prom = KVConnectorProm(config, ["model_name", "engine"], labels)
    logging = KVConnectorLogging(config.kv_transfer_config)
    encoder, decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
    real = engine.scheduler.update_from_output

    def update(*args: Any, **kwargs: Any) -> Any:
        outputs = real(*args, **kwargs)
        for one in outputs.values():
            told = decoder.decode(encoder.encode(one)).scheduler_stats
            if told is not None and told.kv_connector_stats:
                prom.observe(told.kv_connector_stats)
                logging.observe(told.kv_connector_stats)
        return outputs

    engine.scheduler.update_from_output = update
    yield logging
    from kvmem.engines.vllm.stats import _unregister

    _unregister()


def sample(name: str, **labels: str) -> float | None:
    told = {"model_name": "tiny", "engine": "0", **labels}
    return prometheus_client.REGISTRY.get_sample_value(name, told)


def test_vllms_own_metrics_say_what_happened(engine: Engine, served: Any) -> None:
    stored(engine)
    engine.generate(PROMPT)
    assert sample("kvmem_requests_total") == 2
    assert sample("kvmem_prompt_tokens_total", source="host") == WHOLE * BLOCK
    assert sample("kvmem_tier_up", tier="host") == 1
    assert sample("kvmem_tier_blocks", tier="host") == WHOLE
    assert sample("kvmem_load_seconds_count") == 1
    assert sample("kvmem_load_seconds_bucket", le="+Inf") == 1
    assert sample("kvmem_moved_blocks_total", tier="host", direction="in") == WHOLE
    lines: list[str] = []
    served.log(lambda text, line: lines.append(line))
    assert f"kvmem tokens host={WHOLE * BLOCK}" in lines[0]


def test_what_the_last_request_missed_is_in_vllms_metrics(engine: Engine, served: Any) -> None:
    engine.half.misses._behind.wake = lambda **_: None  # the thread never comes to it
    engine.generate(PROMPT)
    engine.half.misses.settle()
    engine.generate(PROMPT)
    assert sample("kvmem_missed_tokens_total", reason="first_time") == WHOLE * BLOCK


def test_figures_of_a_busy_engine_are_made_behind_it_and_add_up(
    engine: Engine, served: Any
) -> None:
    """Nothing is made in the scheduler's thread while requests run."""
    half, made = engine.half, list[str]()
    half.telemetry.stats()
    deltas = half.telemetry._deltas
    real = deltas._make

    def make() -> None:
        made.append(threading.current_thread().name)
        real()

    deltas._make, deltas._next_s = make, 0.0
    behind = threading.Thread(target=half.misses.settle, name="behind")
    engine.add(PROMPT, 40)
    for _ in range(20):
        engine.step()
    behind.start()
    behind.join()
    assert made
    assert set(made) <= {"kvmem-explain", "behind"}
    engine.drain()
    assert sample("kvmem_requests_total") == 1
    stored_blocks = half.totals.blocks_stored
    assert sample("kvmem_moved_blocks_total", tier="host", direction="in") == stored_blocks > 0


def test_metrics_that_fail_do_not_reach_vllm(
    config: Any, served: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from kvmem.engines.vllm.connector import KvmemConnector

    made = KvmemConnector.build_prom_metrics(config, _TYPES, ["engine"], {0: ["0"]})
    made.observe({"counters": [["no_such_metric", [], 1.0]]})
    made.observe({})
    assert [record.message for record in caplog.records if "kvmem: its metrics" in record.message]


def test_metrics_that_cannot_be_made_do_not_stop_the_server(
    config: Any, served: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from kvmem.engines.vllm.connector import KvmemConnector

    assert KvmemConnector.build_prom_metrics(config, {}, ["engine"], {0: ["0"]}) is None
    assert "go without kvmem's" in caplog.text


_TYPES: dict[Any, Any] = {
    kind: kind
    for kind in (prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram)
}


def test_a_process_may_have_one_engine_after_another(config: Any, served: Any) -> None:
    from kvmem.engines.vllm.connector import KvmemConnector

    for _ in range(2):  # a name that is registered twice would raise
        KvmemConnector.build_prom_metrics(config, _TYPES, ["engine"], {0: ["0"]})
