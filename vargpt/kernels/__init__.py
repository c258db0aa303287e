"""Attention and its cache: the one place where every part's attention is computed."""

from vargpt.kernels.attention import attention
from vargpt.kernels.cache import KVCache

__all__ = ["KVCache", "attention"]
