"""How long until the first token when the prompt's KV is in kvmem's host tier?

    python -m benchmarks.bench_ttft [--short] [--rounds N] [--lmcache-python PATH]

Arms, on prompts of about 2,800 and 6,000 tokens of real text and one output token:

    cold         a prompt never seen by anyone: by vLLM alone, by kvmem storing it, and by kvmem
                 with the request's own {"kvmem": {"store": false}}
    native hit   the same prompt again while the engine's own prefix cache has it: in vLLM alone
                 and in the engine with kvmem; the ratio is against the faster of the two
    host hit     after the device's prefix cache was emptied: only kvmem has it. Every answer must
                 say that all of its cached tokens came from the host tier
    disk hit     the same with an engine whose host tier holds one prompt, after another prompt has
                 taken its place: all of its cached tokens came from the disk
    LMCache hit  the same with LMCache's server, where it is installed

Each engine is a child process that runs vLLM's AsyncLLM with its engine-core process. One engine
works at a time, and only after all of them are quiet; the order of engines and of hits rotates.
Eager mode in every arm: compiled and eager runs take the same time for this model on a CPU.
bfloat16, or float32 on a CPU that cannot multiply it (then twice the bytes are loaded).
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from benchmarks import _arms
from benchmarks._arms import BLOCK_TOKENS, Engine, EngineAnswer
from benchmarks._corpus import real_text
from benchmarks._gather import gather_bytes_s
from benchmarks._math import bootstrap_ci, host_bound
from benchmarks._process import exit_on_sigterm, leftovers, shared_memory
from benchmarks._report import finish, spread
from benchmarks.bench_disk import Fio
from kvmem.cli.live import pages
from kvmem.demo import model as demo_model
from kvmem.store.layout import slots_within

__all__ = ["Prompts", "native_dtype"]

_LENGTHS = (2_787, 6_000)
_SHORT_LENGTHS = (1_000,)
_DEVICE_BYTES = 1 << 30
_PIECE_BYTES = 96 << 10
_SEED = 20_261_123
_SPARE = 2  # blocks that the host tier of the disk's engine holds beyond the longest prompt
_NO_STORE = {"kvmem": {"store": False}}
# Seconds of every request, by (length, what).
Samples = dict[tuple[int, str], list[float]]


class WrongSourceError(RuntimeError):
    """An answer's KV did not come from where the arm needs it: its time would mean nothing."""


class Plan(msgspec.Struct, frozen=True):
    """What is run: `rounds` of every arm at each length, `hits` of each hit in a round."""

    lengths: tuple[int, ...]
    rounds: int
    hits: int


class Disk(msgspec.Struct, frozen=True):
    """Bytes of a block on the disk, and what fio reads there in pieces of that size."""

    stored_bytes: float
    fio_bytes_s: float


class Prompts:
    """Real text, every prompt a window of its own: never seen before, from its first block on."""

    def __init__(self, model: Path, n_tokens: int) -> None:
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._ids: list[int] = []
        text = real_text(5 * n_tokens)
        for start in range(0, len(text), 1 << 16):
            self._ids += tokenizer.encode(text[start : start + (1 << 16)]).ids
            if len(self._ids) >= n_tokens:
                break
        self._at = 0

    def take(self, n: int) -> list[int]:
        """The next `n` tokens."""
        ids = self._ids[self._at : self._at + n]
        if len(ids) < n:
            raise ValueError(f"{len(self._ids):,} tokens of text are not enough")
        self._at += n
        return ids


