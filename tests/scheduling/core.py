"""vLLM's own `EngineCore` around the scheduler of these tests, for what is called on it."""

from __future__ import annotations

from typing import Any

from kvmem.engines.vllm.adapters import held_by

__all__ = ["core_of"]


class Workers:
    """Stands for the executor. A call comes to the workers after the steps that were sent before
    it; every call but kvmem's own brings new weights, while `changes` says so."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.calls: list[Any] = []
        self.changes = True

    def collective_rpc(
        self, method: Any, timeout: Any = None, args: tuple = (), kwargs: Any = None
    ) -> list[Any]:
        for entry in self.engine.queue:
            self.engine._execute(entry)
        if method is held_by:
            return [None]
        self.calls.append(method)
        if self.changes:
            self.engine.forward.new_weights()
        return ["done"]


def core_of(engine: Any) -> Any:
    """An engine core that has the test's scheduler and no model."""
    from vllm.v1.engine.core import EngineCore

    core = EngineCore.__new__(EngineCore)
    core.scheduler = engine.scheduler
    core.model_executor = Workers(engine)
    return core
