"""vargpt: one model that understands pictures by next-token and draws them by next-scale prediction.

Names are imported on first use, so that ``import vargpt`` (and ``vargpt --help``) costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vargpt.api import DrawOutput, ask, chat, draw
    from vargpt.build import preset
    from vargpt.checkpoint import load, save
    from vargpt.choices import FIXED, PUBLISHED, Choices
    from vargpt.config import VargptConfig
    from vargpt.inference import for_inference
    from vargpt.model import VARGPT

__version__ = "0.1.0"
__all__ = [
    "FIXED",
    "PUBLISHED",
    "VARGPT",
    "Choices",
    "DrawOutput",
    "VargptConfig",
    "ask",
    "chat",
    "draw",
    "for_inference",
    "load",
    "preset",
    "save",
]

_HOME = {
    "api": ("DrawOutput", "ask", "chat", "draw"),
    "build": ("preset",),
    "checkpoint": ("load", "save"),
    "choices": ("FIXED", "PUBLISHED", "Choices"),
    "config": ("VargptConfig",),
    "inference": ("for_inference",),
    "model": ("VARGPT",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"vargpt.{module}"), name)
    raise AttributeError(f"module 'vargpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
