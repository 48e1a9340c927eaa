"""Does the dashboard stay quick with ten thousand sessions and a million blocks?

    python -m benchmarks.bench_dashboard [--short]

The dashboard's server runs in a process of its own on an engine's state that is made up
(`_dashboard.py`): 10,000 sessions of 1,000,000 different blocks, of which twenty end a turn every
second. The figures that an engine would work out are worked out in the same process, so the CPU
time is an upper bound. A headless Chromium opens the page, a new one each round. First paint is the
browser's own figure, from the navigation on; `tree_s` is until the tree is drawn. Then one page
stays open, and the server's CPU time is taken from /proc over the seconds that it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import uvicorn

from benchmarks._dashboard import Synthetic
from benchmarks._report import finish
from kvmem.dashboard.app import Dashboard

__all__: list[str] = []

SESSIONS, BLOCKS = 10_000, 1_000_000
TURNS_A_SECOND = 20


def serve(n_sessions: int, n_blocks: int) -> None:
    """The server's process: says its address, and works until it is ended."""
    source = Synthetic(n_sessions, n_blocks)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(Dashboard(lambda: [source]), log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(1.0):
            source.work(TURNS_A_SECOND)

    thread = threading.Thread(target=work)
    thread.start()
    print(f"http://127.0.0.1:{listener.getsockname()[1]}/", flush=True)
    try:
        server.run(sockets=[listener])
    finally:
        ended.set()
        thread.join()


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Runs it and prints the closing line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--serve", nargs=2, type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(*given.serve)
        return
    from tests.browser.chromium import Chromium, find

    if find() is None:
        raise SystemExit("bench_dashboard: no Chromium is installed (Debian: chromium)")
    rounds, seconds = (3, 15.0) if given.short else (7, 60.0)
    command = [sys.executable, "-m", "benchmarks.bench_dashboard", "--serve"]
    command += [str(SESSIONS), str(BLOCKS)]
    paints, trees = [], []
    drawn = "document.querySelectorAll('#tree [role=treeitem]').length > 5"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        try:
            for one in range(rounds + 1):  # the first finds nothing ready, and is told apart
                folder = Path(tempfile.mkdtemp(prefix="kvmem-bench-"))
                browser = Chromium(folder)
                began = time.perf_counter()
                browser.open(url)
                browser.until(drawn, within_s=120)
                trees.append(time.perf_counter() - began)
                paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
                paints.append(browser.run(paint) / 1e3)
                print(f"round {one}: first paint {paints[-1]:.3f} s, tree {trees[-1]:.2f} s")
                if one == rounds:
                    before = cpu_s(server.pid)
                    browser.run(f"new Promise((done) => setTimeout(done, {seconds * 1e3}))")
                    used = (cpu_s(server.pid) - before) / seconds
                    blocks = browser.run("document.getElementById('tree-note').textContent")
                    print(f"one page open for {seconds:.0f} s: {used:.2%} of a core; {blocks}")
                    if browser.troubles:
                        raise SystemExit(f"bench_dashboard: {browser.troubles}")
                browser.close()
                shutil.rmtree(folder, ignore_errors=True)  # its last writes may still come
        finally:
            server.terminate()
    finish(
        {
            "first_paint_s": statistics.median(paints[1:]),
            "first_paint_s_worst": max(paints),
            "tree_s": statistics.median(trees[1:]),
            "tree_s_cold": trees[0],
            "server_cpu_share": used,
            "sessions": SESSIONS,
            "blocks": BLOCKS,
        }
    )


if __name__ == "__main__":
    main()
