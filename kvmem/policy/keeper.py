"""What each prompt is worth keeping, from what it and others like it did.

A *branch* is one conversation as the cache sees it: a prompt that later ones extend. It lies at the
end of a path of *runs*, blocks without a fork among them, numbered by whoever keeps the tree. A
prompt that extends a branch is its return; one that extends none begins a branch. What the branch
waits for is one class of returns, by how often it came back and how long that took; where an
orchestrator says what it waits for, a tool by name, a person, nothing any more, that comes first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from kvmem.policy.returns import N_BINS, Class, Returns, bins_of

__all__ = ["BACK", "OVER", "Keeper"]

UNKNOWN = "?"
OVER = "over"  # what a hint says of a conversation that has ended
BACK = "back"  # of one whose wait is over: its prompt comes now
MOST_BRANCHES = 65_536  # those not seen for longest are forgotten beyond that
NEWEST = 0.4  # weight of the last wait in what is a branch's usual one
RETAINED = 1e3  # hits a second: no wait is worth as much
PACES = 9  # classes of usual waits: powers of two, of seconds


class Keeper:
    """See the module. Branches are numbered; a forgotten one's number is used again."""

    def __init__(self) -> None:
        self.returns = Returns()
        self._branch_at: dict[int, int] = {}  # by the run at whose end it lies
        n = 64
        self._run = np.full(n, -1, np.int64)
        self._since_s = np.zeros(n)
        self._told_s = np.zeros(n)  # age up to which its wait is in `returns`
        self._pace, self._times = [0.0] * n, [0] * n
        self._kind: list[str] = [UNKNOWN] * n
        self._before: dict[int, str] = {}  # by branch whose wait is over: what it was
        self._class = np.zeros(n, np.int64)
        self._classes: list[Class] = [()]
        self._number_of: dict[Class, int] = {(): 0}
        self._over = [False]
        self._tables = np.zeros((64, N_BINS))  # by class and age
        self._agent: list[str | None] = [None] * n
        self._branch_of: dict[str, int] = {}  # by agent
        self._free = list(range(n - 1, -1, -1))
        self._retained: dict[int, tuple[float, float]] = {}  # by branch: until when, how much
        # Is told of branches that are no more: their numbers are used again.
        self.on_forget: Callable[[int], None] | None = None

    def used(self, path: Sequence[int], now_s: float, agent: str | None = None) -> int:
        """A prompt that ends with the last of these runs; its branch.

        Args:
            path: the runs from the root on.
            now_s: seconds, never less than before.
            agent: who sends it, where that is known: its earlier branch, if this prompt does not
                extend it, is over.
        """
        at = next((run for run in reversed(path) if run in self._branch_at), None)
        if at is None:
            branch = self._new(now_s)
            self._times[branch], self._kind[branch] = 0, UNKNOWN
        else:
            branch = self._branch_at.pop(at)
            self._back(branch, now_s)
        end = path[-1]
        self._run[branch], self._branch_at[end] = end, branch
        self._since_s[branch], self._told_s[branch] = now_s, 0.0
        self._settle(branch, self._kind[branch])
        if agent is not None:
            self._sends(agent, branch)
        return branch

    def extended(self, branch: int, run: int) -> None:
        """The branch ends with this run now, unless another one does; its wait goes on."""
        if run not in self._branch_at and self._run[branch] >= 0:
            del self._branch_at[int(self._run[branch])]
            self._run[branch], self._branch_at[run] = run, branch

    def waits(self, branch: int, kind: str, now_s: float) -> None:
        """An orchestrator says what the branch waits for now: any word, `OVER` or `BACK`.

        Until it does so, a branch that came back is taken to wait for what it waited for before.
        """
        before = self._kind[branch]
        if kind != BACK:
            self._before.pop(branch, None)
        elif before not in (BACK, OVER):
            self._came_back(branch, now_s)
            self._before[branch] = before
            self._since_s[branch], self._told_s[branch] = now_s, 0.0  # a wait of its own begins
        self._settle(branch, kind)

    def forget(self, run: int) -> None:
        """What lay at the end of this run is no more."""
        branch = self._branch_at.pop(run, None)
        if branch is not None:
            self._run[branch] = -1
            agent, self._agent[branch] = self._agent[branch], None
            if agent is not None and self._branch_of.get(agent) == branch:
                del self._branch_of[agent]
            self._retained.pop(branch, None)
            self._before.pop(branch, None)
            self._free.append(branch)
            if self.on_forget is not None:
                self.on_forget(branch)

    def retain(self, branch: int, until_s: float, weight: float) -> None:
        """The branch stays longer than any that nobody asked for; the heavier ones longest."""
        self._retained[branch] = (until_s, RETAINED * weight)

    def let_go(self, branch: int) -> bool:
        """It is worth what its returns say again; whether it was retained."""
        return self._retained.pop(branch, None) is not None

    def next_retained(self, now_s: float) -> int | None:
        """One that is retained, each in its turn."""
        for branch, (until_s, more) in list(self._retained.items()):
            del self._retained[branch]
            if until_s > now_s:
                self._retained[branch] = (until_s, more)  # the last one now
                return branch
        return None

    @property
    def n_retained(self) -> int:
        """How many are, those included whose time is over."""
        return len(self._retained)

    def run_of(self, branch: int) -> int:
        """The run at whose end the branch lies."""
        return int(self._run[branch])

    def ends_at(self, run: int) -> bool:
        """Whether some branch lies at the end of this run."""
        return run in self._branch_at

    def worths(self, now_s: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Each branch's run, -1 for no branch, and what a second of it is worth now."""
        self._make_tables()
        worth = self._tables[self._class, bins_of(now_s - self._since_s)]
        worth[self._run < 0] = 0.0
        for branch, (until_s, more) in list(self._retained.items()):
            if until_s <= now_s:
                del self._retained[branch]
            else:
                worth[branch] += more
        return self._run, worth

    def learn(self, now_s: float) -> None:
        """Takes in how long those have waited that have not come back; now and then is enough."""
        live = np.nonzero(self._run >= 0)[0]
        ages = now_s - self._since_s[live]
        told = self._told_s[live]
        ages = np.maximum(told, ages)
        self.returns.waited_all(self._classes, self._class[live], told, ages)
        self._told_s[live] = ages

    @property
    def n_branches(self) -> int:
        """Branches that are known."""
        return len(self._branch_at)

    def _sends(self, agent: str, branch: int) -> None:
        before = self._branch_of.get(agent, branch)
        if before != branch and self._agent[before] == agent:
            self._settle(before, OVER)
        other = self._agent[branch]
        if other is not None and other != agent and self._branch_of.get(other) == branch:
            del self._branch_of[other]  # it is the new one's now
        self._branch_of[agent], self._agent[branch] = branch, agent

    # -- inside ------------------------------------------------------------------------------

    def _make_tables(self) -> None:
        """What each class is worth by age: those anew that have seen enough since."""
        while len(self._tables) < len(self._classes):
            self._tables = np.concatenate([self._tables, np.zeros_like(self._tables)])
        for of in [one for one in self.returns.stale if one in self._number_of]:
            number, worth = self._number_of[of], self.returns.worth(of)
            self._tables[number] = 0.0 if self._over[number] else worth
        self.returns.stale.clear()

    def _tell(self, branch: int, now_s: float) -> None:
        age, told = now_s - float(self._since_s[branch]), float(self._told_s[branch])
        self.returns.waited(self._classes[self._class[branch]], told, max(age, told))
        self._told_s[branch] = max(age, told)

    def _back(self, branch: int, now_s: float) -> None:
        """Its next prompt is here."""
        if self._kind[branch] == BACK:  # the wait was over before
            self._returned(branch, now_s)
            self._kind[branch] = self._before.pop(branch, UNKNOWN)
            return
        self._came_back(branch, now_s)
        if self._kind[branch] == OVER:
            self._kind[branch] = UNKNOWN

    def _came_back(self, branch: int, now_s: float) -> None:
        """A wait of its usual ones is over."""
        self._returned(branch, now_s)
        pace = math.log2(now_s - float(self._since_s[branch]) + 0.5)
        usual = self._pace[branch] if self._times[branch] else pace
        self._pace[branch] = (1 - NEWEST) * usual + NEWEST * pace
        self._times[branch] += 1

    def _returned(self, branch: int, now_s: float) -> None:
        of, age_s = self._classes[self._class[branch]], now_s - float(self._since_s[branch])
        self.returns.waited(of, float(self._told_s[branch]), age_s)
        self.returns.returned(of, age_s)

    def _settle(self, branch: int, kind: str) -> None:
        self._kind[branch] = kind
        of = self.returns.settle(self._class_of(branch, kind))
        if of not in self._number_of:
            self.returns.stale.add(of)
            self._number_of[of] = len(self._classes)
            self._classes.append(of)
            self._over.append(kind == OVER)
        self._class[branch] = self._number_of[of]

    def _class_of(self, branch: int, kind: str) -> Class:
        """A tool's name, or that it is a person, says more than the branch's waits for others; what
        is known of all tools is lent to one not seen before."""
        family = kind.partition(":")[0]
        if family != kind or kind == "user":
            return (family, kind) if family != kind else (kind,)
        times = self._times[branch]
        pace = min(PACES, max(0, round(self._pace[branch]))) if times else -1
        return (kind, min(times, 2), pace)

    def _new(self, now_s: float) -> int:
        if len(self._branch_at) >= MOST_BRANCHES:
            oldest = int(np.where(self._run >= 0, self._since_s, np.inf).argmin())
            self._tell(oldest, now_s)
            self.forget(int(self._run[oldest]))
        if not self._free:
            n = len(self._run)
            for name in ("_run", "_since_s", "_told_s", "_class"):
                old = getattr(self, name)
                grown = np.zeros(2 * n, old.dtype) if name != "_run" else np.full(2 * n, -1)
                grown[:n] = old
                setattr(self, name, grown)
            self._pace += [0.0] * n
            self._times += [0] * n
            self._kind += [UNKNOWN] * n
            self._agent += [None] * n
            self._free = list(range(2 * n - 1, n - 1, -1))
        return self._free.pop()
