"""Fixtures that say where the CUDA kernels run."""

from __future__ import annotations

import pytest

from tests.kernels.emulated import DEVICES, emulated_kernels
from vargpt.kernels import cuda


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend ``cuda`` computes on the CPU."""
    monkeypatch.setattr(cuda, "kernels", emulated_kernels())


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Where the backend ``cuda`` computes."""
    if request.param == "cpu":
        request.getfixturevalue("emulated")
    return request.param
