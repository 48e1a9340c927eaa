"""Reports as SARIF 2.1.0 (OASIS, sections 3.13 to 3.27), which code hosts show beside a change."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from kvmem.explain.lint.rules import RULES
from kvmem.explain.lint.values import Break, Fault, FileReport

__all__ = ["sarif"]

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_INDEX = {rule.id: i for i, rule in enumerate(RULES)}


def sarif(reports: list[FileReport], version: str) -> dict[str, Any]:
    """One run with every break as a result; places that could not be read are notifications.

    Args:
        reports: of the files.
        version: of kvmem.
    """
    faults = [fault for report in reports for fault in report.faults]
    invocation: dict[str, Any] = {"executionSuccessful": not faults}
    if faults:
        invocation["toolExecutionNotifications"] = [_notification(fault) for fault in faults]
    driver = {
        "name": "kvmem lint",
        "semanticVersion": version,
        "rules": [
            {
                "id": rule.id,
                "name": rule.name,
                "shortDescription": {"text": rule.name},
                "fullDescription": {"text": rule.what},
                "help": {"text": rule.fix},
                "defaultConfiguration": {"level": "warning"},
            }
            for rule in RULES
        ],
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [invocation],
        "columnKind": "unicodeCodePoints",
        "results": [_result(found) for report in reports for found in report.breaks],
    }
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def _result(found: Break) -> dict[str, Any]:
    where = f"message {found.message}" if found.message is not None else found.part
    text = (
        f"{found.name}: turn {found.turn} of {found.session}/{found.agent} differs from the turn "
        f"before at {where}, {found.unit} {found.at}; {found.lost_tokens} tokens to compute again. "
        f"{found.fix}"
    )
    logical = f"{found.session}/{found.agent}/{found.turn}"
    return {
        "ruleId": found.rule,
        "ruleIndex": _INDEX[found.rule],
        "level": "warning",
        "message": {"text": text},
        "locations": [
            {
                **_physical(found.path, found.line),
                "logicalLocations": [{"fullyQualifiedName": logical, "kind": "object"}],
            }
        ],
        "partialFingerprints": {"kvmemBreak/v1": f"{logical}/{found.rule}/{found.at}"},
        "properties": {
            "turn": found.turn,
            "part": found.part,
            "message": found.message,
            "at": found.at,
            "unit": found.unit,
            "lostTokens": found.lost_tokens,
        },
    }


def _notification(fault: Fault) -> dict[str, Any]:
    return {
        "level": "error",
        "message": {"text": f"{fault.reason}. {fault.next_step}"},
        "locations": [_physical(fault.path, fault.line)],
    }


def _physical(path: str, line: int) -> dict[str, Any]:
    return {
        "physicalLocation": {
            "artifactLocation": {"uri": quote(path)},
            "region": {"startLine": line},
        }
    }
