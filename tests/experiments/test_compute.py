"""Counted compute is what the sizes say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from experiments.compute import training_flops
from experiments.run import Schedule
from experiments.train import TOKENIZER, ChatData, Rows, Stage, StageTrainer, Training, source_of
from vargpt.build import build, preset
from vargpt.llm import LlamaDecoder
from vargpt.model import VARGPT
from vargpt.text import SentencePieceTokenizer

STAGE = Stage(name="text", schedule=Schedule(steps=7, lr=0.0), rows=Rows(text=3), trains=("llm",), accumulate=2)
TRAINING = Training(preset="nano", tokenizer="", stages=(STAGE,), data=(ChatData(world="nano"),))


def model(depth: int) -> VARGPT:
    nano = preset("nano")
    assert nano.llm is not None
    config = dataclasses.replace(nano, llm=dataclasses.replace(nano.llm, depth=depth))
    return build(config, tokenizer=SentencePieceTokenizer.from_directory(TOKENIZER, vocab_size=640))


def test_a_block_counts_its_products_and_its_attention(tmp_path: Path) -> None:
    two, three = (training_flops(TRAINING, model(depth), tmp_path) for depth in (2, 3))
    one = model(1)
    (batch,) = StageTrainer(TRAINING, STAGE, one, source_of(TRAINING, STAGE, one, tmp_path)).batches(0)
    rows, tokens = batch.input_ids.shape
    assert isinstance(one.llm, LlamaDecoder)
    weights = sum(p.numel() for p in one.llm.blocks.parameters() if p.ndim == 2)
    # A product of n numbers is 2n operations; backward has two for each of forward.
    block = 3 * (2 * weights * rows * tokens + 2 * 2 * rows * tokens**2 * one.llm.width)
    assert three - two == block * STAGE.accumulate * STAGE.schedule.steps
