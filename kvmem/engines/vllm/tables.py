"""A request's device blocks in a step, in whichever form the engine tells them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

__all__ = ["BlockTables"]


class BlockTables:
    """The block tables of the step that was taken last.

    From vLLM 0.30 on the scheduler's output answers for every request of the step. In 0.29 it
    holds the tables of those requests that were given blocks in the step; that of another stands
    as it was told last, since a table changes with such a gift only. So every step must be taken.
    """

    def __init__(self) -> None:
        self._state: Any = None
        self._told: dict[str, tuple[list[int], ...]] = {}

    def take(self, output: SchedulerOutput) -> None:
        """Takes in a step; again for the same step changes nothing."""
        # Should anything fail here, no old table may pass for a new one (I5).
        told, self._told = self._told, {}
        self._state = output.kv_connector_block_state
        fresh = getattr(self._state, "block_ids", None)
        if fresh is not None:
            over = output.finished_req_ids
            self._told = {**{k: v for k, v in told.items() if k not in over}, **fresh}

    def of(self, request_id: str) -> tuple[list[int], ...] | None:
        """The request's blocks, one list for each KV-cache group; None if they are not known."""
        if hasattr(self._state, "get_block_ids"):
            return self._state.get_block_ids(request_id)
        return self._told.get(request_id)

    def offers(self) -> dict[str, list[tuple[int, int, int]]]:
        """States that the step completes, where the engine says so: by request (group, device
        block, tokens)."""
        return getattr(self._state, "boundary_state_offloads", None) or {}
