"""Conversion holds one tensor at a time: its memory follows the largest shard, whatever the size of the model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.convert.checkpoints import published_config, write_published
from vargpt.convert.check import published_tensors
from vargpt.convert.published import to_published
from vargpt.tensorfiles import MemorySource, write_safetensors

ROOT = Path(__file__).resolve().parents[2]
SHARD = 68_000_000

# Arguments: a small checkpoint, whose conversion brings in all imports, the one to measure, and a folder for the
# results. Prints the bytes of resident memory that converting the second took at its peak, there and back. (ru_maxrss
# would not do: a process inherits that of the one that started it.)
MEASURE = f"""
import sys
from pathlib import Path
from vargpt.convert import convert

def resident(kind):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind)]
    return int(line.split()[1]) * 1024

def measure(source, destination):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS:")
    convert(source, destination, max_shard_bytes={SHARD})
    print(resident("VmHWM:") - before)

small, large, results = map(Path, sys.argv[1:])
convert(small, results / "small")
measure(large, results / "ours")
measure(results / "ours", results / "theirs")
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_conversion_takes_no_more_than_the_largest_shard(tmp_path: Path) -> None:
    config = published_config(llm={"vocab_size": 2**16, "width": 512, "mlp_width": 6144, "depth": 9})
    zero = torch.zeros((), dtype=torch.bfloat16)
    ours = MemorySource({name: zero.expand(spec.shape) for name, spec in published_tensors(config).items()})
    theirs, described = to_published(config, ours)
    (tmp_path / "large").mkdir()
    write_safetensors(tmp_path / "large", theirs, SHARD)
    (tmp_path / "large" / "config.json").write_text(json.dumps(described))
    shards = [file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")]
    assert len(shards) > 5
    assert sum(shards) > 4 * max(shards)
    largest = max(spec.bytes for spec in theirs.specs.values())
    assert largest > 0.98 * max(shards)  # one tensor fills the largest shard: the hardest case

    write_published(tmp_path / "small")
    (tmp_path / "results").mkdir()
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in ("small", "large", "results"))],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    there, back = (int(line) / max(shards) for line in run.stdout.split())
    shutil.rmtree(tmp_path)  # pytest would keep it
    assert 0.5 < there < 1.2
    assert 0.5 < back < 1.2
