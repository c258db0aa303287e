"""A random checkpoint in the published layout: ``python -m experiments.synthetic_checkpoint DIR [--preset NAME]``.

As large as the released model (18.6 GB), for measuring what loading and running it takes where the released weights are
not at hand. Shards are written one after the other, holding one tensor in memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.run import exit_code
from vargpt.build import preset
from vargpt.choices import PUBLISHED
from vargpt.config import VargptConfig
from vargpt.convert.check import published_tensors
from vargpt.convert.published import copy_tokenizer, to_published
from vargpt.files import atomic_directory, write_json
from vargpt.tensorfiles import MAX_SHARD_BYTES, TensorSpec, write_safetensors


class RandomSource:
    """Weights that keep activations finite: every tensor follows from the seed and its name. A ``TensorSource``.

    Matrices are uniform, with a standard deviation of one over the root of their inputs; norms are 1, temperatures of
    cosine attention 4, all else is 0.
    """

    def __init__(self, config: VargptConfig, seed: int) -> None:
        self._seed = seed
        self.specs = {name: TensorSpec(spec.shape, torch.bfloat16) for name, spec in published_tensors(config).items()}

    def read(self, name: str) -> Tensor:
        shape = self.specs[name].shape
        if name.endswith("usage_SV"):
            return torch.zeros(shape, dtype=torch.bfloat16)
        if len(shape) == 1:
            norm = name.endswith(".weight")  # no other weight has one axis
            value = math.log(4) if name.endswith("log_scale") else float(norm)
            return torch.full(shape, value, dtype=torch.bfloat16)
        random = np.random.Generator(np.random.SFC64([self._seed, zlib.crc32(name.encode())]))
        # Random bits, not normal numbers: ten billion of those would take minutes.
        bits = torch.from_numpy(random.integers(-(2**15), 2**15, shape, dtype=np.int16))
        inputs = math.prod(shape[1:]) if len(shape) == 4 else shape[-1]
        return bits.to(torch.bfloat16).mul_(math.sqrt(3 / inputs) / 2**15)


def write(
    directory: Path,
    config: VargptConfig,
    *,
    seed: int = 0,
    tokenizer: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a random model's checkpoint in bfloat16; the directory appears only when it is complete.

    Args:
        tokenizer: a directory whose text tokenizer goes with it; without one, text is read as bytes.

    Raises:
        ValueError: the directory exists already or cannot be written, or the published layout cannot hold the model.
    """
    if directory.exists():
        raise ValueError(f"{directory} exists already: choose another directory, or delete it")
    tensors, described = to_published(config, RandomSource(config, seed))
    with atomic_directory(directory) as folder:
        write_safetensors(folder, tensors, max_shard_bytes)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder)
        write_json(folder / "config.json", described)


def as_published(config: VargptConfig, depth: int | None) -> VargptConfig:
    """The configuration with so many layers in both decoders and, as the published models have them, a class for every
    token up to ``image_gen_start`` and no norms in the projectors."""
    assert config.llm is not None
    assert config.var is not None
    depths = {} if depth is None else {"depth": depth}
    llm = dataclasses.replace(config.llm, **depths)
    var = dataclasses.replace(config.var, num_classes=config.tokens.gen_start + 1, **depths)
    return dataclasses.replace(config, llm=llm, var=var, choices=PUBLISHED)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a new directory")
    parser.add_argument("--preset", default="vargpt-7b", metavar="NAME", help="sizes (vargpt-7b)")
    parser.add_argument("--depth", type=int, metavar="N", help="layers of both decoders (the preset's)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same weights (0)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="whose text tokenizer goes with it (none: bytes)")
    options = parser.parse_args(arguments)

    def run() -> None:
        config = as_published(preset(options.preset), options.depth)
        write(options.directory, config, seed=options.seed, tokenizer=options.tokenizer)

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
