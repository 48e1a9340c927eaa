"""vLLM's OpenAI server with kvmem in it; `kvmem serve` becomes this process.

    python -m kvmem.engines.vllm.serve VLLM'S FLAGS, --kv-transfer-config AMONG THEM

It runs vLLM's own server module here, as `__main__`, so that vLLM starts its processes, takes
signals and ends as it does by itself. What this adds is one clear last line when there is nothing
to serve, and exit code 2:

- what vLLM's parsed configuration tells is checked before an engine is started
- what only the engine's processes could know, they leave for this one (`refusal`)
- kvmem's endpoint is allowed where vLLM's own choice of plug-ins can stay as it was
- what vLLM refuses, or fails at, is told in its own words, and that it was vLLM
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import os
import runpy
import select
import sys
import traceback
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from kvmem.config import Config
from kvmem.engines.vllm import refusal, support
from kvmem.engines.vllm.launch import SERVER_MODULE, allowed_plugins
from kvmem.engines.vllm.namespace import check_weights
from kvmem.errors import ConfigError, KVMemError, UnsupportedEngine
from kvmem.store import sweep

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["check", "first_line", "main"]

REFUSED = 2
SPAWNED_END_WITHIN_S = 10.0
LINE_CHARACTERS = 240


def main() -> None:
    """Runs vLLM's server with this process's arguments until it ends.

    Exit code 2 if the start was refused or failed; else vLLM's own.
    """
    last = _Last()
    # Registered before multiprocessing is imported, so it runs after that has tidied up.
    atexit.register(last)
    plugins = allowed_plugins(os.environ)
    if plugins is not None:
        os.environ["VLLM_PLUGINS"] = plugins  # before vLLM looks, here and in its processes
    with refusal.collected() as folder:
        try:
            check(sys.argv[1:])
            # Spawned children find vLLM's module as their main one, as if it had been started.
            runpy.run_module(SERVER_MODULE, run_name="__main__", alter_sys=True)
        except KVMemError as error:
            last.message = str(error)
        except Exception as error:  # noqa: BLE001 the top of the process: it ends, told
            last.message = refusal.told(folder)
            if last.message is None:
                traceback.print_exc()
                last.message = _failure(error)
    if last.message is not None:
        sys.exit(REFUSED)


class _Last:
    """What this process does last, after all that vLLM has to say and to clean up."""

    def __init__(self) -> None:
        self.message: str | None = None

    def __call__(self) -> None:
        """Removes the name of an engine that was killed; says `message`, if there is one."""
        if self.message is not None:
            _wait_for_spawned()
        sweep()
        if self.message is not None:
            sys.stdout.flush()
            print(f"kvmem: {' '.join(self.message.split())}", file=sys.stderr, flush=True)


def _wait_for_spawned() -> None:
    """Waits until what vLLM started has ended, so that it leaves nothing and says nothing later.

    Every spawned process holds the pipe of multiprocessing's resource tracker, which ends with the
    last of them, removes their shared memory and warns of it. At most `SPAWNED_END_WITHIN_S`.
    """
    module = sys.modules.get("multiprocessing.resource_tracker")
    tracker = getattr(module, "_resource_tracker", None)
    fd, pid = getattr(tracker, "_fd", None), getattr(tracker, "_pid", None)
    if fd is None or pid is None:
        return
    vars(tracker).update(_fd=None, _pid=None)  # it has nothing left to end when Python does
    os.close(fd)
    with contextlib.suppress(ChildProcessError, ProcessLookupError):
        ended = os.pidfd_open(pid)
        try:
            select.select([ended], [], [], SPAWNED_END_WITHIN_S)
        finally:
            os.close(ended)
        os.waitpid(pid, os.WNOHANG)


def check(flags: Sequence[str]) -> None:
    """Refuses what can be told from vLLM's flags and the model's configuration.

    Cost: two seconds beyond the imports, which the server saves when it does the same again.

    Raises:
        ConfigError: vLLM does not take the flags, or the weights can't be told apart.
        UnsupportedEngine: vLLM refuses the model, or kvmem does not serve one of the features.
    """
    # vLLM says all of this again when it starts; only what is worth a warning is said now.
    logging.disable(logging.INFO)
    try:
        arguments = _parsed(flags)
        support.check_flags(arguments)
        config = _configuration(arguments)
        transfer = config.kv_transfer_config
        assert transfer is not None  # `kvmem serve` gives it
        support.check_engine(config)
        check_weights(Config.parse(transfer.kv_connector_extra_config), config)
    finally:
        logging.disable(logging.NOTSET)


def _parsed(flags: Sequence[str]) -> Namespace:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.cli_args import (
            make_arg_parser,
            validate_parsed_serve_args,
        )
    except ImportError:  # from 0.33 on
        from vllm.entrypoints.common.cli_args import (  # type: ignore[no-redef]
            make_arg_parser,
            validate_parsed_serve_args,
        )

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise _refused_flags(message)

    arguments = Namespace()
    make_arg_parser(Parser()).parse_args(list(flags), arguments)
    try:
        validate_parsed_serve_args(arguments)
    except (TypeError, ValueError) as error:
        raise _refused_flags(first_line(error)) from error
    return arguments


def _refused_flags(what: str) -> ConfigError:
    return ConfigError(
        f"vLLM refuses the flags: {what}",
        next_step=f"All of its flags: `{sys.executable} -m {SERVER_MODULE} --help=all`.",
    )


def _configuration(arguments: Namespace) -> VllmConfig:
    from vllm.engine.arg_utils import AsyncEngineArgs

    try:
        return AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    except (
        AssertionError, ImportError, KeyError, NotImplementedError, OSError, RuntimeError,
        TypeError, ValueError,
    ) as error:  # fmt: skip
        raise UnsupportedEngine(
            f"vLLM refuses the model {arguments.model}, or a flag: {first_line(error)}",
            next_step="Change what it names, or give another MODEL; kvmem has no part in this.",
            model=arguments.model,
        ) from error


def first_line(error: BaseException) -> str:
    """What a user needs of an exception of vLLM's: its first line that says something, cut to
    whole sentences where it is long."""
    errors = getattr(error, "errors", None)
    if callable(errors):  # pydantic's ValidationError: its text begins with a count
        found: Any = errors()
        text = str(found[0]["msg"]).removeprefix("Value error, ") if found else str(error)
    else:
        text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    if len(line) <= LINE_CHARACTERS:
        return line
    sentences, dot, _ = line[:LINE_CHARACTERS].rpartition(". ")
    return sentences if dot else f"{line[:LINE_CHARACTERS]}..."


def _failure(error: Exception) -> str:
    line = first_line(error)
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"vLLM can't listen: {line}. Give another --port or --host."
    return (
        f"vLLM ended with an error: {line.partition('. ')[0].rstrip('.')}. "
        "The first error in the log above says why; kvmem refused nothing."
    )


if __name__ == "__main__":
    main()
