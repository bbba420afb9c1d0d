"""Variables of the environment that gloo and NCCL read are checked before they do."""

from __future__ import annotations

import socket

import pytest

from megavlm.parallel.environment import check_interfaces

THERE = [(1, "lo"), (2, "eth0"), (3, "eth1")]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have three interfaces, and no variable."""
    monkeypatch.setattr(socket, "if_nameindex", lambda: THERE)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(
    ("variable", "given"),
    [
        ("GLOO_SOCKET_IFNAME", ""),
        ("GLOO_SOCKET_IFNAME", "eth0"),
        ("GLOO_SOCKET_IFNAME", "eth1,lo,"),
        ("NCCL_SOCKET_IFNAME", ""),
        ("NCCL_SOCKET_IFNAME", "eth"),
        ("NCCL_SOCKET_IFNAME", "ib0,eth1"),
        ("NCCL_SOCKET_IFNAME", "=eth1"),
        ("NCCL_SOCKET_IFNAME", "=eth0:5,eth1:6"),
        ("NCCL_SOCKET_IFNAME", "^docker,lo"),
        ("NCCL_SOCKET_IFNAME", "^=lo"),
    ],
)
def test_interfaces_that_are_there_are_sound(
    monkeypatch: pytest.MonkeyPatch, variable: str, given: str
) -> None:
    monkeypatch.setenv(variable, given)
    check_interfaces(uses_nccl=True)


@pytest.mark.parametrize(
    ("variable", "given", "absent"),
    [
        ("GLOO_SOCKET_IFNAME", "nope", "nope"),
        ("GLOO_SOCKET_IFNAME", "eth0,eth", "eth"),
        ("NCCL_SOCKET_IFNAME", "ib0", "ib0"),
        ("NCCL_SOCKET_IFNAME", "=eth", "=eth"),
        ("NCCL_SOCKET_IFNAME", "ib0:5,ib1", "ib0:5,ib1"),
    ],
)
def test_absent_interfaces_are_told_with_the_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, given: str, absent: str
) -> None:
    monkeypatch.setenv(variable, given)
    with pytest.raises(ValueError) as told:
        check_interfaces(uses_nccl=True)
    assert f"{variable}={given} in the environment" in str(told.value)
    assert f"has no network interface {absent}; it has eth0, eth1, lo" in str(told.value)


def test_what_nccl_alone_reads_may_be_anything_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    check_interfaces(uses_nccl=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    with pytest.raises(ValueError, match="GLOO_SOCKET_IFNAME=ib0"):
        check_interfaces(uses_nccl=False)
