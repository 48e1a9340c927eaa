"""`kvmem serve` with bad input: one clear last line, exit code 2, nothing served, nothing left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvmem.demo.server import Server, free_port
from kvmem.engines.vllm import launch
from kvmem.store.arena import Arena
from tests.e2e.test_server import serve

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
SERVE = [sys.executable, "-m", "kvmem.cli", "serve"]
SMALL = ["--kvmem-host-gb", "0.1", "--max-model-len", "512", "--enforce-eager"]
SERVED = "Application startup complete"
GIB = 2**30


class Ran(msgspec.Struct):
    code: int
    out: str
    err: str


def run(command: list[str], **environ: str) -> Ran:
    ran = subprocess.run(
        [*command, "--port", str(free_port())],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **environ},
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr)


@pytest.fixture
def kvmem_serve(arena_name: str) -> Callable[..., Ran]:
    """Runs `kvmem serve` to its end; `arena_name` asserts that nothing is left in /dev/shm.

    By an arena name of its own, since other engines of this user come and go meanwhile.
    """

    def serve(*arguments: str, under: Sequence[str] = (), **environ: str) -> Ran:
        model, *flags = arguments
        named = ["--kvmem-arena", arena_name]
        return run([*under, *SERVE, model, *named, *flags], **environ)

    return serve


def assert_refused(ran: Ran, *parts: str) -> None:
    """Exit code 2, and the last line of stderr, alone of kvmem's, holds every part."""
    assert ran.code == 2, ran.err
    lines = ran.err.splitlines()
    assert [i for i, line in enumerate(lines) if line.startswith("kvmem: ")] == [len(lines) - 1], (
        ran.err
    )
    for part in parts:
        assert part in lines[-1]
    assert SERVED not in ran.out + ran.err


def checkpoint(folder: Path, like: str, **config: Any) -> str:
    """A folder with the real model's tokenizer and a changed configuration, but no weights."""
    folder.mkdir()
    for file in Path(like).iterdir():
        if file.suffix in {".json", ".jinja"}:
            shutil.copy(file, folder)
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**text, **config}))
    return str(folder)


# -- told before vLLM is imported -----------------------------------------------------------------


@pytest.mark.parametrize("model", ["/no/such/model", "./my-modle", "kvmem/my-modle"])
def test_wrong_path(kvmem_serve: Callable[..., Ran], model: str) -> None:
    assert_refused(kvmem_serve(model), f"no model folder {model}", "Check the path")


def test_unknown_setting(kvmem_serve: Callable[..., Ran], smollm2: str) -> None:
    ran = kvmem_serve(smollm2, "--kvmem-hots-gb", "1")
    assert_refused(ran, "no setting 'hots_gb'", "Did you mean 'host_gb'?")


