"""Each of the soak's detectors, with something broken for it to find."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.soak.oracle import Judgement, Wrong
from benchmarks.soak.plan import Plan
from benchmarks.soak.verdict import Evidence, never_happened, verdict
from benchmarks.soak.watch import MOST_GROWTH, errors_in, growth, held_at_rest, memory_of
from kvmem.cli.live import Counters, Host, Page

MIB = 1 << 20
IDLE = {"vllm:num_requests_running": 0.0, "vllm:num_requests_waiting": 0.0}


def page(*, leased: int = 0, reserved: int = 0, **counters: int) -> Page:
    host = Host(slots=64, used=9, leased=leased, reserved=reserved, bytes=9, slot_bytes=1)
    return Page("model", 4711, 1.0, host, Counters(**counters))


# -- what is held ----------------------------------------------------------------------------------


def test_an_engine_that_gave_all_back_holds_nothing() -> None:
    assert held_at_rest(page(), IDLE) == []


@pytest.mark.parametrize(
    ("what", "seen", "metrics"),
    [
        ("1 leases", page(leased=1), IDLE),
        ("3 reserved slots", page(reserved=3), IDLE),
        ("2 running requests", page(), {**IDLE, "vllm:num_requests_running": 2.0}),
        ("1 waiting requests", page(), {**IDLE, "vllm:num_requests_waiting": 1.0}),
        ("kvmem's page is not there", None, IDLE),
    ],
)
def test_what_is_not_given_back_is_told(
    what: str, seen: Page | None, metrics: dict[str, float]
) -> None:
    assert held_at_rest(seen, metrics) == [what]


# -- memory ----------------------------------------------------------------------------------------


@pytest.fixture
def hoarder() -> Iterator[subprocess.Popen[bytes]]:
    """A process, with an engine's title, that keeps as many MiB more as each line says."""
    code = (
        "import sys\nkept = []\n"
        "for line in sys.stdin:\n"
        "    kept.append(b'x' * (int(line) << 20))\n"
        "    print('kept', flush=True)\n"
    )
    command = [sys.executable, "-S", "-c", code, "EngineCore"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def keep(process: subprocess.Popen[bytes], mib: int) -> dict[str, int]:
    """The process's memory after it has kept `mib` more."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"%d\n" % mib)
    process.stdin.flush()
    assert process.stdout.readline() == b"kept\n"
    return memory_of([process.pid])


def test_a_process_that_keeps_memory_is_seen_to_grow(hoarder: subprocess.Popen[bytes]) -> None:
    samples = [keep(hoarder, mib) for mib in (100, 0, 0, 0, 0, 4)]
    assert samples[0]["engine"] > 100 * MIB
    grown = growth(samples)["engine"]
    assert grown > MOST_GROWTH
    assert grown == pytest.approx(0.04, abs=0.01)


def test_a_process_that_keeps_nothing_is_flat(hoarder: subprocess.Popen[bytes]) -> None:
    samples = [keep(hoarder, mib) for mib in (50, 50, 0, 0, 0, 0)]  # it grows as it warms up
    assert abs(growth(samples)["engine"]) < MOST_GROWTH


def test_shared_memory_is_nobodys_growth(tmp_path: Path) -> None:
    code = (
        "import mmap, sys\nmap = mmap.mmap(-1, 64 << 20)\n"
        "print('before', flush=True); sys.stdin.readline()\n"
        "map.write(b'x' * (64 << 20))\n"
        "print('after', flush=True); sys.stdin.readline()\n"
    )
    command = [sys.executable, "-S", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        before = memory_of([process.pid])["other"]
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        after = memory_of([process.pid])["other"]
        process.stdin.close()
    assert after - before < 8 * MIB


def test_growth_is_told_by_kind_of_process_and_of_all() -> None:
    samples = [{"engine": 100, "front": 10}] * 4 + [{"engine": 100, "front": 11}] * 2
    assert growth(samples) == pytest.approx({"engine": 0.0, "front": 0.1, "all": 1 / 110})


def test_one_sample_out_of_line_is_not_growth() -> None:
    flat = [{"engine": 100}] * 27
    assert growth([*flat, {"engine": 150}, *flat[:2]])["engine"] == 0.0


def test_a_process_that_ended_while_we_looked_has_no_memory() -> None:
    assert memory_of([4194305]) == {}  # above the kernel's highest pid


# -- the log ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "(EngineCore pid=81) ERROR 11-26 06:25:01 [core.py:1204] EngineCore encountered a fatal",
        "ERROR 11-26 06:25:01 [serving.py:12] Error in preprocessing prompt inputs",
        "(APIServer pid=7) ERROR:    Exception in ASGI application",
        "ERROR:    [Errno 98] address already in use",
        "Traceback (most recent call last):",
        "(Worker pid=9) Traceback (most recent call last):",
        "kvmem: start_load_kv failed; the engine computes instead",
        "Exception ignored in: <function Arena.__del__ at 0x7f>",
        "Fatal Python error: Segmentation fault",
    ],
)
def test_an_error_in_the_log_is_found(line: str) -> None:
    assert errors_in(f"INFO 11-26 06:25:00 [x.py:1] fine\n{line}\nINFO more\n") == [line]


@pytest.mark.parametrize(
    "line",
    [
        "(APIServer pid=7) INFO 11-26 06:25:01 [loggers.py:271] Engine 000: Running: 16 reqs",
        "WARNING 11-26 06:25:01 [cpu.py:1] VLLM_CPU_KVCACHE_SPACE is not set",
        "INFO: kv_load_failure_policy is recompute, so errors cost a recompute",
    ],
)
def test_what_is_no_error_is_not_taken_for_one(line: str) -> None:
    assert errors_in(line) == []


# -- the verdict -----------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(minutes=5, folder=tmp_path)


def evidence(plan: Plan, **changes: Any) -> Evidence:
    """Of a soak in which all is well, with `changes`."""
    well = Evidence(
        judgement=Judgement(calls=9, distinct=5),
        happened={},
        failed=[],
        held=[],
        growth={"engine": 0.001, "all": 0.001},
        last_memory={"engine": 900 * MIB},
        log_errors=[],
        page=page(evictions=1, tokens_hit_host=1, tokens_hit_device=1),
        preemptions=1,
        left_behind=[],
    )
    well = msgspec.structs.replace(well, happened=dict.fromkeys(never_happened(plan, well), 1))
    return msgspec.structs.replace(well, **changes)


def test_nothing_is_wrong_where_all_is_well(plan: Plan) -> None:
    assert verdict(plan, evidence(plan)).trouble == []


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        (
            "wrong",
            {
                "judgement": Judgement(
                    wrong=[Wrong(ask=None, place=0, why="")]  # type: ignore[arg-type]
                )
            },
        ),
        ("failed", {"failed": ["short: 500"]}),
        ("held", {"held": ["at rest after round 2: 1 leases"]}),
        ("memory_growth", {"growth": {"engine": 0.021, "all": 0.001}}),
        ("memory_growth", {"growth": {"engine": 0.001, "all": 0.021}}),
        ("log_errors", {"log_errors": ["ERROR"]}),
        (
            "failures",
            {"page": page(evictions=1, tokens_hit_host=1, tokens_hit_device=1, failures=1)},
        ),
        (
            "quarantined",
            {"page": page(evictions=1, tokens_hit_host=1, tokens_hit_device=1, quarantined=1)},
        ),
        ("left_behind", {"left_behind": ["kvmem-0-soak"]}),
    ],
)
def test_each_trouble_is_told_by_its_key(plan: Plan, key: str, changes: dict[str, Any]) -> None:
    assert verdict(plan, evidence(plan, **changes)).trouble == [key]


def test_whatever_never_happened_is_told(plan: Plan) -> None:
    well = evidence(plan)
    for what in well.happened:
        without = {name: n for name, n in well.happened.items() if name != what}
        missed = verdict(plan, msgspec.structs.replace(well, happened=without))
        assert (missed.never_happened, missed.trouble) == ([what], ["never_happened"])
    for what, changes in {
        "preemptions": {"preemptions": 0},
        "evictions": {"page": page(tokens_hit_host=1, tokens_hit_device=1)},
        "loads from the host": {"page": page(evictions=1, tokens_hit_device=1)},
        "hits on the device": {"page": page(evictions=1, tokens_hit_host=1)},
    }.items():
        assert verdict(plan, evidence(plan, **changes)).never_happened == [what]


def test_every_kind_of_round_is_in_the_short_soak(plan: Plan) -> None:
    longer = msgspec.structs.replace(plan, minutes=60.0)
    assert set(plan.rounds) == set(longer.rounds)
    assert sum(plan.round_s for _ in plan.rounds) == pytest.approx(300.0)
    assert sum(longer.round_s for _ in longer.rounds) == pytest.approx(3600.0)


def test_a_small_processs_growth_is_judged_with_all_others_only(plan: Plan) -> None:
    small = evidence(
        plan,
        growth={"engine": 0.0, "other": 0.5, "all": 0.001},
        last_memory={"engine": 900 * MIB, "other": 9 * MIB},
    )
    assert verdict(plan, small).trouble == []


GONE = "(APIServer pid=1) ERROR 11-26 20:06:26 [async_llm.py:906] AsyncLLM output_handler failed."
ENDS = "(APIServer pid=1) INFO [launcher.py:254] [shutdown] API server: shutdown triggered"


def test_a_front_that_finds_its_engine_gone_at_the_end_is_no_error() -> None:
    assert errors_in(f"a line\n{ENDS}\n{GONE}\n") == []
    assert errors_in(f"{GONE}\n{ENDS}\n") == [GONE]
    ours = "(EngineCore pid=2) ERROR 11-26 20:06:23 [connector.py:110] kvmem: shutdown failed"
    assert errors_in(f"{ENDS}\n{GONE}\n{ours}\n") == [ours]
