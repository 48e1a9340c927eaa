"""Does the likelihood of the right answer tell which agent and step failed a real group chat?

Who&When's algorithm-generated runs (`whowhen_groupchat`, with labels beside it): after each message
SmolLM2-135M is asked the task anew, and the step after which the right answer lost most is blamed.
Beside it chance and the last step. A 135M model that could not solve the task itself is asked what
a step did to its answer: expect little.

    python -m benchmarks.bench_whowhen [--short] [--data FOLDER] [--sessions 126] [--chars 600]
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from benchmarks._report import finish
from benchmarks.bench_blame import engine

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
NOT_HERE = 2


class Run(msgspec.Struct, frozen=True):
    """One failed run: who said what, and where the labels say that it went wrong."""

    session: str
    said: list[str]
    question: str
    right: str
    agent: str
    step: int

    @property
    def agents(self) -> list[str]:
        """Of each step; its text begins with the name."""
        return [text.partition(":")[0] for text in self.said]


def runs(folder: Path) -> Iterator[Run]:
    """All runs of the set, the longest prompt of each and its reply."""
    labels = json.loads((folder / "whowhen_labels.json").read_text(encoding="utf-8"))["sessions"]
    said: dict[str, list[str]] = {}
    kept: dict[int, list[Any]] = {}
    with gzip.open(folder / "whowhen_groupchat.jsonl.gz", "rt", encoding="utf-8") as lines:
        next(lines)  # the header
        for line in lines:
            row = json.loads(line)
            before = kept[row["base"]][: row["keep"]] if row["base"] is not None else []
            kept[row["id"]] = before + row["messages"]
            output = [row["output"]] if row["output"] else []
            told = [str(m["content"]) for m in [*kept[row["id"]][1:], *output]]
            if len(told) > len(said.get(row["session"], [])):
                said[row["session"]] = told
    for session, told in said.items():
        label = labels[session]
        step = int(label["mistake_step"])
        if 0 <= step < len(told):
            yield Run(
                session, told, label["question"], str(label["ground_truth"]),
                label["mistake_agent"], step,
            )  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="six runs")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sessions", type=int, default=0, help="the first so many; 0 is all")
    parser.add_argument("--chars", type=int, default=600, help="of a message; the rest is cut off")
    options = parser.parse_args()
    if not (options.data / "whowhen_groupchat.jsonl.gz").exists():
        print(f"whowhen_groupchat is not in {options.data}: give its folder with --data")
        raise SystemExit(NOT_HERE)
    from kvmem.blame.steps import steps_of

    chosen = list(runs(options.data))
    chosen = chosen[: options.sessions or (6 if options.short else len(chosen))]
    renderer, scorer, _ = engine(max_tokens=8192)
    counts = dict.fromkeys(("step", "agent", "last_step", "last_agent"), 0)
    chance = {"step": 0.0, "agent": 0.0}
    replayed = cached = 0
    for number, one in enumerate(chosen):
        messages = [{"role": "user", "content": text[: options.chars]} for text in one.said]
        found = steps_of(messages, one.question, one.right, renderer, scorer)
        blamed = found.blamed if found.blamed is not None else len(messages) - 1
        agents = one.agents
        counts["step"] += blamed == one.step
        counts["agent"] += agents[blamed] == one.agent
        counts["last_step"] += len(messages) - 1 == one.step
        counts["last_agent"] += agents[-1] == one.agent
        chance["step"] += 1 / len(messages)
        chance["agent"] += agents.count(one.agent) / len(agents)
        replayed += found.prompt_tokens
        cached += found.cached_tokens
        print(f"{number + 1}/{len(chosen)} {one.session}: step {blamed}, labelled {one.step}",
              flush=True)  # fmt: skip
    n = len(chosen)
    finish(
        {
            "step_accuracy": counts["step"] / n,
            "agent_accuracy": counts["agent"] / n,
            "step_accuracy_random": chance["step"] / n,
            "agent_accuracy_random": chance["agent"] / n,
            "step_accuracy_last": counts["last_step"] / n,
            "agent_accuracy_last": counts["last_agent"] / n,
            "runs": n,
            "chars": options.chars,
            "tokens_replayed": replayed,
            "cached_share": cached / replayed,
        }
    )


if __name__ == "__main__":
    main()
