"""Settings of the vision encoders, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# What else shapes the features of an open_clip VisionTransformer. Pooling, the final norm and the projection come
# after them, and patch_dropout would change how many there are. scaled_cosine_attn is left out: it fails in open_clip.
OPEN_CLIP_OPTIONS = frozenset(
    {
        "block_type",
        "ls_init_value",
        "no_ln_pre",
        "pos_embed_type",
        "qk_norm",
        "scale_attn",
        "scale_attn_inner",
        "scale_fc",
        "scale_heads",
    }
)


def blocks_before(feature_layer: int, depth: int) -> int:
    """Blocks that the features pass, of ``depth``. Layers are counted as hidden states: 0 is the embeddings,
    k the output of block k, -1 that of the last block, -2 that of the one before it.

    Raises:
        ValueError: the network has no such layer.
    """
    if not -depth - 1 <= feature_layer <= depth:
        raise ValueError(f"feature_layer must be from {-depth - 1} to {depth} for {depth} blocks, not {feature_layer}")
    return feature_layer % (depth + 1)


@dataclass(frozen=True, kw_only=True)
class OpenClipConfig:
    """An open_clip vision tower, the hidden state to take from it, and its preprocessing.

    VARGPT's is CLIP ViT-L/14 at 336 px, penultimate layer:
    ``OpenClipConfig(image_size=336, patch_size=14, width=1024, depth=24, num_heads=16, mlp_width=4096)``.

    Raises:
        ValueError: sizes that do not divide, or a name that does not exist.
    """

    image_size: int  # side of the square pictures, pixels
    patch_size: int  # pixels
    width: int
    depth: int  # blocks of the whole tower, also those after the feature layer, which are never built
    num_heads: int
    mlp_width: int
    quick_gelu: bool = True  # x * sigmoid(1.702 x), as OpenAI trained; else the exact GELU
    norm_eps: float = 1e-5
    feature_layer: int = -2  # counted as hidden states, see blocks_before; -2 is what LLaVA and VARGPT use
    keep_cls: bool = False
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    interpolation: str = "bicubic"  # or "bilinear"
    resize: str = "shortest"  # side, then a centre crop; or "squash" both sides
    options: Mapping[str, Any] = field(default_factory=dict)  # OPEN_CLIP_OPTIONS, as open_clip's VisionTransformer

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "width", "depth", "num_heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} must be a multiple of num_heads {self.num_heads}")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(f"mean and std need one number for each of red, green and blue: {self.mean}, {self.std}")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation must be 'bicubic' or 'bilinear', not {self.interpolation!r}")
        if self.resize not in ("shortest", "squash"):
            raise ValueError(f"resize must be 'shortest' or 'squash', not {self.resize!r}")
        if unknown := sorted(self.options.keys() - OPEN_CLIP_OPTIONS):
            raise ValueError(f"unknown options {unknown}; known: {sorted(OPEN_CLIP_OPTIONS)}")
        blocks_before(self.feature_layer, self.depth)

    @property
    def num_blocks(self) -> int:
        """Blocks to build: those up to the feature layer."""
        return blocks_before(self.feature_layer, self.depth)


@dataclass(frozen=True, kw_only=True)
class TimmConfig:
    """A timm network, the block to take features from, and the size of its pictures.

    Raises:
        ValueError: ``image_size`` is not positive. A wrong name or layer is found when the network is built.
    """

    model_name: str  # as timm.create_model takes it; a tag after the dot ("....openai") also picks the preprocessing
    image_size: int | None = None  # pixels; None is the network's own
    feature_layer: int = -2  # counted as in OpenClipConfig, in stages where the network has stages; 0 is not offered
    keep_prefix: bool = False  # keep class and register tokens before the patches, where the network has them

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, not {self.image_size}")
