"""What every test shares: checked shapes, fixed seeds, one thread per worker, the recordings."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import hypothesis
import jaxtyping
import pytest
import torch

# Types and shapes in vargpt's signatures are checked at every call, under pytest only. The hook changes modules as they
# are imported, so it comes before the first import of vargpt. An int passes for a float, as it does for pyright.
assert "vargpt" not in sys.modules, "vargpt was imported before its shapes could be checked"
jaxtyping.install_import_hook("vargpt", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# No test reaches the network through the hub.
os.environ["HF_HUB_OFFLINE"] = "1"

# Workers share the cores, so each keeps to one thread, and so do the processes it starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# An example's time says nothing on a shared machine; under CI hypothesis draws the same examples every time.
hypothesis.settings.register_profile("vargpt", parent=hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("vargpt")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No checks of types and shapes: for tests of what a user sees who passes a value of the wrong type or shape."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Recordings of the published models, at small sizes with random weights."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def vargpt_tiny_dir(golden_dir: Path) -> Path:
    """VARGPT in its published checkpoint layout, and ``golden.safetensors``."""
    return golden_dir / "vargpt_tiny"


@pytest.fixture(scope="session")
def var_tiny_dir(golden_dir: Path) -> Path:
    """The class-conditional VAR (``vae.pth``, ``var.pth``), and ``golden.safetensors``."""
    return golden_dir / "var_tiny"
