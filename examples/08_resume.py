"""A team that outlives its process: a later one resumes it, and nothing is computed again."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from kvmem.agents import sync

ROLES = {"lead": "You lead. Answer in one short sentence.", "critic": "You look for what is wrong."}
url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000")
fields = {"temperature": 0}


def begin(folder: Path) -> None:
    """The first process: two turns, then it ends."""
    with sync.Runtime(url, max_tokens=32, fields=fields) as runtime:
        team = runtime.team("journey", system="You plan a long journey by sea. " * 30)
        for name, role in ROLES.items():
            team.agent(name, role=role)
        team.tell("Where do we go?")
        for name in ROLES:
            print(team.turn(name))
        team.save(folder)


def go_on(folder: Path) -> None:
    """A later one."""
    with sync.Runtime(url, max_tokens=32, fields=fields) as runtime:
        team = runtime.resume(folder)
        team.tell("When do we go?")
        used = team.turn("lead").usage
        print(f"resumed: {used.cached_tokens:,} of {used.prompt_tokens:,} prompt tokens were there")


if len(sys.argv) > 2:
    {"begin": begin, "go_on": go_on}[sys.argv[1]](Path(sys.argv[2]))
else:
    with tempfile.TemporaryDirectory() as name:
        for part in ("begin", "go_on"):
            subprocess.run([sys.executable, __file__, part, name], check=True)
