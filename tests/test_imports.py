"""Who may import whom, and what an import costs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import TypeCheckError

from vargpt.scales import ScaleSchedule

ROOT = Path(__file__).resolve().parents[1]

GROUND = {"scales", "interfaces", "sampling", "kernels", "next_scale"}
FILES = {"files", "text", "images", "tensorfiles"}
PARTS = {"llm", "vision", "var", "vqvae"}
WHOLE = {"choices", "projector", "losses", "model", "generate"}
ASSEMBLY = {"config", "config_json", "build", "convert", "checkpoint", "verify"}

# What each top-level module of vargpt (and experiments) may import of the project, besides itself. A module names
# only modules above it in the table, so there are no cycles. "vargpt" stands for the package's own public names.
MAY_IMPORT: dict[str, set[str]] = {
    # Interfaces, and what every part shares.
    "scales": set(),
    "interfaces": {"scales"},
    "sampling": {"scales", "interfaces"},
    "kernels": {"scales", "interfaces"},
    "next_scale": {"scales", "interfaces", "sampling"},
    # Text, pictures and tensors of the outside world; they know nothing of models.
    "files": set(),
    "text": {"files"},
    "images": {"files"},
    "tensorfiles": {"files"},
    # The parts, which know nothing of each other.
    "llm": GROUND,
    "vision": GROUND,
    "var": GROUND,
    "vqvae": GROUND,
    # The whole model: it receives its parts and sees their Protocols only.
    "choices": set(),
    "projector": GROUND | FILES,
    "losses": GROUND | FILES | {"choices", "projector"},
    "model": GROUND | FILES | {"choices", "projector", "losses"},
    "generate": GROUND | FILES | {"choices", "projector", "losses", "model"},
    # Sizes, wiring, files.
    "config": GROUND | FILES | PARTS | WHOLE,
    "config_json": GROUND | FILES | PARTS | WHOLE | {"config"},
    "build": GROUND | FILES | PARTS | WHOLE | {"config", "config_json"},
    "convert": GROUND | FILES | PARTS | WHOLE | {"config", "config_json", "build"},
    "checkpoint": GROUND | FILES | PARTS | WHOLE | {"config", "config_json", "build", "convert"},
    "verify": GROUND | FILES | PARTS | WHOLE | {"config", "config_json", "build", "convert", "checkpoint"},
    "inference": GROUND | FILES | PARTS | WHOLE,
    # The public functions, and those who use them.
    "api": GROUND | FILES | PARTS | WHOLE | ASSEMBLY,
    "cli": GROUND | FILES | PARTS | WHOLE | ASSEMBLY | {"inference", "api", "vargpt"},
    "experiments": GROUND | FILES | PARTS | WHOLE | ASSEMBLY | {"inference", "api", "vargpt"},
}
NEVER = {"transformers": "an oracle of the tests, not a dependency", "tests": "the tests are not installed"}
# Where it is allowed all the same: benchmarks that count what the emulator of kernels sees, or time a peer beside this
# project's own code. They say so where it is not there.
ALLOWED = {"tests": "experiments/benchmark/kernels.py", "transformers": "experiments/benchmark/text.py"}

STANDALONE = ["llm", "vision", "var", "vqvae", "kernels", "scales", "text", "files"]
HEAVY = {"open_clip", "timm", "transformers", "huggingface_hub"}


def source_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Every file that has a row in the table, with the name of the row."""
    for path in sorted([*root.glob("vargpt/**/*.py"), *root.glob("experiments/**/*.py")]):
        package, *inner = path.relative_to(root).with_suffix("").parts
        if package == "experiments":
            yield "experiments", path
        elif inner[-1] == "__main__":  # another door to the command line
            yield "cli", path
        elif inner != ["__init__"] and inner[0] != "assets":  # lazy, it may name anything; scripts beside their data
            yield inner[0], path


