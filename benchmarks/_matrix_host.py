"""Starts one engine after another in processes of their own, quickly.

    with Host(folder) as host:
        host.make(["llama"])
        outcomes = host.run(setup)

The imports of vLLM take longer than a tiny model's whole test. So one process imports it and then
forks: each child is an engine with its own memory, arena and end, however it ends. What the parent
and the engine say to each other are lines of JSON.

    {"op": "make", "models": [..], "folder": ..}            -> {"made": ..}
    {"op": "start", "setup": .., "kvmem": .., "broken": ..} -> {"started": ..} | {"refused": ..}
                                                               | {"failed": ..}
    {"op": "run", "scenario": ..} -> {"right": ..} | {"wrong": ..} | {"failed": ..} | {"alone": ..}
    {"op": "close"}               -> {"closed": ..}
                                     {"died": ..} when the engine's process did
"""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from benchmarks._matrix import (
    Cell,
    EngineError,
    Outcome,
    Setup,
    Verdict,
    WrongError,
    is_refusal,
)
from benchmarks._process import Child, ChildError
from kvmem.engines.vllm import refusal

__all__ = ["ENVIRON", "Host"]

_ALONE = "vLLM alone: "
_ANSWER_S = 900.0  # of a machine that does other things too
_CORES = sorted(os.sched_getaffinity(0))
ENVIRON = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": f"{_CORES[0]}-{_CORES[-1]}",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


class Host:
    """The parent's end; a context manager that ends every engine.

    Args:
        folder: where models and the log go.
        broken: kvmem loads zeros in place of what it stored, unchecked: an oracle must see it.
    """

    def __init__(self, folder: Path, *, broken: bool = False) -> None:
        self.folder = folder
        self.broken = broken
        self._child = Child(
            [sys.executable, "-m", "benchmarks._matrix_host"],
            log=folder / "engines.log",
            env=ENVIRON,
            pipes=True,
        )

    def __enter__(self) -> Self:
        self._answer()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._child.end()

    def make(self, models: Iterable[str]) -> None:
        """Makes the checkpoints of these models in the folder.

        Raises:
            ChildError: one could not be made.
        """
        wanted = [name for name in models if not (self.folder / name).exists()]
        answer = self._tell({"op": "make", "models": wanted, "folder": str(self.folder)})
        if "made" not in answer:
            raise ChildError(f"no models: {answer}")

    def run(self, setup: Setup) -> list[Outcome]:
        """What each of the setup's cells came to, on one engine; after an error on another."""
        found: list[Outcome] = []
        while len(found) < len(setup.cells):
            start = self._start(setup, kvmem=True)
            if "started" in start:
                found += self._run_on(setup, setup.cells[len(found) :])
                continue
            verdict: Verdict = "refused" if "refused" in start else "not run"
            detail = next(iter(start.values()))
            missing = setup.cells[len(found) :]
            found += [Outcome(Cell(setup, c).name, verdict, detail) for c in missing]
        return self._blame(setup, found)

    def _run_on(self, setup: Setup, scenarios: Sequence[str]) -> list[Outcome]:
        """The outcomes up to the first error, since the engine may not be the same after it."""
        found: list[Outcome] = []
        for scenario in scenarios:
            begin = time.monotonic()
            answer = self._tell({"op": "run", "scenario": scenario})
            ((what, detail),) = answer.items()
            verdict = what if what in ("right", "wrong") else "not run"
            if what == "alone":
                detail = f"{_ALONE}{detail}"
            seconds = time.monotonic() - begin
            found.append(Outcome(Cell(setup, scenario).name, verdict, detail, seconds))
            if what == "died":
                return found
            if what not in ("right", "alone"):
                break
        self._tell({"op": "close"})
        return found

    def _blame(self, setup: Setup, found: list[Outcome]) -> list[Outcome]:
        """Cells that ended in an error are wrong, unless vLLM alone ends in one too."""
        if not any(_unexplained(outcome) for outcome in found):
            return found
        alone = self._control(setup)
        change: dict[str, Any] = (
            {"verdict": "wrong"} if alone is None else {"detail": f"{_ALONE}{alone}"}
        )
        return [msgspec.structs.replace(o, **change) if _unexplained(o) else o for o in found]

    def _control(self, setup: Setup) -> str | None:
        """What fails without kvmem; None if nothing does."""
        answer = self._start(setup, kvmem=False)
        if "started" in answer:
            answer = self._tell({"op": "run", "scenario": "control"})
            if "died" not in answer:
                self._tell({"op": "close"})
        ((what, detail),) = answer.items()
        return None if what == "right" else detail

    def _start(self, setup: Setup, *, kvmem: bool) -> dict[str, str]:
        model = str(self.folder / setup.model)
        return self._tell(
            {
                "op": "start",
                "setup": setup,
                "model": model,
                "kvmem": kvmem,
                "broken": self.broken,
            }
        )

    def _tell(self, command: dict[str, Any]) -> dict[str, str]:
        self._child.stdin.write(msgspec.json.encode(command) + b"\n")
        self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, str]:
        ready, _, _ = select.select([self._child.stdout], [], [], _ANSWER_S)
        if not ready:
            raise ChildError(f"no answer in {_ANSWER_S:.0f} s; the log ends:\n{self._child.tail()}")
        line = self._child.stdout.readline()
        if not line:
            self._child.fail()
        return msgspec.json.decode(line, type=dict[str, str])


