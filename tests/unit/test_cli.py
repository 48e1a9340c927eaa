"""The kvmem command: help, `serve` up to the point where vLLM would start, `stats`."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.console import Console

from kvmem import cli
from kvmem._core import SlotCopier
from kvmem.cli import live, switching
from kvmem.config import describe
from kvmem.engines.vllm import interface, launch
from kvmem.store import Arena, Switch, capacity, list_live, read_switch, set_switch

ROOT = Path(__file__).resolve().parents[2]


class Ran(msgspec.Struct):
    code: int
    out: str
    err: str


@pytest.fixture
def kvmem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """Runs the command line in this process."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(interface, "why_off", lambda: None)

    def run(*arguments: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["kvmem", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return Ran(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A folder that passes for a checkpoint as far as the command line looks."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return str(folder)


def assert_refused(ran: Ran, *parts: str) -> None:
    """One line on stderr that holds every part, exit code 2, and nothing on stdout."""
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.count("\n") == 1
    assert ran.err.startswith("kvmem: ")
    for part in parts:
        assert part in ran.err


# -- help -----------------------------------------------------------------------------------------


def test_help_names_every_command_and_what_it_is_for(kvmem: Callable[..., Ran]) -> None:
    ran = kvmem("--help")
    assert ran.code == 0
    for line in (
        "kvmem demo              see what it does",
        "kvmem serve ./my-model  start vLLM's OpenAI server",
        "kvmem top               the running engines, live",
        "kvmem stats             what the running engines reuse",
        "kvmem quote body.json   what a prompt would find and cost",
        "kvmem switch            its loads and stores off and on",
        "kvmem quarantine        blocks that failed a check",
    ):
        assert line in ran.out


def test_serve_help_lists_every_setting_with_its_default(kvmem: Callable[..., Ran]) -> None:
    text = kvmem("serve", "--help").out
    for setting in describe():
        flag = "--kvmem-" + setting.name.replace("_", "-")
        assert flag in text
        assert setting.reason.split()[0] in text
    assert "Default: 4.0" in text
    assert "vLLM's own" in text


def test_help_imports_neither_engine_nor_plots() -> None:
    probe = (
        "import sys\n"
        "from kvmem import cli\n"
        "sys.argv = ['kvmem', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'vllm', 'transformers', 'matplotlib', 'numpy', 'openai'}"
        " & set(sys.modules)))"
    )
    told = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert told.splitlines()[-1] == "[]"


# -- serve ----------------------------------------------------------------------------------------


def served(ran: Ran) -> list[str]:
    assert ran.code == 0, ran.err
    return shlex.split(ran.out)


def test_dry_run_prints_the_whole_command_line(kvmem: Callable[..., Ran], checkpoint: str) -> None:
    command = served(kvmem("serve", checkpoint, "--dry-run"))
    assert command[:5] == [sys.executable, "-m", launch.FRONT_MODULE, "--model", checkpoint]
    assert json.loads(command[command.index("--kv-transfer-config") + 1]) == {
        "kv_connector": "KvmemConnector",
        "kv_connector_module_path": "kvmem.engines.vllm.entry",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {},
    }


def test_vllms_flags_are_handed_on_untouched_and_last(
    kvmem: Callable[..., Ran], checkpoint: str
) -> None:
    flags = ["--port", "8001", "-tp", "1", "--dtype=float32", "--hf-overrides", '{"a": 1}']
    command = served(kvmem("serve", checkpoint, *flags, "--dry-run"))
    assert command[-len(flags) :] == flags


def test_settings_reach_the_connector_with_their_types(
    kvmem: Callable[..., Ran], checkpoint: str
) -> None:
    command = served(
        kvmem(
            *("serve", checkpoint, "--dry-run", "--kvmem-host-gb", "0.5", "--kvmem-load=false"),
            *("--kvmem-copy-threads", "2", "--kvmem-eviction", "lru", "--kvmem-arena", "one"),
        )
    )
    config = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert config["kv_connector_extra_config"] == {
        "host_gb": 0.5,
        "load": False,
        "copy_threads": 2,
        "eviction": "lru",
        "arena": "one",
    }


def test_server_stays_on_this_machine_unless_told(
    kvmem: Callable[..., Ran], checkpoint: str
) -> None:
    command = served(kvmem("serve", checkpoint, "--dry-run"))
    assert command[command.index("--host") + 1] == "127.0.0.1"


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost", "::1"])
def test_another_loopback_address_needs_no_key(
    kvmem: Callable[..., Ran], checkpoint: str, host: str
) -> None:
    command = served(kvmem("serve", checkpoint, "--host", host, "--dry-run"))
    assert command.count("--host") == 1


@pytest.mark.parametrize(
    "flags",
    [
        ("--host", "0.0.0.0"),
        ("--host=0.0.0.0",),
        ("--hos", "example.org"),
        ("--host", "127.0.0.1", "--host", "::"),
    ],
)
def test_open_host_without_a_key_is_refused(
    kvmem: Callable[..., Ran], checkpoint: str, flags: tuple[str, ...], monkeypatch: Any
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert_refused(kvmem("serve", checkpoint, *flags), "--host", "--api-key")


def test_open_host_with_a_key_is_served(kvmem: Callable[..., Ran], checkpoint: str) -> None:
    flags = ["--host", "0.0.0.0", "--api-key", "secret"]
    assert served(kvmem("serve", checkpoint, "--dry-run", *flags))[-4:] == flags


@pytest.mark.parametrize(
    "flag",
    ["--kv-transfer-config", "--kv_transfer_config={}", "--kv-transfer-config.kv_role", "--kv-tr"],
)
def test_own_transfer_config_is_refused_in_every_spelling(
    kvmem: Callable[..., Ran], checkpoint: str, flag: str
) -> None:
    assert_refused(kvmem("serve", checkpoint, flag, "x"), "--kv-transfer-config")


def test_model_given_twice_is_refused(kvmem: Callable[..., Ran], checkpoint: str) -> None:
    assert_refused(kvmem("serve", checkpoint, "--model", "other"), "twice", "--model")


@pytest.mark.parametrize("flag", ["--kvmem-hots-gb=3", "--kvmem-host_gib"])
def test_unknown_setting_is_refused_with_the_nearest_name(
    kvmem: Callable[..., Ran], checkpoint: str, flag: str
) -> None:
    assert_refused(kvmem("serve", checkpoint, flag, "3"), "Did you mean 'host_gb'?")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--kvmem-host-gb", "lots"),
        ("--kvmem-host-gb", "-1"),
        ("--kvmem-load", "maybe"),
        ("--kvmem-eviction", "random"),
        ("--kvmem-arena", "../etc"),
        ("--kvmem-verify-share", "1.5"),
    ],
)
def test_setting_out_of_range_is_refused_by_name(
    kvmem: Callable[..., Ran], checkpoint: str, flag: str, value: str
) -> None:
    name = flag.removeprefix("--kvmem-").replace("-", "_")
    assert_refused(kvmem("serve", checkpoint, flag, value), repr(name), value)


@pytest.mark.parametrize("model", ["/no/such/folder", "./missing", "a/b/c", "~nobody/x"])
def test_missing_model_folder_is_refused(kvmem: Callable[..., Ran], model: str) -> None:
    assert_refused(kvmem("serve", model), "no model folder", model)


@pytest.mark.parametrize("model", ["models/x", "models"])
def test_mistyped_path_is_not_taken_for_a_name_on_the_hub(
    kvmem: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert_refused(kvmem("serve", model), model, "Check the path" if "/" in model else "config")


def test_folder_without_a_config_is_refused(kvmem: Callable[..., Ran], tmp_path: Path) -> None:
    assert_refused(kvmem("serve", str(tmp_path)), "config.json", str(tmp_path))


def test_file_in_place_of_a_folder_is_refused(kvmem: Callable[..., Ran], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    assert_refused(kvmem("serve", str(file)), "is a file")


def test_name_on_the_hub_is_left_to_vllm(kvmem: Callable[..., Ran]) -> None:
    assert "Qwen/Qwen3-0.6B" in served(kvmem("serve", "Qwen/Qwen3-0.6B", "--dry-run"))


def test_budget_beyond_shared_memory_is_refused(kvmem: Callable[..., Ran], checkpoint: str) -> None:
    ran = kvmem("serve", checkpoint, "--kvmem-host-gb", "1000000")
    assert_refused(ran, "'host_gb'", "1000000.00 GiB of shared memory", "enlarge /dev/shm")


def test_budget_beyond_memory_is_refused(
    kvmem: Callable[..., Ran], checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "_free_shm_bytes", lambda: 1 << 40)
    monkeypatch.setattr(capacity, "free_memory_bytes", lambda: 3 << 30)
    ran = kvmem("serve", checkpoint, "--kvmem-host-gb", "3.5")
    assert_refused(ran, "'host_gb'", "3.50 GiB of memory", "3.00 GiB are free", "Lower host_gb")


def test_engine_that_kvmem_can_not_work_with_starts_without_it(
    kvmem: Callable[..., Ran], checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interface, "why_off", lambda: "off: vLLM 9 lacks everything.")
    ran = kvmem("serve", checkpoint, "--dry-run", "--kvmem-host-gb", "1000000", "--port", "1")
    assert ran.code == 0
    assert ran.err == "kvmem: off: vLLM 9 lacks everything.\n"
    assert shlex.split(ran.out) == [
        *(sys.executable, "-m", launch.SERVER_MODULE, "--model", checkpoint),
        *("--host", "127.0.0.1", "--port", "1"),
    ]


def test_mistakes_are_told_whatever_the_engine(
    kvmem: Callable[..., Ran], checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interface, "why_off", lambda: "off: vLLM 9 lacks everything.")
    assert_refused(kvmem("serve", checkpoint, "--kvmem-hots-gb", "1"), "'hots_gb'")
    assert_refused(kvmem("serve", checkpoint, "--host", "0.0.0.0"), "--api-key")


def test_absent_engine_is_told_as_such(
    kvmem: Callable[..., Ran], checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    interface._lacks_here.cache_clear()
    assert_refused(kvmem("serve", checkpoint), "no vLLM", "0.29 to 0.33")


def test_arena_of_a_live_engine_is_refused_before_vllm_starts(
    kvmem: Callable[..., Ran], checkpoint: str, engine: Arena
) -> None:
    name = engine.path.name.split("-", 2)[2]
    ran = kvmem("serve", checkpoint, "--kvmem-arena", name)
    assert_refused(ran, "'arena'", name, str(os.getpid()), "another name")


def test_nothing_is_left_by_a_refused_start(checkpoint: str, arena_name: str) -> None:
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "kvmem.cli", "serve", checkpoint),
            *("--kvmem-arena", arena_name, "--host", "0.0.0.0"),
        ],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "VLLM_API_KEY"},
    )
    assert ran.returncode == 2
    assert not Arena.path_of(arena_name).exists()


def test_serve_becomes_the_server_in_the_same_process(
    kvmem: Callable[..., Ran], checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Replaced(SystemExit):
        pass

    seen: list[list[str]] = []

    def execve(path: str, arguments: list[str], environ: dict[str, str]) -> None:
        assert path == sys.executable
        assert environ == dict(os.environ)
        seen.append(arguments)
        raise Replaced(0)

    monkeypatch.setattr(os, "execve", execve)
    kvmem("serve", checkpoint, "--port", "9")
    assert seen[0][-2:] == ["--port", "9"]


# -- stats ----------------------------------------------------------------------------------------

COUNTERS = {
    "shadowed": 0,
    "requests": 24,
    "prompt_tokens": 80_000,
    "tokens_hit_device": 40_000,
    "tokens_hit_host": 25_000,
    "tokens_hit_disk": 5_000,
    "tokens_hit_far": 0,
    "tokens_computed": 10_000,
    "blocks_stored": 300,
    "blocks_loaded": 900,
    "bytes_stored": 3 << 30,
    "bytes_loaded": 9 << 30,
    "load_s": 3.0,
    "store_s": 1.5,
    "evictions": 7,
    "refused": 2,
    "failures": 0,
    "quarantined": 0,
}


def page(**changes: Any) -> dict[str, Any]:
    host = {"slots": 400, "used": 100, "leased": 3, "bytes": 5 << 20, "slot_bytes": 52428}
    host["reserved"] = 2
    return {
        "model": "smollm2",
        "pid": 4711,
        "updated_s": 1000.0,
        "host": host,
        "counters": COUNTERS,
        "last_failure": None,
        **changes,
    }


@pytest.fixture
def engine(arena_name: str) -> Any:
    """An arena whose owner is alive, as an engine's is."""
    arena = Arena.create(arena_name, n_slots=4, slot_bytes=64, namespace=bytes(32))
    yield arena
    arena.close(unlink=True)


def rendered(found: list[live.Page], now_s: float) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(live.render(found, now_s))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(" ".join(line.split()) for line in text.splitlines())


def mine(arena: Arena) -> list[live.Page]:
    return [p for p in live.pages() if p.arena == arena.path.name]


def test_engine_is_found_by_its_page(engine: Arena) -> None:
    engine.write_stats(msgspec.msgpack.encode(page()))
    (found,) = mine(engine)
    assert (found.pid, found.model) == (4711, "smollm2")
    assert found.counters.tokens_hit_host == 25_000


def test_engine_that_has_not_written_yet_is_left_out(engine: Arena) -> None:
    assert mine(engine) == []


def test_counters_of_a_newer_kvmem_do_not_break_an_older_reader(engine: Arena) -> None:
    newer = page(counters={**COUNTERS, "from_the_future": 1}, more="x")
    engine.write_stats(msgspec.msgpack.encode(newer))
    assert mine(engine)[0].counters.requests == 24


def test_table_shows_shares_sizes_and_rates() -> None:
    text = rendered([msgspec.convert(page(), live.Page)], 1002.5)
    for part in (
        "smollm2 (pid 4711",
        "written 2.5 s ago",
        "prompt tokens │ 80,000",
        "computed │ 10,000 │ 12%",
        "reused from the host │ 25,000 │ 31%",
        "5.0 MiB │ 100 of 400 blocks (25%), 3 leased, 2 being stored",
        "900 blocks │ 9.0 GiB in 3.00 s, 3.2 GB/s",
    ):
        assert part in text


def test_failures_are_shown_with_the_last_one() -> None:
    failed = page(counters={**COUNTERS, "failures": 1}, last_failure="load: disk on fire")
    assert "failures │ 1 │ load: disk on fire" in rendered(
        [msgspec.convert(failed, live.Page)], 1000.0
    )


def test_engine_without_requests_divides_by_nothing() -> None:
    empty = page(counters=dict.fromkeys(COUNTERS, 0))
    assert "requests │ 0" in rendered([msgspec.convert(empty, live.Page)], 1000.0)


def test_json_is_one_list_for_machines(engine: Arena, kvmem: Callable[..., Ran]) -> None:
    engine.write_stats(msgspec.msgpack.encode(page()))
    ran = kvmem("stats", "--json")
    assert ran.code == 0
    (found,) = [e for e in json.loads(ran.out) if e["arena"] == engine.path.name]
    assert found["counters"] == COUNTERS


def test_no_engine_is_one_clear_line_and_exit_code_1(
    kvmem: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "list_live", list)  # others may run engines here
    ran = kvmem("stats")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "kvmem: no engine with kvmem is running. Start one: kvmem serve MODEL\n"


def test_an_engine_of_another_version_or_gone_by_now_hides_no_other(
    engine: Arena, new_arena_name: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.write_stats(msgspec.msgpack.encode(page()))
    other = Arena.create(new_arena_name(), n_slots=4, slot_bytes=64, namespace=bytes(32))
    other.write_stats(msgspec.msgpack.encode({"pages": "of another shape"}))
    gone = live.list_live()
    other.close(unlink=True)
    assert len(gone) >= 2
    monkeypatch.setattr(live, "list_live", lambda: gone)
    assert [p.pid for p in mine(engine)] == [4711]
    again = Arena.create(new_arena_name(), n_slots=4, slot_bytes=64, namespace=bytes(32))
    again.write_stats(b"\xc1 is no msgpack")
    monkeypatch.undo()
    assert [p.pid for p in mine(engine)] == [4711]
    again.close(unlink=True)


def test_watch_refreshes_until_interrupted(engine: Arena) -> None:
    engine.write_stats(msgspec.msgpack.encode(page()))
    command = [sys.executable, "-m", "kvmem.cli", "stats", "--watch", "--json", "--interval", "0.1"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        first = watching.stdout.readline()
        engine.write_stats(msgspec.msgpack.encode(page(pid=4712)))
        later = next(line for line in watching.stdout if '"pid":4712' in line)
        watching.send_signal(signal.SIGINT)
        # It ends on its own word, without a traceback.
        drain = threading.Thread(target=watching.stdout.read)
        drain.start()
        assert watching.wait(30) == 0
        drain.join()
        assert watching.stderr.read() == ""
    assert '"pid":4711' in first
    assert json.loads(later)


def test_stats_show_what_is_off_and_how_it_comes_on_again(engine: Arena) -> None:
    engine.write_stats(msgspec.msgpack.encode(page(allowed={"loads": False, "stores": True})))
    assert "off" not in rendered([msgspec.convert(page(), live.Page)], 1000.0)
    set_switch(engine.path, loads=False, stores=False)
    text = rendered(mine(engine), 1000.0)
    assert "loads │ off │ by the setting 'load'" in text
    assert "stores │ off │ until `kvmem switch --stores on`" in text
    engine.buffer[engine.header.switch_offset] ^= 0x80
    text = rendered(mine(engine), 1000.0)
    assert "switch │ damaged │ `kvmem switch --loads on --stores on` writes it anew" in text


def test_stats_for_machines_hold_the_switch(engine: Arena, kvmem: Callable[..., Ran]) -> None:
    engine.write_stats(msgspec.msgpack.encode(page()))
    set_switch(engine.path, stores=False)
    (found,) = [
        e for e in json.loads(kvmem("stats", "--json").out) if e["arena"] == engine.path.name
    ]
    assert found["switch"] == {"loads": True, "stores": False}
    assert found["allowed"] == {"loads": True, "stores": True}


# -- switch ---------------------------------------------------------------------------------------


@pytest.fixture
def alone(engine: Arena, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the engine of this test, which sees no other."""
    mine = [one for one in list_live() if one.path == engine.path]
    monkeypatch.setattr(switching, "list_live", lambda: mine)
    return engine.path.name.split("-", 2)[2]


def test_switch_without_a_change_shows_what_stands(
    kvmem: Callable[..., Ran], engine: Arena, alone: str
) -> None:
    set_switch(engine.path, loads=False)
    ran = kvmem("switch")
    assert ran.code == 0
    assert ran.out.startswith(f"{alone}: loads off, stores on  (pid {os.getpid()}")
    assert read_switch(engine.path) == Switch(loads=False, stores=True)


@pytest.mark.parametrize(
    ("flags", "stands"),
    [
        (("--loads", "off"), Switch(loads=False, stores=True)),
        (("--stores", "off"), Switch(loads=True, stores=False)),
        (("--loads", "off", "--stores", "off"), Switch(loads=False, stores=False)),
        (("--loads", "on"), Switch(loads=True, stores=True)),
    ],
)
def test_switch_changes_what_is_named_and_tells_what_stands(
    kvmem: Callable[..., Ran], engine: Arena, alone: str, flags: tuple[str, ...], stands: Switch
) -> None:
    ran = kvmem("switch", *flags)
    assert ran.code == 0, ran.err
    assert read_switch(engine.path) == stands
    words = {True: "on", False: "off"}
    assert f"loads {words[stands.loads]}, stores {words[stands.stores]}" in ran.out


@pytest.mark.parametrize("flags", [("--loads", "maybe"), ("--stores",), ("--load", "off")])
def test_switch_refuses_what_is_neither_on_nor_off(
    kvmem: Callable[..., Ran], engine: Arena, alone: str, flags: tuple[str, ...]
) -> None:
    ran = kvmem("switch", *flags)
    assert ran.code == 2
    assert flags[0] in ran.err
    assert read_switch(engine.path) == Switch()


def test_switch_tells_what_a_setting_forbids(
    kvmem: Callable[..., Ran], engine: Arena, alone: str
) -> None:
    engine.write_stats(msgspec.msgpack.encode(page(allowed={"loads": False, "stores": True})))
    assert "loads off by the setting 'load', stores on" in kvmem("switch", "--loads", "on").out


def test_switch_of_one_of_several_engines_wants_its_name(
    kvmem: Callable[..., Ran], engine: Arena, new_arena_name: Callable[[], str]
) -> None:
    name = new_arena_name()
    other = Arena.create(name, n_slots=4, slot_bytes=64, namespace=bytes(32))
    try:
        assert_refused(kvmem("switch", "--loads", "off"), "engines are running", "--arena", name)
        assert_refused(kvmem("switch", "--arena", "nobody"), "'nobody'", name)
        for spelled, loads in ((name, "off"), (other.path.name, "on")):
            assert kvmem("switch", "--arena", spelled, "--loads", loads).code == 0
            assert read_switch(other.path) == Switch(loads=loads == "on")
        assert read_switch(engine.path) == Switch()
        shown = kvmem("switch").out
        assert name in shown
        assert engine.path.name.split("-", 2)[2] in shown
    finally:
        other.close(unlink=True)


def test_switch_mends_a_damaged_record_only_whole(
    kvmem: Callable[..., Ran], engine: Arena, alone: str
) -> None:
    engine.buffer[engine.header.switch_offset] ^= 0x80
    assert "damaged" in kvmem("switch").out
    assert_refused(kvmem("switch", "--loads", "off"), "damaged", "both")
    assert kvmem("switch", "--loads", "off", "--stores", "on").code == 0
    assert read_switch(engine.path) == Switch(loads=False, stores=True)


def test_switch_without_an_engine_is_one_clear_line_and_exit_code_1(
    kvmem: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switching, "list_live", list)
    for flags in ((), ("--loads", "off"), ("--arena", "one")):
        ran = kvmem("switch", *flags)
        assert (ran.code, ran.out) == (1, "")
        assert ran.err.startswith("kvmem: no engine with kvmem is running.")


# -- quarantine -----------------------------------------------------------------------------------

KEY = bytes(range(32))


def failed_block(engine: Arena, *, length: int = 60, flip: int | None = None) -> dict[str, Any]:
    """A block that is stored in slot 2 and told of on the page; one of its bits may be wrong."""
    data = np.frombuffer(engine.buffer, np.uint8)
    device = np.arange(64, dtype=np.uint8)
    copier = SlotCopier(data, 1)
    width = np.array([length], np.uint64)
    copier.register_layers(np.array([device.ctypes.data], np.uint64), width, width, 1, 3)
    one = np.array([2], np.int32)
    status, _ = copier.store(np.zeros(1, np.int32), one, np.array([7], np.uint64), KEY, 3)
    assert status.tolist() == [0]
    if flip is not None:
        data[engine.data_of(2) + flip] ^= 1
    told = {"slot": 2, "generation": 7, "key": KEY.hex(), "reason": "scrub", "blocks": 4}
    return {**told, "at_s": 1.7e9, "kept": True}


def listed(
    kvmem: Callable[..., Ran], engine: Arena, block: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """What the command says of the block, to machines and to people."""
    engine.write_stats(msgspec.msgpack.encode(page(quarantine=[block])))
    name = engine.path.name
    ran = kvmem("quarantine", "--json", "--arena", name)
    (row,) = json.loads(ran.out)
    assert (ran.code, row["arena"], row["block"]) == (0, name, block)
    return row["slot"], kvmem("quarantine", "--arena", name).out


@pytest.mark.parametrize(
    ("flip", "found", "ranks", "told"),
    [
        (59, "bytes", [0], "the bytes differ from those stored (rank 0)"),
        (60, "sound", [], "the bytes are those stored"),  # beyond the block
        (None, "sound", [], "the bytes are those stored"),
    ],
)
def test_a_block_in_quarantine_is_looked_at(
    kvmem: Callable[..., Ran],
    engine: Arena,
    flip: int | None,
    found: str,
    ranks: list[int],
    told: str,
) -> None:
    slot, text = listed(kvmem, engine, failed_block(engine, flip=flip))
    assert slot == {"found": found, "group": 3, "length": 60, "bad_ranks": ranks}
    for part in (told, KEY.hex()[:16], "scrub", "2023-11-1"):
        assert part in text


@pytest.mark.parametrize(
    ("at", "value", "found"),
    [
        (32, b"\xff", "identity"),  # another key
        (64, b"\xff", "identity"),  # of another namespace
        (16, b"\xff\xff", "identity"),  # longer than a slot
        (24, b"\xff\xff", "bytes"),  # another checksum
        (0, b"\x1d", "gone"),  # somebody else is writing it
    ],
)
def test_what_a_slot_says_of_itself_is_not_believed(
    kvmem: Callable[..., Ran], engine: Arena, at: int, value: bytes, found: str
) -> None:
    block = failed_block(engine)
    at += 4096 + 2 * 128
    engine.buffer[at : at + len(value)] = value
    assert listed(kvmem, engine, block)[0]["found"] == found


def test_a_slot_that_was_given_back_is_not_looked_at(
    kvmem: Callable[..., Ran], engine: Arena
) -> None:
    slot, text = listed(kvmem, engine, {**failed_block(engine), "kept": False})
    assert (slot["found"], slot["group"]) == ("gone", None)
    assert "given back" in text


def test_an_engine_without_failures_says_so(kvmem: Callable[..., Ran], engine: Arena) -> None:
    engine.write_stats(msgspec.msgpack.encode(page()))
    ran = kvmem("quarantine", "--arena", engine.path.name)
    assert (ran.code, ran.out) == (0, "No block has failed a check.\n")
    assert kvmem("quarantine", "--arena", "no-such-engine").code == 2


def test_stats_point_to_the_blocks_that_failed(engine: Arena) -> None:
    failed = page(
        counters={**COUNTERS, "quarantined": 4}, quarantine=[failed_block(engine)],
        scrub={"bytes": 1, "blocks": 1, "passes": 1, "faults": 1, "on": False},
    )  # fmt: skip
    text = rendered([msgspec.convert(failed, live.Page)], 1000.0)
    assert "quarantined │ 4 blocks │ `kvmem quarantine` lists 1" in text
    assert "scrubbed, OFF: it failed │ 1 blocks" in text


def test_quarantine_without_an_engine_is_one_clear_line_and_exit_code_1(
    kvmem: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switching, "list_live", list)
    ran = kvmem("quarantine")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("kvmem: no engine with kvmem is running.")


# -- the demo's bad input -------------------------------------------------------------------------


def test_demo_refuses_an_output_that_is_a_file(kvmem: Callable[..., Ran], tmp_path: Path) -> None:
    file = tmp_path / "taken"
    file.touch()
    assert_refused(kvmem("demo", "--output", str(file)), "--output", str(file))


@pytest.mark.parametrize(("equal", "code"), [(True, 0), (False, 1)])
def test_demo_says_by_its_exit_code_whether_the_outputs_were_equal(
    kvmem: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, equal: bool, code: int
) -> None:
    from kvmem.demo import run

    monkeypatch.setattr(run, "run", lambda output, *, quick: equal)
    ran = kvmem("demo")
    assert ran.code == code
    assert ("outputs differ" in ran.err) is not equal


def test_demo_without_its_package_says_how_to_get_it(
    kvmem: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvmem.demo import model

    monkeypatch.setattr(model, "PACKAGE", "kvmem-no-such-package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ran = kvmem("demo", "--output", str(tmp_path / "out"))
    assert ran.code == 2
    assert "kvmem-no-such-package, which is not installed" in ran.err
    assert "make setup" in ran.err


def test_server_that_dies_shows_its_last_lines_and_the_log(tmp_path: Path) -> None:
    from kvmem.demo.server import Server, ServerFailed

    log = tmp_path / "log"
    program = "import sys; print('loading'); print('out of luck'); sys.exit(3)"
    server = Server([sys.executable, "-c", program], log=log, environ={})
    with pytest.raises(ServerFailed, match="code 3") as failed, server:
        pass
    assert "out of luck" in str(failed.value)
    assert str(log) in str(failed.value)


def test_ending_a_server_ends_its_whole_group(tmp_path: Path) -> None:
    from kvmem.demo.server import Server

    # It answers /health, has a child that ignores SIGTERM, and says the child's pid.
    program = (
        "import http.server, signal, subprocess, sys\n"
        "ignore = 'import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        " print(1, flush=True); signal.pause()'\n"
        "child = subprocess.Popen([sys.executable, '-c', ignore], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print('child', child.pid, flush=True)\n"
        "class Well(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.end_headers()\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[2])), Well).serve_forever()\n"
    )
    log = tmp_path / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvmem.demo.server.END_WITHIN_S", 0.5)
        with Server([sys.executable, "-c", program], log=log, environ={}) as server:
            leader = server.pid
            child = int(log.read_text().split()[1])
            os.kill(child, 0)
            assert os.getpgid(child) == leader
    # A killed process that nobody has waited for yet still has a number, as a zombie.
    stat = Path(f"/proc/{child}/stat")
    assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_free_port_can_be_bound() -> None:
    from kvmem.demo.server import free_port

    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))
