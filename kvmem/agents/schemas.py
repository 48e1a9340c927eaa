"""JSON schemas of Python types, and answers and arguments held against them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from kvmem.errors import ConfigError

__all__ = ["check_schema", "fault_of", "inlined", "schema_of"]


def schema_of(kind: Any) -> dict[str, Any]:
    """The schema of a type that msgspec knows (a Struct, a dataclass, list[int], ...), or the
    mapping itself where it is a schema already; without references.

    Raises:
        ConfigError: msgspec has no schema of it, or it contains itself.
    """
    if isinstance(kind, Mapping):
        return inlined(kind)
    try:
        return inlined(msgspec.json.schema(kind))
    except (TypeError, NameError) as error:
        raise ConfigError(
            f"{kind!r} has no JSON schema: {error}",
            next_step="Give a msgspec.Struct, a dataclass, a type of these, or a schema.",
            setting="schema",
        ) from error


def inlined(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with each reference to its own `$defs` put in place: it can then stand anywhere.

    Raises:
        ConfigError: a reference leads into itself, or elsewhere.
    """
    kept: Mapping[str, Any] = schema.get("$defs") or {}

    def put(value: Any, open_names: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            ref = value.get("$ref")
            if isinstance(ref, str):
                name = ref.removeprefix("#/$defs/")
                if name in open_names or name not in kept:
                    raise ConfigError(
                        f"The schema's reference {ref} leads into itself or to nothing",
                        next_step="Give a schema that is a tree: no type may contain itself.",
                        setting="schema",
                    )
                rest = {k: v for k, v in value.items() if k != "$ref"}
                return {**put(kept[name], (*open_names, name)), **put(rest, open_names)}
            return {k: put(v, open_names) for k, v in value.items() if k != "$defs"}
        if isinstance(value, list):
            return [put(item, open_names) for item in value]
        return value

    return dict(put(schema, ()))


def check_schema(schema: Mapping[str, Any], what: str) -> None:
    """Whether it is a JSON Schema at all.

    Raises:
        ConfigError: it is not, or jsonschema is not installed.
    """
    jsonschema = _jsonschema()
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ConfigError(
            f"The schema of {what} is none: {error.json_path}: {error.message}",
            next_step="See https://json-schema.org/draft/2020-12.",
            setting="schema",
        ) from error


def fault_of(value: Any, schema: Mapping[str, Any]) -> str:
    """Where and why a value does not fit a schema; empty where it fits."""
    jsonschema = _jsonschema()
    found = jsonschema.exceptions.best_match(
        jsonschema.Draft202012Validator(schema).iter_errors(value)
    )
    return f"{found.json_path}: {found.message}" if found is not None else ""


def _jsonschema() -> Any:
    try:
        import jsonschema
    except ModuleNotFoundError as error:
        raise ConfigError(
            "Schemas are checked by jsonschema, which is not installed",
            next_step="Run `pip install 'kvmem[agents]'`.",
        ) from error
    return jsonschema
