"""Settings: an unknown or malformed one stops the start and says what to do."""

from __future__ import annotations

import msgspec
import pytest

from kvmem.config import Config, describe
from kvmem.errors import ConfigError


def test_every_setting_is_documented_once() -> None:
    assert [s.name for s in describe()] == [f.name for f in msgspec.structs.fields(Config)]
    assert all(s.unit and s.reason and s.cost for s in describe())


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"no setting 'host_gbs'. Did you mean 'host_gb'"
    ) as error:
        Config.parse({"host_gbs": 2})
    assert error.value.setting == "host_gbs"


def test_an_unknown_setting_unlike_any_lists_all() -> None:
    with pytest.raises(ConfigError, match=r"Known: approximate_salt, .*weights_digest"):
        Config.parse({"zzz": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host_gb", 0),
        ("host_gb", -1),
        ("host_gb", "4"),
        ("arena", "../etc"),
        ("arena", ""),
        ("eviction", "fifo"),
        ("load", "yes"),
        ("verify_share", 1.5),
        ("copy_threads", -1),
        ("weights_digest", "abc"),
        ("throttle_gb_s", -1),
    ],
)
def test_a_malformed_value_names_the_setting(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name) as error:
        Config.parse({name: value})
    assert error.value.setting == name


def test_host_bytes_are_of_binary_gigabytes() -> None:
    assert Config.parse({"host_gb": 1.5}).host_bytes == 3 * 2**29
