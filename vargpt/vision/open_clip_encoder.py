"""Patch features from the vision tower of any CLIP that open_clip can build (VARGPT: ViT-L/14 at 336 px)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from vargpt.vision.config import CLIP_MEAN, CLIP_STD, OPEN_CLIP_OPTIONS, OpenClipConfig


class OpenClipEncoder(nn.Module):
    """Hidden states of one layer of an open_clip ``VisionTransformer``, without the final norm.

    ``visual`` is open_clip's own module, so parameters have open_clip's names (``visual.conv1.weight``, ...).
    Blocks after the feature layer, ``ln_post`` and ``proj`` are not built: the features never pass them.
    """

    def __init__(self, config: OpenClipConfig) -> None:
        super().__init__()
        from open_clip.transformer import LayerNorm, QuickGELU, VisionTransformer

        self.config = config
        self.visual = VisionTransformer(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.width,
            layers=config.num_blocks,
            heads=config.num_heads,
            # open_clip takes int(width * ratio); half a unit more keeps rounding from losing one
            mlp_ratio=(config.mlp_width + 0.5) / config.width,
            act_layer=QuickGELU if config.quick_gelu else nn.GELU,
            norm_layer=partial(LayerNorm, eps=config.norm_eps),
            pool_type="none",
            **config.options,
        )
        # With no pooling, norm or projection the tower's own forward returns all tokens of its last block.
        self.visual.ln_post = nn.Identity()
        self.visual.proj = None

    @classmethod
    def from_name(
        cls, name: str, pretrained: str | None = None, feature_layer: int = -2, keep_cls: bool = False
    ) -> OpenClipEncoder:
        """The tower of the open_clip model ``name``, for example ``"ViT-L-14-336-quickgelu"``.

        Args:
            name: one of ``open_clip.list_models()``; ``open_clip.add_model_config`` adds more.
            pretrained: weights: one of open_clip's tags for ``name`` (downloaded where it is not cached), or an
                open_clip checkpoint on disk. A tag also decides the preprocessing, and QuickGELU where it was trained
                with it. ``None`` leaves random weights and reads no network.
            feature_layer, keep_cls: as in ``OpenClipConfig``.

        Raises:
            ValueError: an unknown name or tag, a model with another kind of vision tower, or weights that do not fit.
        """
        import open_clip
        from open_clip.factory import load_state_dict

        if name not in open_clip.list_models():
            near = get_close_matches(name, open_clip.list_models(), n=4) or ["open_clip.list_models()"]
            raise ValueError(f"open_clip has no model {name!r}; try {', '.join(near)}")
        model = open_clip.get_model_config(name)
        assert model is not None
        tower = open_clip.CLIPVisionCfg(**model["vision_cfg"])
        if tower.timm_model_name or not isinstance(tower.layers, int):
            timm_name = tower.timm_model_name or "resnet50_clip"
            raise ValueError(f"{name} is no plain vision transformer; use TimmEncoder, with a name like {timm_name!r}")
        norm = {"eps": 1e-5, **(tower.norm_kwargs or {})}
        if tower.act_kwargs or tower.scaled_cosine_attn or norm.keys() != {"eps"}:
            raise ValueError(f"{name} has an activation, attention or norm that OpenClipEncoder cannot build: {tower}")

        tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
        if pretrained and not tag and not Path(pretrained).is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            raise ValueError(f"no weights {pretrained!r} for {name}: no such file, and its tags are: {tags}")
        plain = open_clip.CLIPVisionCfg()
        encoder = cls(
            OpenClipConfig(
                image_size=_side(tower.image_size),
                patch_size=_side(tower.patch_size),
                width=tower.width,
                depth=tower.layers,
                num_heads=tower.width // tower.head_width,
                mlp_width=int(tower.width * tower.mlp_ratio),
                quick_gelu=model.get("quick_gelu", False) or tag.get("quick_gelu", False),
                norm_eps=norm["eps"],
                feature_layer=feature_layer,
                keep_cls=keep_cls,
                mean=tuple(tag.get("mean", CLIP_MEAN)),
                std=tuple(tag.get("std", CLIP_STD)),
                interpolation=tag.get("interpolation", "bicubic"),
                resize=tag.get("resize_mode", "shortest"),
                options={k: v for k in sorted(OPEN_CLIP_OPTIONS) if (v := getattr(tower, k)) != getattr(plain, k)},
            )
        )
        if pretrained:
            weights = load_state_dict(open_clip.download_pretrained(tag) if tag else pretrained)
            encoder.load_tower(cast(dict[str, Tensor], weights))
        return encoder

    def load_tower(self, state: Mapping[str, Tensor]) -> None:
        """Copy in the weights of a whole open_clip model or tower (names ``visual.*``). Those that the features never
        pass are dropped: text, later blocks, pooling, the last norm and the projection.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape.
        """
        kept = {name: tensor for name, tensor in state.items() if self._uses(name)}
        try:
            self.load_state_dict(kept)
        except RuntimeError as error:
            raise ValueError(f"these weights do not fit the vision tower: {error}") from error

    def _uses(self, name: str) -> bool:
        if block := re.match(r"visual\.transformer\.resblocks\.(\d+)\.", name):
            return int(block[1]) < self.config.num_blocks
        return name.startswith("visual.") and not re.match(r"visual\.(ln_post\.|proj$|attn_pool)", name)

    @property
    def width(self) -> int:
        return self.config.width

    @property
    def num_tokens(self) -> int:
        """Features per picture (P): one a patch, row by row, after the class token where that is kept."""
        return (self.config.image_size // self.config.patch_size) ** 2 + self.config.keep_cls

    def preprocess(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        """Resize, crop at the centre, normalise: what transformers' CLIPImageProcessor (PIL) does, in float32."""
        size, image = self.config.image_size, image.convert("RGB")
        width, height = size, size
        if self.config.resize == "shortest":
            shorter = min(image.size)
            width, height = int(size * image.width / shorter), int(size * image.height / shorter)
        image = image.resize((width, height), Image.Resampling[self.config.interpolation.upper()])
        left, top = (width - size) // 2, (height - size) // 2
        pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
        pixels = (pixels - np.array(self.config.mean, np.float32)) / np.array(self.config.std, np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def forward(self, pixel_values: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B P W"]:
        """Features of preprocessed pictures, in the dtype of the weights.

        Raises:
            ValueError: pictures of another size.
        """
        expected = (3, self.config.image_size, self.config.image_size)
        if pixel_values.shape[1:] != expected:
            raise ValueError(f"expected pixel_values of shape {('B', *expected)}, not {tuple(pixel_values.shape)}")
        tokens = self.visual(pixel_values.to(self.visual.conv1.weight.dtype))
        return tokens if self.config.keep_cls else tokens[:, 1:]


def _side(size: int | Sequence[int]) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1:
        raise ValueError(f"OpenClipEncoder takes square pictures and patches only, not {size}")
    return sides.pop()