class Bench:
    """The engines of one run and what they answered."""

    def __init__(self, engines: dict[str, Engine], prompts: Prompts, plan: Plan) -> None:
        self.engines = engines
        self.prompts = prompts
        self.plan = plan
        self.samples: Samples = defaultdict(list)
        self.wrong = 0

    def run(self) -> None:
        """Warms every engine up, then runs the rounds."""
        for engine in self.engines.values():
            for length in self.plan.lengths:
                engine.generate(self.prompts.take(length), _NO_STORE)
        for length in self.plan.lengths:
            for round_ in range(self.plan.rounds):
                self._round(length, round_)
                print(f"  {length:,} tokens: round {round_ + 1} of {self.plan.rounds}", flush=True)

    def _round(self, length: int, round_: int) -> None:
        prompt, other = self.prompts.take(length), self.prompts.take(length)
        names = list(self.engines)
        turn = round_ % len(names)
        first_tokens = set()
        for name in names[turn:] + names[:turn]:
            for engine in self.engines.values():
                engine.settle()
            if name == "disk":
                self._disk(length, prompt)
                continue
            if name == "kvmem" and round_ % 2:
                self._cold_unstored(length, other)
            cold = self._timed(name, length, "cold", prompt, cached=0)
            first_tokens |= {cold.token}
            if name == "vllm":
                for _ in range(self.plan.hits):
                    self._native(name, length, prompt)
            else:
                for hit in range(self.plan.hits):
                    self._hits(name, length, prompt, host_first=bool((round_ + hit) % 2))
            if name == "kvmem" and not round_ % 2:
                self._cold_unstored(length, other)

    def _cold_unstored(self, length: int, prompt: list[int]) -> None:
        answer = self._timed("kvmem", length, "cold unstored", prompt, cached=0, params=_NO_STORE)
        stored = (answer.report or {}).get("kvmem", {}).get("blocks_stored")
        if stored != 0:
            raise WrongSourceError(
                f"the request asked not to be stored, and stored {stored} blocks"
            )

    def _disk(self, length: int, prompt: list[int]) -> None:
        engine = self.engines["disk"]
        engine.generate(prompt)
        for _ in range(self.plan.hits):
            engine.generate(self.prompts.take(_flush(max(self.plan.lengths))))
            engine.settle()
            engine.reset()
            hit = self._timed("disk", length, "hit", prompt, cached=_whole(length))
            _from(hit, tier="disk", tokens=_whole(length))
            native = engine.generate(prompt)
            self.wrong += hit.token != native.token

    def _hits(self, name: str, length: int, prompt: list[int], *, host_first: bool) -> None:
        if not host_first:
            native = self._native(name, length, prompt)
        self.engines[name].reset()
        host = self._timed(name, length, "host hit", prompt, cached=_whole(length))
        if name == "kvmem":
            _from(host, tier="host", tokens=_whole(length))
        if host_first:
            native = self._native(name, length, prompt)
        # The engine's own hit is the oracle: the same bits give the same token.
        self.wrong += host.token != native.token

    def _native(self, name: str, length: int, prompt: list[int]) -> EngineAnswer:
        answer = self._timed(name, length, "native hit", prompt, cached=_whole(length))
        if name == "kvmem":
            _from(answer, tier="device", tokens=_whole(length))
        return answer

    def _timed(
        self,
        name: str,
        length: int,
        what: str,
        prompt: list[int],
        *,
        cached: int,
        params: dict[str, Any] | None = None,
    ) -> EngineAnswer:
        answer = self.engines[name].generate(prompt, params)
        if answer.cached != cached:
            raise WrongSourceError(
                f"{name}, {what}, {length} tokens: {answer.cached} came from a cache, "
                f"{cached} should have; kvmem's receipt: {answer.report}"
            )
        self.samples[length, f"{name} {what}"].append(answer.ttft_s)
        return answer


def _from(answer: EngineAnswer, *, tier: str, tokens: int) -> None:
    sources = (answer.report or {}).get("kvmem", {}).get("tokens")
    if sources is None or sources[tier] != tokens:
        raise WrongSourceError(f"{tokens} tokens should have come from the {tier}: {answer.report}")


def _n_host(longest: int) -> int:
    """Slots of the disk's engine: for the longest prompt, and a little more."""
    return _whole(longest) // BLOCK_TOKENS + _SPARE


def _flush(longest: int) -> int:
    """Tokens of a prompt that takes every slot of the disk's engine."""
    return (_n_host(longest) + 1) * BLOCK_TOKENS


def _host_bytes(n_slots: int, block_bytes: int) -> int:
    """The least budget that makes room for so many blocks."""
    n_bytes = n_slots * block_bytes
    while slots_within(n_bytes, block_bytes) < n_slots:
        n_bytes += 1 << 16
    return n_bytes


