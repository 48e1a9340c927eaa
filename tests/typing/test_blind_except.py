"""A blind `except` stands only where a comment on its line says why, and never in silence."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLIND = {"Exception", "BaseException"}


def caught(handler: ast.ExceptHandler) -> set[str]:
    """The names a handler catches; a bare `except:` catches BaseException."""
    if handler.type is None:
        return {"BaseException"}
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {kind.id for kind in kinds if isinstance(kind, ast.Name)}


def unexplained(source: str) -> list[int]:
    """The lines of blind handlers that give no reason, or that do nothing with the exception."""
    lines = source.splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler) and caught(node) & BLIND:
            comment = lines[node.lineno - 1].partition("#")[2]
            reason = comment.replace("noqa: BLE001", "").replace("noqa: S110", "").strip()
            if isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None:
                continue  # cleans up and raises it again
            silent = all(isinstance(step, ast.Pass | ast.Continue) for step in node.body)
            if len(reason) < 10 or silent:
                found.append(node.lineno)
    return found


def test_every_blind_except_says_why() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / "kvmem").rglob("*.py"))
        for line in unexplained(path.read_text())
    ]
    assert found == [], "say on the line which door this is, and emit an event there"


@pytest.mark.parametrize(
    "handler",
    [
        "except Exception:\n    print()",
        "except:\n    print()",
        "except (ValueError, BaseException) as error:\n    print(error)",
        "except Exception:  # noqa: BLE001\n    print()",
        "except Exception:  # a door of the engine's own\n    pass",
    ],
)
def test_blind_except_without_reason_is_seen(handler: str) -> None:
    assert unexplained(f"try:\n    work()\n{handler}\n") == [3]


def test_except_that_raises_again_is_allowed() -> None:
    assert unexplained("try:\n    work()\nexcept BaseException:\n    clean()\n    raise\n") == []


def test_blind_except_with_reason_is_allowed() -> None:
    handler = "except Exception:  # I9: a hook of the engine must not raise\n    log()"
    assert unexplained(f"try:\n    work()\n{handler}\n") == []
