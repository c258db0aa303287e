"""What steps weights, and in which precision: shared by the trainings of models and of vision encoders."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

HIDDEN = r"blocks\.\d+\.(?!ada\.)|^(projector|gen_in|gen_out)\."
"""Names of the matrices from features to features. Embeddings and heads are none, nor is what modulates by class."""


def optimizers(model: nn.Module, *, muon: bool, weight_decay: float) -> dict[str, torch.optim.Optimizer]:
    """AdamW for all parameters of the model that train, or Muon for its matrices between features; by name.

    Learning rates are set at every step. Muon (https://kellerjordan.github.io/posts/muon) takes AdamW's.

    Raises:
        ValueError: this torch has no Muon.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = [p for name, p in trained.items() if muon and p.ndim == 2 and re.search(HIDDEN, name)]
    ids = {id(p) for p in hidden}
    others = [p for p in trained.values() if id(p) not in ids]
    found: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW(
            [
                {"params": [p for p in others if p.ndim > 1], "weight_decay": weight_decay},
                {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
        )
    }
    if hidden:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"torch {torch.__version__} has no Muon: take 2.9 or later, or set muon=false")
        # Updates of AdamW's size, so that one learning rate serves both (arXiv 2502.16982).
        found["muon"] = torch.optim.Muon(hidden, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return found


@contextmanager
def low_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in bfloat16."""
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        if device.type == "cpu":  # the backward pass of torch's fused attention is two to four times slower there
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield
