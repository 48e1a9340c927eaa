"""Is blame right about which of cache, context and model failed, and what does it cost?

Agent logs with one injected cause each (`benchmarks/_blame_logs.py`), SmolLM2-135M-Instruct in
float32 on the CPU, through the transformers engine. A turn counts where it fails, and where the
same turn without the injection is answered right (causes of context and cache) or wrong (beyond the
model): so the label is what an intervention showed, and the others are left out and counted.

Beside blame, on the same turns: the naive comparison of E with F, residency of blocks only, and a
plain O-test. With --calibrate it writes kvmem/blame/calibration.py from seed 0 instead, which no
figure is made of. Then the cost of all arms of one long turn, cached against uncached.

    python -m benchmarks.bench_blame [--short] [--seeds 1,2,3] [--per 15] [--minutes 30]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import _blame_figures as figures
from benchmarks._blame_figures import Tried
from benchmarks._blame_logs import INJECTED, make
from benchmarks._report import finish

CALIBRATION_SEED = 0
MOST_TRIES = 8  # cases that are made for one that counts
_engine: Any = None


def engine(threads: int = 1, max_tokens: int = 1024) -> tuple[Any, Any, Any]:
    """Renderer, scorer and store of the real model, made once a process."""
    global _engine
    if _engine is None:
        import torch
        import transformers

        from kvmem.context import ChatRenderer
        from kvmem.demo.model import ensure
        from kvmem.engines.transformers import PrefixStore
        from kvmem.engines.transformers.scoring import PackedScorer

        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        folder = ensure()
        renderer = ChatRenderer.of(transformers.AutoTokenizer.from_pretrained(folder))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        store = PrefixStore(model.eval(), host_gb=max_tokens / 16_000, max_tokens=max_tokens)
        _engine = (renderer, PackedScorer(store), store)
    return _engine


def tried(injected: str, seed: int, number: int) -> Tried:
    """One case: whether it counts, and if so what blame says of it."""
    from kvmem.blame.arms import Replays
    from kvmem.blame.trial import try_turn

    renderer, scorer, _ = engine()
    case = make(injected, seed, number)
    label, wants_right = INJECTED[injected]
    base = Replays(case.base, renderer, scorer).as_served().right
    if injected != "never known" and base != wants_right:
        return Tried(injected, seed, label, "base", None)
    if Replays(case.turn, renderer, scorer).as_served().right:
        return Tried(injected, seed, label, "passes", None)
    return Tried(injected, seed, label, "counts", try_turn(case.turn, renderer, scorer))


def job(task: tuple[str, int, int, float]) -> list[Tried]:
    """Tries cases of one injection and seed until `per` count, or until the time is up."""
    injected, seed, per, until = task
    done: list[Tried] = []
    for number in range(MOST_TRIES * per):
        if sum(t.state == "counts" for t in done) >= per or time.time() > until:
            break
        done.append(tried(injected, seed, number))
    return done


def run(seeds: Sequence[int], per: int, minutes: float, workers: int) -> Iterator[Tried]:
    """All cases, in pieces of a few so that every cause has its share when the time is up."""
    until = time.time() + 60.0 * minutes
    piece = max(1, min(3, per))
    tasks = [
        (injected, seed * 1000 + part, piece, until)
        for part in range(-(-per // piece))
        for seed in seeds
        for injected in INJECTED
    ]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for number, found in enumerate(pool.map(job, tasks)):
            counted = sum(t.state == "counts" for t in found)
            print(f"{number + 1}/{len(tasks)} {tasks[number][0]}: {counted}", flush=True)
            yield from (msgspec.structs.replace(t, seed=t.seed // 1000) for t in found)


def cost(n_tokens: int) -> dict[str, Any]:
    """All arms of one long turn by cached prefixes, against one cold prefill and cold arms."""
    from kvmem.blame.arms import Replays
    from kvmem.blame.evidence import find
    from kvmem.blame.scorer import FRESH

    renderer, scorer, _ = engine(max_tokens=min(8192, n_tokens + 1024))
    turn = figures.long_turn(make("dropped", 99, 0), renderer, n_tokens)
    warm = Replays(turn, renderer, scorer)
    warm.as_served(), warm.full()  # they were served before
    cold_prefill = Replays(turn, renderer, scorer)
    replays = Replays(turn, renderer, scorer)
    found = find(turn)
    begin = time.perf_counter()
    replays.as_served(), replays.exact(), replays.full(), replays.question()
    replays.evidence(found), replays.restated(found), replays.resampled()
    cached_s = time.perf_counter() - begin
    begin = time.perf_counter()
    cold_e = cold_prefill._run("E", cold_prefill._served(), FRESH)
    cold_s = time.perf_counter() - begin
    begin = time.perf_counter()
    cold_f = cold_prefill._run("F", cold_prefill._of([p.message for p in turn.full]), FRESH)
    uncached_s = cold_s + time.perf_counter() - begin
    pairs = ((replays.arms["E"], cold_e), (replays.arms["F"], cold_f))
    apart = max(abs((a.logprob or 0.0) - (b.logprob or 0.0)) for a, b in pairs)
    return {
        "cost_tokens": cold_e.prompt_tokens,
        "cached_over_cold_prefill": cached_s / cold_s,
        "uncached_over_cold_prefill": uncached_s / cold_s,
        "scores_apart": apart,
        "scores_equal": cold_e.logprob == replays.arms["E"].logprob,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a few minutes")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--per", type=int, default=0, help="failing turns a cause and seed")
    parser.add_argument("--minutes", type=float, default=0.0, help="then no more are begun")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cost-tokens", type=int, default=0)
    parser.add_argument("--calibrate", action="store_true", help="write calibration.py instead")
    parser.add_argument("--keep", type=Path, help="a file for what was tried, one JSON a line")
    parser.add_argument("--read", type=Path, help="what an earlier run kept, instead of trying")
    options = parser.parse_args()
    per = options.per or (1 if options.short else 15)
    minutes = options.minutes or (4.0 if options.short else 240.0)
    seeds = [CALIBRATION_SEED] if options.calibrate else [int(s) for s in options.seeds.split(",")]
    if options.read is not None:
        lines = options.read.read_bytes().splitlines()
        done = [msgspec.json.decode(line, type=Tried) for line in lines]
        done = [figures.again(t) for t in done]
    else:
        done = []
        for one in run(seeds, per, minutes, options.workers):
            done.append(one)
            if options.keep is not None:
                with options.keep.open("ab") as out:
                    out.write(msgspec.json.encode(one) + b"\n")
    if options.calibrate:
        figures.calibrate(done)
        return
    print(figures.table(done))
    result = figures.result(done)
    result |= cost(options.cost_tokens or (1000 if options.short else 6000))
    finish(result)


if __name__ == "__main__":
    main()