def _unexplained(outcome: Outcome) -> bool:
    return outcome.verdict == "not run" and not outcome.detail.startswith(_ALONE)


# -- the process that forks ------------------------------------------------------------------------


class _Start(msgspec.Struct):
    setup: Setup
    model: str
    kvmem: bool
    broken: bool


def _serve() -> None:
    answers, commands = os.dup(1), io.FileIO(0)
    os.dup2(2, 1)  # vLLM prints: the pipe has another number, 1 becomes the log

    def say(**answer: str) -> None:
        os.write(answers, msgspec.json.encode(answer) + b"\n")

    _preload()
    say(ready="")
    while line := commands.readline():
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _child(msgspec.json.decode(line), commands, say)
                code = 0
            except BaseException:  # noqa: BLE001 the top of a forked process: it ends, told
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        if status != 0:
            say(died=_described(status))


def _preload() -> None:
    """What every engine imports; nothing here may start a thread, which a fork would lose."""
    import vllm.entrypoints.llm
    import vllm.v1.engine.core
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401


def _child(command: dict[str, Any], commands: io.FileIO, say: Any) -> None:
    if command["op"] == "make":
        from benchmarks import _models

        for name in command["models"]:
            _models.make(name, Path(command["folder"]) / name)
        say(made="")
        return
    asked = msgspec.convert(command, _Start)
    os.environ.update(asked.setup.environ)
    engine = _started(asked, say)
    if engine is None:
        return
    say(started="")
    while line := commands.readline():
        command = msgspec.json.decode(line)
        if command["op"] == "close":
            engine.close()
            say(closed="")
            return
        say(**_outcome(engine, command["scenario"]))


def _started(asked: _Start, say: Any) -> Any:
    """The engine, or None where it did not start, and why was said."""
    from benchmarks._matrix_engine import AsyncEngine, Engine

    kind = Engine
    if asked.setup.kind == "async":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        kind = AsyncEngine
    with refusal.collected() as folder:
        try:
            return kind(asked.setup, Path(asked.model), kvmem=asked.kvmem, broken=asked.broken)
        except Exception as error:  # noqa: BLE001 whatever the start ended with is the answer
            traceback.print_exc()
            message = refusal.told(folder) or f"{type(error).__name__}: {error}"
            text = " ".join(message.split())
            say(**({"refused": text} if is_refusal(text) else {"failed": text[:300]}))
    return None


def _outcome(engine: Any, scenario: str) -> dict[str, str]:
    from benchmarks import _matrix_async, _matrix_cells

    try:
        if scenario in _matrix_async.SCENARIOS:
            return {"right": engine.run(_matrix_async.SCENARIOS[scenario](engine))}
        detail = _matrix_cells.SCENARIOS[scenario](engine)
        if scenario != "control":
            engine.check()
        return {"right": detail}
    except EngineError as error:
        return {"alone": str(error)}
    except WrongError as error:
        traceback.print_exc()
        return {"wrong": str(error)}
    except Exception as error:  # noqa: BLE001 whatever the cell ended with is the answer
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}


def _described(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"the engine's process got {signal.Signals(os.WTERMSIG(status)).name}"
    return f"the engine's process ended with {os.waitstatus_to_exitcode(status)}"


if __name__ == "__main__":
    _serve()
