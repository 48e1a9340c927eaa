"""Runs the benchmarks one after the other and makes one report of them.

    python -m benchmarks [--short] [--only NAME] [--again] [--to FOLDER]

Each is a process of its own. What it printed and its closing JSON are kept in the folder
(benchmarks/results by default), so a run that was broken off goes on where it stopped: what was
done of the same commit, in the same form, is not done again. `report.md` and `report.html` are
written anew after each. The exit code is 1 when a benchmark failed; a missed aim is a finding, not
a failure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from benchmarks._page import Benchmark, benchmarks
from benchmarks._report import environment
from benchmarks._report_page import Run, as_html, as_markdown

ROOT = Path(__file__).resolve().parent.parent
NOT_HERE = 2  # the exit code of a benchmark that this machine can't run; its last line says why


def command_of(name: str, *, short: bool) -> list[str]:
    """How a benchmark is started."""
    return [sys.executable, "-m", f"benchmarks.{name}", *(["--short"] if short else [])]


def run_one(benchmark: Benchmark, command: Sequence[str], log: Path) -> Run:
    """Runs it, shows and keeps what it prints, and reads its closing JSON."""
    begin = time.monotonic()
    lines: list[str] = []
    with (
        log.open("w", encoding="utf-8") as kept,
        subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(f"  {line}", end="", flush=True)
                kept.write(line)
                kept.flush()
                lines.append(line.strip())
        except BaseException:
            process.terminate()
            raise
    told = [_json(line) for line in lines[-2:]]
    result = told[-1] if told and told[-1] is not None else {}
    where = next((t["environment"] for t in told if t is not None and "environment" in t), {})
    said = next((line for line in reversed(lines) if line), "it printed nothing")
    if process.returncode == 0 and result:
        state, note = "done", ""
    elif process.returncode == NOT_HERE:
        state, note, result = "left out", said, {}
    else:
        state, note = "failed", f"exit code {process.returncode}: {said}"
        result = {} if process.returncode == 0 else result
    return Run(
        name=benchmark.name,
        command=" ".join(["python", *command[1:]]),
        state=state,
        seconds=time.monotonic() - begin,
        note=note,
        environment=where,
        result=result,
        finished=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _json(line: str) -> dict[str, object] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def kept_run(path: Path, commit: str) -> Run | None:
    """What was done before, of this commit; None when it must be done, or done again."""
    try:
        run = msgspec.json.decode(path.read_bytes(), type=Run)
    except (OSError, msgspec.DecodeError):
        return None
    # Of sources that were changed nobody can say that they are still the same.
    same = run.environment.get("commit") == commit and not commit.endswith("-dirty")
    return run if run.state == "done" and same else None


def run_all(
    wanted: Sequence[Benchmark],
    folder: Path,
    *,
    short: bool,
    again: bool,
    commit: str,
    command: Callable[[str], list[str]],
) -> list[Run]:
    """Runs what is wanted and not done yet; the report is written after each."""
    form = "short" if short else "full"
    folder = folder / form
    folder.mkdir(parents=True, exist_ok=True)
    runs: dict[str, Run] = {}
    for number, benchmark in enumerate(wanted, 1):
        path = folder / f"{benchmark.name}.json"
        before = None if again else kept_run(path, commit)
        print(f"[{number}/{len(wanted)}] {benchmark.name}: {benchmark.question}", flush=True)
        if before is not None:
            print(f"  done before, {before.finished}", flush=True)
            runs[benchmark.name] = before
        else:
            run = run_one(benchmark, command(benchmark.name), folder / f"{benchmark.name}.log")
            path.write_bytes(msgspec.json.format(msgspec.json.encode(run)))
            runs[benchmark.name] = run
            print(f"  {run.state} in {run.seconds:.0f} s {run.note}", flush=True)
        pairs = [(b, runs.get(b.name)) for b in wanted]
        title = f"kvmem's benchmarks, {form} form, {commit}"
        (folder / "report.md").write_text(as_markdown(pairs, title), encoding="utf-8")
        (folder / "report.html").write_text(as_html(pairs, title), encoding="utf-8")
    return [runs[b.name] for b in wanted]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--short", action="store_true", help="each in its short form")
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    parser.add_argument("--again", action="store_true", help="also what was done before")
    parser.add_argument("--to", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    known = benchmarks()
    names = {b.name for b in known}
    only = {n if n.startswith("bench_") else f"bench_{n}" for n in arguments.only}
    if only - names:
        parser.error(f"no benchmark {', '.join(sorted(only - names))}; {', '.join(sorted(names))}")
    wanted = [b for b in known if not only or b.name in only]
    runs = run_all(
        wanted, arguments.to, short=arguments.short, again=arguments.again,
        commit=environment()["commit"], command=lambda n: command_of(n, short=arguments.short),
    )  # fmt: skip
    print(f"{arguments.to / ('short' if arguments.short else 'full')}/report.html")
    sys.exit(any(run.state == "failed" for run in runs))


if __name__ == "__main__":
    main()
