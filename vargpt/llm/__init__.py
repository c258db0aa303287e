"""The language model: a LLaMA-style decoder."""

from vargpt.llm.config import LlamaConfig, RopeScaling
from vargpt.llm.model import LlamaDecoder

__all__ = ["LlamaConfig", "LlamaDecoder", "RopeScaling"]
