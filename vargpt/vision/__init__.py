"""Vision encoders: pictures to patch features. Importing this package loads neither open_clip nor timm."""

from vargpt.vision.config import OpenClipConfig, TimmConfig
from vargpt.vision.open_clip_encoder import OpenClipEncoder
from vargpt.vision.timm_encoder import TimmEncoder

__all__ = ["OpenClipConfig", "OpenClipEncoder", "TimmConfig", "TimmEncoder"]
