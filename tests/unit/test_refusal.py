"""What an engine's process refuses reaches `kvmem serve`, whole and once; what vLLM says is cut."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kvmem.engines.vllm import refusal, serve
from kvmem.errors import ArenaInUse, ConfigError

ROOT = Path(__file__).resolve().parents[2]


def refuse(error: Exception) -> None:
    with pytest.raises(type(error)), refusal.reported():
        raise error


def test_a_child_leaves_its_refusal_for_its_parent() -> None:
    program = (
        "from kvmem.engines.vllm.refusal import reported\n"
        "from kvmem.errors import ConfigError\n"
        "with reported():\n    raise ConfigError('no', next_step='Say\\nyes.')\n"
    )
    with refusal.collected() as folder:
        assert refusal.told(folder) is None
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True)
        assert refusal.told(folder) == "no. Say yes."


def test_the_first_refusal_stays() -> None:
    with refusal.collected() as folder:
        refuse(ConfigError("the cause"))
        refuse(ArenaInUse("what followed"))
        assert refusal.told(folder) == "the cause"


def test_other_errors_are_not_kvmems_refusal() -> None:
    with refusal.collected() as folder:
        refuse(ValueError("a bug"))
        assert refusal.told(folder) is None


def test_message_is_private_and_gone_with_the_block() -> None:
    with refusal.collected() as folder:
        refuse(ConfigError("secret"))
        modes = {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()}
        assert (stat.S_IMODE(folder.stat().st_mode), modes) == (0o700, {0o600})
    assert not folder.exists()
    assert refusal.VARIABLE not in os.environ


def test_without_kvmem_serve_nothing_is_written() -> None:
    assert refusal.VARIABLE not in os.environ
    refuse(ConfigError("told by the log alone"))


def test_a_folder_that_is_gone_hides_no_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(refusal.VARIABLE, str(tmp_path / "gone"))
    refuse(ConfigError("still raised"))


class Validation(ValueError):
    """As pydantic's ValidationError: a count first, the reasons in a method."""

    def errors(self) -> list[dict[str, str]]:
        return [{"msg": "Value error, no such architecture\nmore"}]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  first\nsecond"), "first"),
        (Validation("1 validation error for ModelConfig"), "no such architecture"),
        (ValueError("One. " + "Two " * 100), "One"),
        (ValueError("x" * 300), "x" * serve.LINE_CHARACTERS + "..."),
        (AssertionError(), "AssertionError"),
    ],
)
def test_of_vllms_errors_the_first_line_is_told(error: Exception, line: str) -> None:
    assert serve.first_line(error) == line


def test_a_port_in_use_names_the_flag() -> None:
    told = serve._failure(OSError(errno.EADDRINUSE, "Address already in use"))
    assert "--port" in told


def test_multiprocessing_tidies_up_before_the_last_line() -> None:
    # What is registered with atexit before multiprocessing is imported runs after it.
    probe = "import sys, kvmem.engines.vllm.serve; print('multiprocessing.util' in sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert told == "False\n"
