"""What the documents claim, taken out of their text so that tests can hold it against the tree.

`python -m tests.docs.blocks` writes the files of examples/ into README's blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "RESULTS.md"]
# A Python block stands under a comment that names its file.
EXAMPLE = re.compile(r"<!-- (?P<path>examples/\S+\.py) -->\n```python\n(?P<code>.*?)```", re.DOTALL)
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "kvmem", "requirements", "tests", "tools")


def code_spans(text: str) -> Iterator[str]:
    """The text in single backticks, and each line of indented and fenced blocks."""
    fenced = re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL)
    for block in fenced:
        yield from block.splitlines()
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    yield from re.findall(r"`([^`\n]+)`", rest)
    yield from (line.strip() for line in rest.splitlines() if line.startswith("    "))


def named_paths(text: str) -> set[str]:
    """Paths of this repository that the text names in code or as link targets."""
    spans = [*code_spans(text), *re.findall(r"\]\(([^)#\s]+)\)", text)]
    pattern = re.compile(rf"(?<![\w./-])(?:\.\./)?((?:{'|'.join(FOLDERS)})/[\w./-]*[\w/])")
    return {path for span in spans for path in pattern.findall(span)}


def make_targets(text: str) -> set[str]:
    """The make targets that the text names in code."""
    return {m for span in code_spans(text) for m in re.findall(r"\bmake ([a-z-]+)", span)}


def commands(text: str) -> set[str]:
    """The subcommands of `kvmem` that the text names in code."""
    spans = code_spans(text)
    return {
        m for span in spans for m in re.findall(r"(?m)^\s*(?:\S*/)?kvmem ([a-z]+)(?![\w.:])", span)
    }


def test_names(text: str) -> set[str]:
    """The tests that the text cites."""
    return {m for span in code_spans(text) for m in re.findall(r"\b(test_\w+)$", span)}


def readme_with_examples() -> str:
    """README with each Python block as its file has it."""

    def block(match: re.Match[str]) -> str:
        code = (ROOT / match["path"]).read_text()
        return f"<!-- {match['path']} -->\n```python\n{code}```"

    return EXAMPLE.sub(block, README.read_text())


if __name__ == "__main__":
    README.write_text(readme_with_examples())
