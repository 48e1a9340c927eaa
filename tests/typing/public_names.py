"""The public names: what each module lists in `__all__`, read without importing the module.

`python -m tests.typing.public_names` writes them to public_names.txt.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("public_names.txt")


def public_modules(root: Path = ROOT) -> Iterator[tuple[str, ast.Module]]:
    """Each public module of kvmem, in order: its name and its syntax tree."""
    for path in sorted((root / "kvmem").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not any(part.startswith("_") for part in parts):
            yield ".".join(parts), ast.parse(path.read_text(), filename=str(path))


def listed(tree: ast.Module) -> list[str] | None:
    """What the module's `__all__` holds, as written; None where there is none."""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign):
            targets, value = [node.target], node.value
        elif isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        else:
            continue
        if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets) and value:
            return [str(name) for name in ast.literal_eval(value)]
    return None


def defined(tree: ast.Module) -> set[str]:
    """The names without a leading underscore that the module makes at its top level."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(t.id for t in targets if isinstance(t, ast.Name))
    return {name for name in names if not name.startswith("_")}


def table(root: Path = ROOT) -> str:
    """One line a module, `module: name name ...`; modules that list nothing are left out."""
    rows = [(name, listed(tree)) for name, tree in public_modules(root)]
    return "".join(f"{name}: {' '.join(names)}\n" for name, names in rows if names)


if __name__ == "__main__":
    GOLDEN.write_text(table())