def test_budget_above_the_memory(kvmem_serve: Callable[..., Ran], smollm2: str) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    ran = kvmem_serve(smollm2, "--kvmem-host-gb", str(memory // GIB + 1))
    assert_refused(ran, "'host_gb'", "are free", "Lower host_gb")


def test_budget_above_the_shared_memory(kvmem_serve: Callable[..., Ran], smollm2: str) -> None:
    # /dev/shm of 64 MiB, for this process alone.
    small = [
        *("unshare", "--map-root-user", "--mount", "sh", "-c"),
        'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"',
        "sh",
    ]
    if subprocess.run([*small, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("this machine lets nobody mount; test_capacity.py has the rule")
    ran = kvmem_serve(smollm2, "--kvmem-host-gb", "0.1", under=small)
    assert_refused(ran, "'host_gb'", "shared memory in /dev/shm, 0.06 GiB", "enlarge /dev/shm")


# -- told by vLLM's configuration, before an engine is started ------------------------------------


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (
            ["--speculative-config", '{"model": "a-draft", "num_speculative_tokens": 2}'],
            ["speculative decoding by a draft model", '"ngram"', "leave it out"],
        ),
        (["-pp", "2"], ["--pipeline-parallel-size 2", "Set --pipeline-parallel-size 1"]),
        (
            ["--prefix-caching-hash-algo", "xxhash"],
            ["--prefix-caching-hash-algo xxhash", "Set --prefix-caching-hash-algo sha256"],
        ),
        (["--no-such-flag"], ["vLLM refuses the flags", "--no-such-flag", "--help=all"]),
        (["--load-format", "dummy"], ["--load-format dummy", "'weights_digest'"]),
    ],
    ids=["speculative", "pipeline-parallel", "hash", "unknown-flag", "dummy-weights"],
)
def test_flag_that_is_refused(
    kvmem_serve: Callable[..., Ran], smollm2: str, flags: list[str], parts: list[str]
) -> None:
    ran = kvmem_serve(smollm2, *SMALL, *flags)
    assert_refused(ran, *parts)
    assert "Traceback" not in ran.err


def test_architecture_that_vllm_does_not_know(
    kvmem_serve: Callable[..., Ran], smollm2: str, tmp_path: Path
) -> None:
    model = checkpoint(tmp_path / "model", smollm2, architectures=["NobodyForCausalLM"])
    ran = kvmem_serve(model, *SMALL)
    assert_refused(ran, "vLLM refuses", model, "['NobodyForCausalLM'] are not supported", "MODEL")
    assert "Traceback" not in ran.err


def test_folder_without_weights(
    kvmem_serve: Callable[..., Ran], smollm2: str, tmp_path: Path
) -> None:
    model = checkpoint(tmp_path / "model", smollm2)
    assert_refused(kvmem_serve(model, *SMALL), "No weight file", model, "'weights_digest'")


# -- told by the engine's own processes -----------------------------------------------------------


def test_states_that_the_engine_keeps_at_no_boundary(
    kvmem_serve: Callable[..., Ran], smollm2: str, tmp_path: Path
) -> None:
    model = checkpoint(
        tmp_path / "model",
        smollm2,
        architectures=["Lfm2ForCausalLM"],
        model_type="lfm2",
        layer_types=["conv", "full_attention"],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        conv_dim=64,
        conv_L_cache=3,
        block_dim=64,
        block_ff_dim=128,
        block_auto_adjust_ff_dim=False,
    )
    dummy = ["--load-format", "dummy", "--kvmem-weights-digest", "0" * 64]
    ran = kvmem_serve(model, *SMALL, *dummy, "--no-enable-prefix-caching")
    assert_refused(ran, "states whose prefix caching is off", "Set --enable-prefix-caching")


def test_weights_that_vllm_cannot_load(
    kvmem_serve: Callable[..., Ran], smollm2: str, tmp_path: Path
) -> None:
    model = checkpoint(tmp_path / "model", smollm2)
    with (Path(smollm2) / "model.safetensors").open("rb") as whole:
        (tmp_path / "model" / "model.safetensors").write_bytes(whole.read(1 << 20))
    ran = kvmem_serve(model, *SMALL)
    assert_refused(ran, "vLLM ended with an error", "The first error in the log above")


@pytest.fixture(scope="module")
def server(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    name = f"bad-{os.getpid()}"
    with serve(smollm2, name, tmp_path_factory.mktemp("server") / "log") as server:
        yield server
        assert server._process is not None
        server._process.send_signal(signal.SIGTERM)
        assert server._process.wait(60) == 0  # as vLLM's own server ends
    assert not Arena.path_of(name).exists()


def test_second_engine_of_the_same_arena(
    kvmem_serve: Callable[..., Ran], smollm2: str, server: Server
) -> None:
    name = f"bad-{os.getpid()}"
    ran = kvmem_serve(smollm2, *SMALL, "--kvmem-arena", name)
    assert_refused(ran, "'arena'", name, "in use by the engine of process", "another name")
    assert Arena.path_of(name).exists()  # the first one's, which goes on


def test_second_engine_that_was_too_quick_to_be_seen(smollm2: str, server: Server) -> None:
    """The engine itself refuses the name: what `kvmem serve` looks at first is passed by."""
    name = f"bad-{os.getpid()}"
    flags = ["--max-model-len", "512", "--enforce-eager"]
    command = launch.command(smollm2, {"host_gb": 0.1, "arena": "another"}, flags)
    command = [part.replace('"another"', f'"{name}"') for part in command]
    ran = run(command)
    assert_refused(ran, "'arena'", name, "in use by the engine of process", "another name")
    assert "Traceback" in ran.err  # vLLM's, above the last line
    assert Arena.path_of(name).exists()


# -- one flag, without `kvmem serve` --------------------------------------------------------------


def test_vllms_own_server_ends_too_with_an_unknown_setting(smollm2: str, arena_name: str) -> None:
    transfer = launch.transfer_config({"hots_gb": 1, "arena": arena_name})
    ran = run(
        [
            *(sys.executable, "-m", launch.SERVER_MODULE, "--model", smollm2, "--enforce-eager"),
            *("--max-model-len", "512", "--kv-transfer-config", json.dumps(transfer)),
        ]
    )
    assert ran.code != 0
    assert "kvmem has no setting 'hots_gb'. Did you mean 'host_gb'?" in ran.out + ran.err
    assert SERVED not in ran.out + ran.err
