"""A research team on a vLLM server: one lead, a fan-out that computes its prefix once, a join."""

import os
from typing import Annotated

from msgspec import Meta, Struct

from kvmem.agents import sync, tool

CHAPTERS = {
    "sea": "The sea is calm in May. Ships need two days to the islands.",
    "hills": "The hills are dry from June on. Wells are marked on the map.",
    "town": "The town has a market on Fridays. Rooms are full in August.",
}


class Finding(Struct):
    """What a worker reports; its answer is held to this while it is sampled."""

    month: Annotated[str, Meta(max_length=12)]
    trust: Annotated[int, Meta(ge=0, le=9)]


@tool
def read_chapter(name: Annotated[str, Meta(max_length=8)]) -> str:
    """Reads a chapter of the guide: sea, hills or town."""
    return CHAPTERS.get(name, "There is no such chapter.")


url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000")
system = "You are one of a team that plans a journey. Answer in one short sentence. " * 10
with sync.Runtime(url, max_tokens=48, fields={"temperature": 0}, tell=print) as runtime:
    lead = runtime.session("lead", system=system, tools=[read_chapter])
    print(lead.run("Read the chapter about the sea, then plan the journey.", mode="required"))

    # Every worker has all of the lead's past; each computes its own task alone.
    tasks = [f"When is the best month for the {name}? {text}" for name, text in CHAPTERS.items()]
    found = lead.map(tasks, schema=Finding, max_tokens=128)
    for task, result in zip(CHAPTERS, found, strict=True):
        print(f"{task}: {result.value}")
    print(found)

    lead.join(found)
    print(lead.step("Which month do we take?", mode="none"))
    print(lead)