def imported_names(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, wherever it stands: in functions and under TYPE_CHECKING too."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def target(dotted: str) -> str | None:
    """The row of the table, or the forbidden package, that a dotted name leads to; None if it is neither."""
    package, *inner = dotted.split(".")
    if package == "vargpt":
        return inner[0] if inner and inner[0] in MAY_IMPORT else "vargpt"
    return package if package == "experiments" or package in NEVER else None


def violations(root: Path) -> list[str]:
    found = []
    for module, path in source_files(root):
        place = path.relative_to(root).as_posix()
        if module not in MAY_IMPORT:
            found.append(f"{place}: give {module!r} a row in MAY_IMPORT (tests/test_imports.py)")
            continue
        for line, dotted in imported_names(path, root):
            name = target(dotted)
            if name is not None and ALLOWED.get(name) == place:
                continue
            if name in NEVER:
                found.append(f"{place}:{line}: imports {name}: {NEVER[name]}")
            elif name is not None and name != module and name not in MAY_IMPORT[module]:
                found.append(f"{place}:{line}: {module} must not import {name}")
    return list(dict.fromkeys(found))  # once a line, however many names it imports


def fresh(code: str) -> str:
    """Standard output of a new interpreter, one that has imported nothing of the project and checks no shapes."""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def loaded_by(code: str) -> set[str]:
    """Names of all modules that a new interpreter holds after ``code``."""
    return set(fresh(f"{code}\nimport sys\nprint(*sys.modules, sep='\\n')").split())


def test_the_table_has_no_cycles() -> None:
    above = {"vargpt"}
    for module, allowed in MAY_IMPORT.items():
        assert allowed <= above, f"{module} names modules that do not stand above it: {sorted(allowed - above)}"
        above.add(module)


def test_imports_go_one_way() -> None:
    assert not (found := violations(ROOT)), "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("vargpt/llm/model.py", "from vargpt.vqvae.model import MultiScaleVQVAE", "llm must not import vqvae"),
        ("vargpt/llm/model.py", "from vargpt import kernels, vqvae", "llm must not import vqvae"),
        ("vargpt/llm/model.py", "import vargpt.vqvae.model as m", "llm must not import vqvae"),
        ("vargpt/llm/model.py", "from ..vqvae import MultiScaleVQVAE", "llm must not import vqvae"),
        ("vargpt/llm/__init__.py", "from .. import vqvae", "llm must not import vqvae"),
        ("vargpt/llm/model.py", "def f():\n    import vargpt.vision", "llm must not import vision"),
        ("vargpt/llm/model.py", "import importlib\nimportlib.import_module('vargpt.var')", "llm must not import var"),
        ("vargpt/model.py", "if TYPE_CHECKING:\n    from vargpt.llm import LlamaDecoder", "model must not import llm"),
        ("vargpt/generate.py", "from vargpt.vqvae import MultiScaleVQVAE", "generate must not import vqvae"),
        ("vargpt/losses.py", "from vargpt.model import VARGPT", "losses must not import model"),
        ("vargpt/build.py", "from vargpt.checkpoint import save", "build must not import checkpoint"),
        ("vargpt/text.py", "from vargpt.scales import ScaleSchedule", "text must not import scales"),
        ("vargpt/api.py", "import vargpt", "api must not import vargpt"),
        ("vargpt/api.py", "from vargpt import load", "api must not import vargpt"),
        ("vargpt/cli.py", "from experiments.train import main", "cli must not import experiments"),
        ("experiments/train.py", "from vargpt.cli import main", "experiments must not import cli"),
        ("vargpt/convert/llama.py", "from transformers import LlamaModel", "an oracle of the tests"),
        ("experiments/train.py", "from tests.conftest import ROOT", "the tests are not installed"),
        ("vargpt/novelty.py", "import torch", "give 'novelty' a row in MAY_IMPORT"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(source)
    (found,) = violations(tmp_path)
    assert found.startswith(file)
    assert complaint in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("vargpt/__init__.py", "from vargpt.api import load"),
        ("vargpt/llm/model.py", "import torch\nfrom vargpt.llm.layers import Block\nimport vargpt.kernels"),
        ("vargpt/llm/model.py", "from .layers import Block\nfrom ..kernels import attention"),
        ("vargpt/build.py", "from vargpt.vqvae import MultiScaleVQVAE\nfrom vargpt.model import VARGPT"),
        ("vargpt/convert/__main__.py", "from vargpt.cli import main"),
        ("vargpt/assets/make.py", "from vargpt.api import load"),
        ("experiments/train.py", "import vargpt\nfrom experiments.data import records\nimport vargpt.llm"),
        ("experiments/benchmark/kernels.py", "def f():\n    from tests.cuda_on_cpu import harness"),
        ("experiments/benchmark/text.py", "def f():\n    import transformers"),
    ],
)
def test_a_right_import_is_not(tmp_path: Path, file: str, source: str) -> None:
    allowed = tmp_path / file
    allowed.parent.mkdir(parents=True)
    allowed.write_text(source)
    assert violations(tmp_path) == []


@pytest.mark.parametrize("part", STANDALONE)
def test_a_part_comes_alone(part: str) -> None:
    loaded = loaded_by(f"import vargpt.{part}")
    of_project = {name.split(".")[1] for name in loaded if name.startswith("vargpt.")}
    assert of_project <= MAY_IMPORT[part] | {part}
    assert not loaded & HEAVY


def test_the_package_alone_is_free() -> None:
    loaded = loaded_by("import vargpt")
    assert "torch" not in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], ["draw", "--help"], ["draw"], ["paint"]])
def test_help_and_mistakes_do_not_wait_for_torch(arguments: list[str]) -> None:
    run = f"from vargpt.cli import main\ntry:\n    main({arguments})\nexcept SystemExit:\n    pass"
    assert not loaded_by(run) & (HEAVY | {"torch"})


def test_benchmarks_start_without_the_tests() -> None:
    assert not {name for name in loaded_by("import experiments.benchmark.__main__") if name.split(".")[0] == "tests"}


def test_the_public_functions_are_cheap() -> None:
    public = "import vargpt; vargpt.load, vargpt.draw"
    assert not loaded_by(public) & (HEAVY - {"huggingface_hub"})
    clock = f"import time, torch; start = time.perf_counter(); {public}; print(time.perf_counter() - start)"
    seconds: list[float] = []
    while len(seconds) < 3 and min(seconds, default=2.0) >= 2.0:  # another try, should the machine be busy
        seconds.append(float(fresh(clock)))
    assert min(seconds) < 2.0, f"beyond torch itself, {public!r} took {seconds} seconds"


def test_shapes_are_checked_under_pytest() -> None:
    with pytest.raises(TypeCheckError):
        ScaleSchedule((1, 2)).span("0")  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("unchecked")
def test_shapes_are_not_checked_on_request() -> None:
    with pytest.raises(TypeError, match="tuple indices"):
        ScaleSchedule((1, 2)).span("0")  # pyright: ignore[reportArgumentType]
