"""The visual decoder: a block-causal next-scale transformer, alone or steered by a language model."""

from vargpt.var.config import VarConfig
from vargpt.var.fold import fold_conditions
from vargpt.var.model import NextScaleTransformer
from vargpt.var.sample import draw_classes

__all__ = ["NextScaleTransformer", "VarConfig", "draw_classes", "fold_conditions"]
