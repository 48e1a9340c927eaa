"""Every way in which vLLM keeps KV, on tiny models: right, refused with a reason, or not vLLM's.

The models and cells are the engine matrix's (benchmarks/bench_matrix.py has many more).
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from benchmarks._matrix import Setup
from benchmarks._matrix_host import Host
from benchmarks._matrix_setups import MODELS, SETUPS

pytestmark = pytest.mark.engine
CELLS = ("hit", "reply", "shared")
OF_MODELS = {setup.name: setup for setup in SETUPS if setup.name in MODELS}


def of_model(name: str, cells: tuple[str, ...] = CELLS) -> Setup:
    return msgspec.structs.replace(OF_MODELS[name], cells=cells)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with Host(tmp_path_factory.mktemp("models")) as host:
        yield host


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_right_or_refused_with_a_reason(host: Host, name: str) -> None:
    model = MODELS[name]
    host.make([OF_MODELS[name].model])
    outcomes = host.run(of_model(name))
    assert len(outcomes) == len(CELLS)
    for outcome in outcomes:
        assert outcome.verdict == model.here(), outcome
        if outcome.verdict == "right":
            assert "from host" in outcome.detail
        else:
            assert model.why in outcome.detail


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2", "llama4"])
def test_blocks_of_zeros_would_not_pass_for_right(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    with Host(tmp_path_factory.mktemp("broken"), broken=True) as host:
        host.make([OF_MODELS[name].model])
        (outcome,) = host.run(of_model(name, ("hit",)))
    assert outcome.verdict == "wrong"
    assert "differ" in outcome.detail
