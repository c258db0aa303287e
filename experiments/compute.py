"""What a training computes: counted, not timed."""

from __future__ import annotations

from pathlib import Path

from torch.utils.flop_counter import FlopCounterMode

from experiments.train import StageTrainer, Training, forward, source_of
from vargpt.kernels import using
from vargpt.model import VARGPT


def training_flops(config: Training, model: VARGPT, folder: Path) -> float:
    """Floating-point operations of a training's matrix products, forward and backward: the first step of each stage,
    times its steps. Attention counts in full, masked or not; tokenizing pictures does not count.

    Args:
        model: of the training's sizes; it is left with gradients.
        folder: of the training, where cached image tokens are.
    """
    total = 0.0
    for stage in config.stages:
        batches = StageTrainer(config, stage, model, source_of(config, stage, model, folder)).batches(0)
        with using("matmul"), FlopCounterMode(display=False) as counter:  # products that the counter sees
            for batch in batches:
                loss = forward(model, batch).loss
                assert loss is not None
                loss.backward()
        total += counter.get_total_flops() * stage.accumulate * stage.schedule.steps
    return total
