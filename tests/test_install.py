"""setup.py: a wheel for every machine, or one with CUDA kernels, and what it says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.cuda_on_cpu.harness import NVCC, ops_unavailable

ROOT = Path(__file__).resolve().parents[1]
NO_NVCC = {"CUDA_HOME": "/no/such/directory"}
WITHOUT = "vargpt is installed without its CUDA kernels, and uses torch's attention: "


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is needed to install, so that nothing is built in the working tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    ignored = shutil.ignore_patterns("assets", "__pycache__", "*.so")
    for name in ("vargpt", "experiments"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    return copy


def build(source: Path, to: Path, kind: str = "wheel", **environment: str) -> subprocess.CompletedProcess[str]:
    """What pip does without build isolation: this interpreter's setuptools and torch are used."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(to)!r})"
    others = {name: value for name, value in os.environ.items() if name != "VARGPT_CUDA"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=source, env={**others, **environment}, capture_output=True, text=True
    )


@pytest.mark.parametrize("environment", [{"VARGPT_CUDA": "0"}, NO_NVCC])
def test_without_kernels_the_wheel_is_for_every_machine(
    source: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    built = build(source, tmp_path, **environment)
    assert built.returncode == 0, built.stderr
    assert (WITHOUT + "there is no CUDA toolkit (nvcc) in /no/such/directory" in built.stderr) == (
        environment == NO_NVCC
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not any(name.endswith(".so") for name in archive.namelist())


def test_kernels_that_must_be_built_and_cannot_be_stop_it(source: Path, tmp_path: Path) -> None:
    built = build(source, tmp_path, VARGPT_CUDA="1", **NO_NVCC)
    assert built.returncode != 0
    assert "RuntimeError: there is no CUDA toolkit (nvcc) in /no/such/directory: set CUDA_HOME" in built.stderr


def test_a_wish_that_is_none_is_refused(source: Path, tmp_path: Path) -> None:
    built = build(source, tmp_path, VARGPT_CUDA="yes")
    assert "ValueError: VARGPT_CUDA must be 0 (never) or 1 (must) or not be set, not 'yes'" in built.stderr


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None or torch.version.cuda is None, reason="there is no nvcc, or no torch for CUDA")
@pytest.mark.skipif(ops_unavailable() is not None, reason=f"kernels cannot be built: {ops_unavailable()}")
def test_with_kernels_one_wheel_is_for_every_python(source: Path, tmp_path: Path) -> None:
    built = build(source, tmp_path, VARGPT_CUDA="1")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")

    code = """
import torch
from vargpt.kernels import cuda
assert "installed" in cuda.__file__ and cuda.kernels == cuda.Kernels("cuda"), cuda.kernels
q, limits = torch.ones(1, 1, 2, 64).bfloat16(), torch.ones(2, dtype=torch.int32)
torch.ops.vargpt.attention_forward(q, q, q, limits, None, 1.0)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.stderr.splitlines()[-1].startswith(
        "ValueError: attention_forward: queries is on cpu, and these kernels run on cuda only: move it there, or call"
    )


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None or torch.version.cuda is None, reason="there is no nvcc, or no torch for CUDA")
@pytest.mark.skipif(ops_unavailable() is not None, reason=f"kernels cannot be built: {ops_unavailable()}")
def test_a_compilation_that_fails_leaves_a_wheel_for_every_machine(source: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(source, tmp_path / "broken", ignore=shutil.ignore_patterns("build"))
    for path in (broken / "vargpt" / "kernels" / "csrc").glob("*.cu"):
        path.write_text("#error this does not compile\n")
    built = build(broken, tmp_path)
    assert built.returncode == 0, built.stderr
    assert WITHOUT + "the compilation failed: " in built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert build(broken, tmp_path, VARGPT_CUDA="1").returncode != 0

    # What a compilation left that did not fail is in no wheel that says it runs everywhere, and loaded by no clone.
    (library,) = (broken / "build").glob("lib.*")
    for root, kind in ((library, "wheel"), (broken, "editable")):
        old = root / "vargpt" / "kernels" / "_cuda.abi3.so"
        old.write_bytes(b"kernels of another source")
        assert build(broken, tmp_path, kind).returncode == 0
        assert not old.exists()
    with zipfile.ZipFile(wheel) as archive:
        assert not any(name.endswith(".so") for name in archive.namelist())