def _whole(length: int) -> int:
    return (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def figures(
    samples: Samples, length: int, *, block_bytes: int, gather: float, disk: Disk | None = None
) -> dict[str, float | tuple[float, float]]:
    """What is promised, at one length."""
    median = {what: statistics.median(s) for (n, what), s in samples.items() if n == length}
    host = median["kvmem host hit"]
    native = min(median["vllm native hit"], median["kvmem native hit"])
    overhead = _pairs(samples, length, "kvmem cold", "vllm cold")
    within = _pairs(samples, length, "kvmem cold", "kvmem cold unstored")
    loaded = _whole(length) // BLOCK_TOKENS * block_bytes
    result: dict[str, float | tuple[float, float]] = {
        "host_hit_vs_native_hit": host / native,
        "host_bound": host_bound(host, native, loaded, gather),
        "cold_vs_host_hit": median["vllm cold"] / host,
        "store_overhead": statistics.median(overhead),
        "store_overhead_ci": bootstrap_ci(overhead, seed=_SEED),
        "store_overhead_in_engine": statistics.median(within),
        "store_overhead_in_engine_ci": bootstrap_ci(within, seed=_SEED),
    }
    if disk is not None:
        result["disk_hit_vs_native_hit"] = median["disk hit"] / native
        least = _whole(length) // BLOCK_TOKENS * disk.stored_bytes / disk.fio_bytes_s
        result["disk_bound"] = (median["disk hit"] - native) / least
    if "lmcache host hit" in median:
        result["lmcache_hit_vs_native_hit"] = median["lmcache host hit"] / native
    return result


def _pairs(samples: Samples, length: int, ours: str, theirs: str) -> list[float]:
    pairs = zip(samples[length, ours], samples[length, theirs], strict=True)
    return [a / b for a, b in pairs]


def worst(by_length: list[dict[str, Any]]) -> dict[str, Any]:
    """Each figure at the length where it is worst; an interval goes with its figure."""
    result: dict[str, Any] = {}
    for key in by_length[0]:
        if key.endswith("_ci"):
            continue
        pick = min if key == "cold_vs_host_hit" else max
        row = pick(by_length, key=lambda r, k=key: r[k])
        result[key] = row[key]
        if f"{key}_ci" in row:
            result[f"{key}_ci"] = [round(end, 4) for end in row[f"{key}_ci"]]
    return result


def _table(samples: Samples) -> None:
    print(f"\n{'':40}{'median':>10}{'p10':>9}{'p90':>9}{'n':>5}   ms to first token")
    for length, what in sorted(samples):
        values = samples[length, what]
        low, high = spread(values)
        middle = statistics.median(values)
        cells = f"{middle * 1e3:10.1f}{low * 1e3:9.1f}{high * 1e3:9.1f}"
        print(f"{length:>7,}  {what:31}{cells}{len(values):5}")


@contextlib.contextmanager
def _engines(
    model: Path, dtype: str, lmcache: Path | None, folder: Path, longest: int
) -> Iterator[dict[str, Engine]]:
    settings: dict[str, Any] = {
        "model": str(model),
        "dtype": dtype,
        "block_size": BLOCK_TOKENS,
        "max_model_len": 8_192,
        "kv_cache_memory_bytes": _DEVICE_BYTES,
        "enforce_eager": True,
        "disable_log_stats": False,
    }
    transfers: dict[str, tuple[Path, dict[str, Any] | None]] = {
        "vllm": (Path(sys.executable), None),
        "kvmem": (Path(sys.executable), _arms.kvmem_transfer({"host_gb": 2.0})),
    }
    block_bytes = _arms.kv_bytes_per_token(model, dtype) * BLOCK_TOKENS
    transfers["disk"] = (
        Path(sys.executable),
        _arms.kvmem_transfer(
            {
                "host_gb": _host_bytes(_n_host(longest), block_bytes) / 2**30,
                "disk_gb": 8.0,
                "disk_path": str(folder / "disk"),
                "eviction": "lru",
            }
        ),
    )
    with contextlib.ExitStack() as stack:
        if lmcache is not None:
            log = folder / "lmcache-server.log"
            server = _arms.lmcache_server(lmcache, host_bytes=2 << 30, log=log)
            port = stack.enter_context(server)
            transfers["lmcache"] = (lmcache, _arms.lmcache_transfer(port))
        engines = {}
        for name, (python, transfer) in transfers.items():
            chosen = {**settings, **({"kv_transfer_config": transfer} if transfer else {})}
            engines[name] = stack.enter_context(Engine(python, chosen, log=folder / f"{name}.log"))
        for name, engine in engines.items():
            engine.wait_ready()
            print(f"  {name} is ready", flush=True)
        yield engines


def _disk_of(folder: Path) -> Disk | None:
    """What the disk's engine read, and what fio reads beside it; None without fio."""
    (page,) = (page for page in pages() if page.disk is not None)
    if shutil.which("fio") is None or page.disk is None:
        print("disk_bound is left out: there is no fio here (Debian's package fio)")
        return None
    stored = page.disk.bytes_read / page.disk.read
    fio = Fio(folder, int(stored), (256 << 20) // int(stored), threads=4)
    rates = sorted(fio.gb_s(write=False) for _ in range(5))
    low, middle, high = (rates[i] for i in (0, 2, 4))
    print(f"disk: {stored:,.0f} bytes a block; fio {middle:.2f} GB/s ({low:.2f}..{high:.2f})")
    return Disk(stored, middle * 1e9)


def native_dtype() -> str:
    """bfloat16 where the CPU multiplies it; elsewhere a prompt of 2,800 tokens takes minutes."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("flags", 2)[1].split()
    return "bfloat16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "float32"


def _plan(args: argparse.Namespace) -> Plan:
    if args.short:
        return Plan(lengths=_SHORT_LENGTHS, rounds=args.rounds or 2, hits=1)
    lengths = tuple(args.tokens) if args.tokens else _LENGTHS
    return Plan(lengths=lengths, rounds=args.rounds or 9, hits=2)


def main() -> None:
    """Runs the benchmark and prints the table and the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--short", action="store_true", help="one short prompt, two rounds, no LMCache"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=native_dtype())
    parser.add_argument("--rounds", type=int, help="of every arm at each length (9)")
    parser.add_argument("--tokens", type=int, action="append", help="only prompts of so many")
    parser.add_argument("--lmcache-python", type=Path, help="a Python with LMCache and vLLM")
    parser.add_argument("--no-lmcache", action="store_true", help="leave LMCache out")
    args = parser.parse_args()
    exit_on_sigterm()
    plan = _plan(args)
    without = args.no_lmcache or args.short
    lmcache = None if without else _arms.lmcache_python(args.lmcache_python)
    if lmcache is None:
        print("LMCache's arm is skipped: no .venv-lmcache and no --lmcache-python, or not wanted")
    model = demo_model.ensure(print)
    gather = gather_bytes_s(piece_bytes=_PIECE_BYTES)
    print(f"gather of {_PIECE_BYTES >> 10} KiB pieces, one thread: {gather / 1e9:.1f} GB/s")
    block_bytes = _arms.kv_bytes_per_token(model, args.dtype) * BLOCK_TOKENS
    print(f"{args.dtype}: {block_bytes:,} bytes a block of {BLOCK_TOKENS} tokens", flush=True)
    flushes = len(plan.lengths) * plan.hits * _flush(max(plan.lengths))
    per_round = sum(2 * length for length in plan.lengths) + flushes
    prompts = Prompts(model, plan.rounds * per_round + 4 * sum(plan.lengths))
    before = shared_memory()
    with (
        tempfile.TemporaryDirectory(prefix="kvmem-bench-") as folder,
        _engines(model, args.dtype, lmcache, Path(folder), max(plan.lengths)) as engines,
    ):
        bench = Bench(engines, prompts, plan)
        bench.run()
        disk = _disk_of(Path(folder))
    _table(bench.samples)
    rows = [
        figures(bench.samples, length, block_bytes=block_bytes, gather=gather, disk=disk)
        for length in plan.lengths
    ]
    for length, row in zip(plan.lengths, rows, strict=True):
        print(f"{length:>7,}  {row}")
    finish(
        {
            **worst(rows),
            "wrong": bench.wrong,
            "rounds": plan.rounds,
            "dtype": args.dtype,
            "gather_gb_s": gather / 1e9,
            "left_behind": leftovers(before),
        }
    )


if __name__ == "__main__":
    main()
