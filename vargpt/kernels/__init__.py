"""Attention and its cache: the one place where every part's attention is computed."""

from vargpt.kernels.attention import Choice, attention, using, watching
from vargpt.kernels.backends import BACKENDS
from vargpt.kernels.cache import KVCache

__all__ = ["BACKENDS", "Choice", "KVCache", "attention", "using", "watching"]
