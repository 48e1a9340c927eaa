"""`kvmem demo` from the first line to the picture."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from kvmem.demo import model as demo_model
from kvmem.demo import report, timeline
from kvmem.demo.narrate import Narrator
from kvmem.demo.play import Played, play, request_id, warm_up
from kvmem.demo.report import Arm
from kvmem.demo.server import Server
from kvmem.demo.team import Script, full_script, quick_script
from kvmem.engines.vllm import interface, launch
from kvmem.errors import ConfigError
from kvmem.store import Arena, check_room, sweep

__all__ = ["Size", "run"]

ALONE = "vLLM alone"
TOGETHER = "vLLM + kvmem"
SERVED = "smollm2"
BLOCK_TOKENS = 32


class Size(msgspec.Struct, frozen=True):
    """How large the demo is: the script, and too little device memory to hold its prompts."""

    script: Script
    device_tokens: int
    prompt_limit_tokens: int
    host_gb: float


def run(output: Path, *, quick: bool) -> bool:
    """Plays both arms, prints the table, and writes the picture and the figures to `output`.

    The answer is whether every reply was the same in both arms.

    Raises:
        KVMemError: something that the demo needs is missing, or a server failed.
    """
    console = Console()
    _check_needs()
    size = _quick() if quick else _full()
    check_room(int(size.host_gb * 2**30))
    _make_folder(output)
    with _ended_by_signals(), Narrator(console) as narrator:
        narrator.stage(f"model: {demo_model.NAME}, {demo_model.SIZE_BYTES / 1e6:.0f} MB")
        checkpoint = demo_model.ensure(lambda stage: narrator.line(f"  {stage}"))
        alone = _play_alone(size, checkpoint, output, narrator)
        together = _play_together(size, checkpoint, output, narrator)
        narrator.stage("drawing")
        paths = timeline.save(timeline.draw([alone, together]), output)
    _print_report(console, size, alone, together)
    paths.append(_write_figures(output, alone, together))
    for path in paths:
        console.print(f"  {path}", soft_wrap=True, highlight=False)
    equality = report.compare(alone.turns, together.turns)
    return equality.equal == equality.turns


def _full() -> Size:
    return Size(full_script(), device_tokens=6144, prompt_limit_tokens=4608, host_gb=1.0)


def _quick() -> Size:
    return Size(quick_script(), device_tokens=2816, prompt_limit_tokens=2560, host_gb=0.5)


def _play_alone(size: Size, checkpoint: Path, output: Path, narrator: Narrator) -> Arm:
    command = [sys.executable, "-m", launch.SERVER_MODULE, "--model", str(checkpoint)]
    command += ["--host", "127.0.0.1", *_flags(size)]
    with _server(ALONE, command, output, narrator) as server:
        return _play(ALONE, server, size.script, narrator, {}, None)


def _play_together(size: Size, checkpoint: Path, output: Path, narrator: Narrator) -> Arm:
    arena = f"demo-{os.getpid()}"
    # The very command that a user types.
    command = [sys.executable, "-m", "kvmem.cli", "serve", str(checkpoint)]
    command += ["--kvmem-host-gb", f"{size.host_gb:g}", "--kvmem-arena", arena, *_flags(size)]
    try:
        with _server(TOGETHER, command, output, narrator) as server:
            body = {"kv_transfer_params": {"kvmem": {}}}
            return _play(TOGETHER, server, size.script, narrator, body, Arena.path_of(arena))
    finally:
        sweep()  # nothing to do unless the engine was killed


def _flags(size: Size) -> list[str]:
    """What both servers are told, so that kvmem is the only difference.

    float32 makes a computed and a reused prefix give the same tokens; in bfloat16 they may differ
    in their last bits, with kvmem or without it. Eager mode saves a minute of compilation a start.
    """
    return [
        *("--served-model-name", SERVED),
        *("--dtype", "float32"),
        *("--block-size", str(BLOCK_TOKENS)),
        *("--num-gpu-blocks-override", str(size.device_tokens // BLOCK_TOKENS)),
        *("--max-model-len", str(size.prompt_limit_tokens)),
        *("--max-num-seqs", "8"),
        "--enforce-eager",
        "--enable-prompt-tokens-details",
        "--enable-per-request-metrics",
    ]


def _environ() -> dict[str, str]:
    cores = sorted(os.sched_getaffinity(0))
    return {
        # Without it vLLM's CPU build takes one core fewer as soon as there is any connector.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the number of blocks is given, and this is a bound
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def _server(name: str, command: Sequence[str], output: Path, narrator: Narrator) -> Server:
    narrator.stage(f"{name}: starting the server")
    log = output / f"{name.lower().replace(' + ', '-').replace(' ', '-')}.log"
    return Server(command, log=log, environ=_environ(), tell=narrator.now)


def _play(
    name: str,
    server: Server,
    script: Script,
    narrator: Narrator,
    body: dict[str, Any],
    arena: Path | None,
) -> Arm:
    narrator.line(f"  ready after {server.started_in_s:.0f} s at {server.url}")
    warm_up(url=server.url, model=SERVED)
    before = server.tokens()
    sources = _Sources(arena)

    def tell(turn: Played) -> None:
        sources.look()
        narrator.step(
            f"  {turn.turn_id}: {turn.prompt_tokens:,} tokens, {turn.cached_tokens:,} reused, "
            f"first token after {turn.ttft_s:.2f} s"
        )

    narrator.stage(f"{name}: {len(script.turns)} turns", steps=len(script.turns))
    turns = play(script, url=server.url, model=SERVED, extra_body=body, tell=tell)
    sources.look()
    return Arm(
        name=name,
        turns=[sources.fill_in(turn) for turn in turns],
        tokens=server.tokens().since(before),
        start_s=server.started_in_s,
    )


class _Sources:
    """From which tier each turn's prefix came: told by the arena's page, for the last requests."""

    def __init__(self, arena: Path | None) -> None:
        self._arena = arena
        self._host_tokens: dict[str, int] = {}

    def look(self) -> None:
        raw = Arena.read_stats(self._arena) if self._arena is not None else None
        page = msgspec.msgpack.decode(raw) if raw is not None else {}
        for receipt in page.get("recent", ()):
            self._host_tokens[receipt["request_id"]] = receipt["host"]

    def fill_in(self, turn: Played) -> Played:
        if self._arena is None:
            return msgspec.structs.replace(turn, host_tokens=0)
        wanted = request_id(turn.turn_id)  # the engine puts its own marks around it
        found = [host for name, host in self._host_tokens.items() if wanted in name]
        return msgspec.structs.replace(turn, host_tokens=found[-1] if found else None)


def _print_report(console: Console, size: Size, alone: Arm, together: Arm) -> None:
    equality = report.compare(alone.turns, together.turns)
    drawn = report.table(report.summarise(alone), report.summarise(together), equality)
    console.print()
    console.print(drawn)
    new = report.new_tokens(size.script, alone.turns)
    console.print(
        f"{new:,} of the prompt tokens were sent for the first time; the device has room for "
        f"{size.device_tokens:,}.\nBoth: {demo_model.NAME} in float32, greedy, blocks of "
        f"{BLOCK_TOKENS} tokens, eager, cores {_environ()['VLLM_CPU_OMP_THREADS_BIND']}.",
        highlight=False,
        soft_wrap=True,
    )
    if equality.first_different is not None:
        console.print(
            f"The first reply that differs is that of {equality.first_different}. Later prompts "
            "quote it, so they differ too.",
            style="bold red",
        )
    console.print()


def _write_figures(output: Path, alone: Arm, together: Arm) -> Path:
    equality = report.compare(alone.turns, together.turns)
    figures = {
        "summary": [report.summarise(alone), report.summarise(together)],
        "outputs": equality,
        "arms": [alone, together],
    }
    path = output / "figures.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(figures)))
    return path


def _check_needs() -> None:
    interface.check()
    missing = [n for n in ("matplotlib", "openai", "httpx") if importlib.util.find_spec(n) is None]
    if missing:
        raise ConfigError(
            f"The demo needs {' and '.join(missing)}",
            next_step="Run `make setup`, or `pip install 'kvmem[demo]'`.",
            missing=missing,
        )


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The folder --output {output} cannot be made: {error.strerror}",
            next_step="Give --output a folder that you may write to.",
            output=output,
        ) from error


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does: by way of every `finally`."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
