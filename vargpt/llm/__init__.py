"""The language model: a LLaMA-style decoder."""

from vargpt.llm.config import LlamaConfig, RopeScaling
from vargpt.llm.fold import columns_first
from vargpt.llm.model import LlamaDecoder

__all__ = ["LlamaConfig", "LlamaDecoder", "RopeScaling", "columns_first"]
