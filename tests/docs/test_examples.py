"""README's Python blocks are the files in examples/, and they run."""

from __future__ import annotations

import ast
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs import blocks

ROOT = blocks.ROOT
IN_README = {m["path"]: m["code"] for m in blocks.EXAMPLE.finditer(blocks.README.read_text())}
KVMEM = Path(sys.executable).with_name("kvmem")


def run(path: str, **environment: str) -> list[str]:
    """The lines that an example prints."""
    done = subprocess.run(
        [sys.executable, str(ROOT / path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def tokens(line: str) -> dict[str, int]:
    """The dict that a line holds."""
    found = re.search(r"\{.*?\}", line)
    assert found, line
    return dict(ast.literal_eval(found[0]))


def test_every_example_stands_in_readme_or_is_told_of_in_a_document() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").glob("*.py")}
    assert set(IN_README) <= files
    told = set().union(*(blocks.named_paths(page.read_text()) for page in blocks.DOCUMENTS))
    assert files - set(IN_README) <= told
    assert blocks.README.read_text().count("```python") == len(IN_README)


@pytest.mark.parametrize("path", IN_README)
def test_readme_block_is_the_file(path: str) -> None:
    assert IN_README[path] == (ROOT / path).read_text()


def test_keys_and_cache_run_without_an_engine() -> None:
    lines = run("examples/01_offline.py")
    assert lines == ["32 of 64 tokens are here; the next block is missing because it is new"]


@pytest.mark.engine
@pytest.mark.slow
def test_engine_example_loads_what_it_stored(smollm2: str) -> None:
    lines = run("examples/02_engine.py", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")
    first, again, no_load = (tokens(line) for line in lines if "{'prompt'" in line)
    assert first["host"] == 0
    assert again["host"] > 0
    assert again["host"] + again["computed"] == first["computed"]
    assert no_load == first


@pytest.mark.engine
@pytest.mark.slow
def test_transformers_example_restores_what_it_kept(smollm2: str) -> None:
    first, again, other = (
        line for line in run("examples/04_transformers.py") if "restored" in line
    )
    assert first.startswith("0 of ")
    restored = [int(line.split(" of ")[0].replace(",", "")) for line in (again, other)]
    prompts = [int(line.split(" of ")[1].split()[0].replace(",", "")) for line in (again, other)]
    assert restored[0] == (prompts[0] - 1) // 16 * 16
    assert restored[0] >= restored[1] > prompts[1] - 32


@pytest.mark.engine
@pytest.mark.slow
def test_ledger_example_restores_all_of_the_last_turn(smollm2: str) -> None:
    lines = run("examples/05_ledger.py")
    told = [re.findall(r"[\d,]+", line)[:2] for line in lines if "restored" in line]
    restored, asked = zip(*([int(n.replace(",", "")) for n in pair] for pair in told), strict=True)
    assert restored[0] == 0
    for before, after in zip(asked, restored[1:], strict=False):
        assert after >= before // 16 * 16  # the last prompt, and what of its answer fills blocks
    assert re.search(r"<Ledger planner: [\d,]+ tokens, 6 messages>", lines[-2])
    assert "stay cached" in lines[-1]


@pytest.fixture(scope="module")
def server(smollm2: str) -> Iterator[str]:
    """The address of a `kvmem serve` that runs as README starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--port", str(port), "--max-model-len", "2048", "--block-size", "32"]
    flags += ["--enforce-eager", "--enable-prompt-tokens-details"]
    with subprocess.Popen(
        [str(KVMEM), "serve", smollm2, "--kvmem-host-gb", "0.5", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "Application startup complete" in line:
                break
        else:
            pytest.fail("".join(said[-40:]))
        yield f"http://127.0.0.1:{port}/v1"
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.engine
@pytest.mark.slow
def test_client_example_gets_its_receipt_and_stats_show_it(server: str) -> None:
    environment = {"OPENAI_BASE_URL": server, "OPENAI_API_KEY": "none"}
    first, again = (run("examples/03_client.py", **environment)[-1] for _ in range(2))
    assert tokens(first)["computed"] == tokens(first)["prompt"]
    assert tokens(again)["device"] + tokens(again)["host"] > 0
    stats = subprocess.run([str(KVMEM), "stats"], capture_output=True, text=True)
    assert stats.returncode == 0, stats.stderr
    assert "SmolLM2-135M-Instruct" in stats.stdout


@pytest.mark.engine
@pytest.mark.slow
def test_team_example_computes_its_prefix_once(server: str) -> None:
    lines = run("examples/06_team.py", OPENAI_BASE_URL=server)
    findings = [line for line in lines if "Finding(month=" in line]
    assert [line.split(":")[0] for line in findings] == ["sea", "hills", "town"]
    (told,) = (line for line in lines if line.startswith("lead maps by prefix: 3 children"))
    (spread,) = (line for line in lines if line.startswith("<Fanout 3 children"))
    prompt, reused = (int(n.replace(",", "")) for n in re.findall(r"[\d,]{3,}", spread)[:2])
    assert told
    # The first child's figure is not told without --enable-prompt-tokens-details where it streams.
    assert reused >= prompt * 0.6
    assert re.match(r"<Session lead: [\d,]+ tokens, 3 turns, \d\d% reused>", lines[-1])


@pytest.mark.engine
@pytest.mark.slow
def test_coding_example_keeps_long_results_out_of_the_prompt(server: str) -> None:
    *_, kept, told = run("examples/07_coding.py", OPENAI_BASE_URL=server)
    n_bytes, n_tokens = (int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", kept))
    assert n_bytes > 20_000 > 10 * n_tokens
    assert re.match(r"<Session coder: [\d,]+ tokens, \d turns, \d+% reused>", told)


@pytest.mark.engine
@pytest.mark.slow
def test_resume_example_finds_what_its_first_process_computed(server: str) -> None:
    last = run("examples/08_resume.py", OPENAI_BASE_URL=server)[-1]
    there, prompt = (int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", last))
    # New are what the others said, the question, and at most a block's end.
    assert 0 <= prompt - there < 3 * 32
    assert there % 32 == 0


@pytest.mark.engine
@pytest.mark.slow
def test_three_frameworks_share_one_prefix(server: str) -> None:
    python = ROOT / ".venv-frameworks/bin/python"
    if not python.exists() and not os.environ.get("KVMEM_REQUIRE_ENGINE"):
        pytest.skip("`make frameworks` makes the environment")
    with subprocess.Popen(
        [str(KVMEM), "gateway", "--upstream", server.removesuffix("/v1"), "--port", "0"],
        stdout=subprocess.PIPE, text=True,
    ) as gateway:  # fmt: skip
        assert gateway.stdout is not None
        url = gateway.stdout.readline().split()[-1]
        done = subprocess.run(
            [str(python), str(ROOT / "examples/09_frameworks.py")], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OPENAI_BASE_URL": f"{url}/v1"},
        )  # fmt: skip
        gateway.terminate()
    assert done.returncode == 0, done.stderr
    told = [re.findall(r"\d+", line.partition(":")[2]) for line in done.stdout.splitlines()]
    _, *later = [(int(cached), int(prompt)) for cached, prompt in told]
    assert len(later) == 2
    # Its own question is all that a framework adds to the instructions.
    for cached, prompt in later:
        assert cached > prompt * 0.8
