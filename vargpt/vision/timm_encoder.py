"""Patch features from a timm network (SigLIP, DINOv2, EVA, ConvNeXt, ...): a drop-in swap for OpenClipEncoder."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from vargpt.vision.config import TimmConfig, blocks_before


class TimmEncoder(nn.Module):
    """Outputs of one block of a timm network, without the final norm, with the network's own preprocessing.

    ``model`` is timm's own module (parameters ``model.patch_embed.proj.weight``, ...), cut after the feature layer.
    Nearly every family of timm's works (not gemma4_vit); a feature map is read row by row.

    Raises:
        ValueError: timm has no such model, the model has no such layer, or it cannot take pictures of that size.
    """

    def __init__(self, config: TimmConfig) -> None:
        super().__init__()
        from timm.data.config import resolve_model_data_config
        from timm.data.transforms_factory import create_transform

        self.config = config
        self.model = _whole(config)
        stages = self.model.feature_info
        blocks = blocks_before(config.feature_layer, len(getattr(stages, "info", stages)))
        if blocks == 0:
            raise ValueError(f"timm's {config.model_name} does not give its embeddings; feature_layer 0 is not there")
        self._block = blocks - 1
        self.model.prune_intermediate_layers([self._block], prune_norm=True, prune_head=True)

        # Networks that add the class token after their first blocks (CaiT, ConViT) have none to give.
        gives_prefix = "return_prefix_tokens" in inspect.signature(self.model.forward_intermediates).parameters
        self._with_prefix = config.keep_prefix and gives_prefix and getattr(self.model, "num_prefix_tokens", 0) > 0

        size = None if config.image_size is None else (3, config.image_size, config.image_size)
        data = resolve_model_data_config(self.model, args={"input_size": size})
        with torch.device("cpu"):  # it holds mean and std, which must have values also when built on the meta device
            self._transform: Any = create_transform(**data, is_training=False)
        self._input_shape = tuple(data["input_size"])
        self._num_tokens, self._width = self._dry_run()

    @classmethod
    def from_name(
        cls,
        name: str,
        pretrained: str | None = None,
        feature_layer: int = -2,
        keep_prefix: bool = False,
        image_size: int | None = None,
    ) -> TimmEncoder:
        """The timm network ``name``, for example ``"vit_base_patch16_siglip_224"``.

        Args:
            name: one of ``timm.list_models()``.
            pretrained: weights: one of timm's tags for ``name`` such as ``"webli"`` (downloaded where it is not
                cached), or a timm checkpoint on disk. ``None`` leaves random weights and reads no network.
            feature_layer, keep_prefix, image_size: as in ``TimmConfig``.

        Raises:
            ValueError: as the constructor, and an unknown tag.
        """
        source: dict[str, Any] = {}
        if pretrained and Path(pretrained).is_file():
            source = {"pretrained": True, "pretrained_cfg_overlay": {"file": pretrained}}
        elif pretrained:
            source = {"pretrained": True}
            name = f"{name}.{pretrained}"
        config = TimmConfig(
            model_name=name, image_size=image_size, feature_layer=feature_layer, keep_prefix=keep_prefix
        )
        encoder = cls(config)
        if pretrained:
            weights, used = _whole(config, **source).state_dict(), encoder.model.state_dict().keys()
            encoder.model.load_state_dict({name: weights[name] for name in used})
        return encoder

    @property
    def width(self) -> int:
        return self._width

    @property
    def num_tokens(self) -> int:
        """Features per picture (P): one a patch, row by row, after the prefix tokens where those are kept."""
        return self._num_tokens

    def preprocess(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        """The network's own evaluation transform, in float32."""
        return self._transform(image.convert("RGB"))

    def forward(self, pixel_values: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B P W"]:
        """Features of preprocessed pictures, in the dtype of the weights.

        Raises:
            ValueError: pictures of another size.
        """
        if pixel_values.shape[1:] != self._input_shape:
            expected = ("B", *self._input_shape)
            raise ValueError(f"expected pixel_values of shape {expected}, not {tuple(pixel_values.shape)}")
        return self._features(self.model, pixel_values.to(next(self.model.parameters()).dtype))

    def _features(self, model: Any, pixel_values: Tensor) -> Tensor:
        (features,) = model.forward_intermediates(
            pixel_values,
            indices=[self._block],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NCHW",  # the one format that every family of networks offers
            **({"return_prefix_tokens": True} if self._with_prefix else {}),
        )
        if not self._with_prefix:
            return features.flatten(2).mT
        patches, prefix = features
        return torch.cat([prefix, patches.flatten(2).mT], dim=1)

    def _dry_run(self) -> tuple[int, int]:
        """Tokens and width. Networks pad and round in their own ways, so a copy without storage tells."""
        try:
            with torch.device("meta"):
                shape = self._features(_whole(self.config).eval(), torch.empty(1, *self._input_shape)).shape
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"{self.config.model_name} cannot take pictures {self._input_shape}: {error}") from error
        return shape[1], shape[2]


def _whole(config: TimmConfig, **options: Any) -> Any:
    """The uncut network, without a classifier."""
    import timm

    architecture, _, tag = config.model_name.partition(".")
    if not timm.is_model(architecture):
        near = get_close_matches(architecture, timm.list_models(), n=4) or ["timm.list_models()"]
        raise ValueError(f"timm has no model {architecture!r}; try {', '.join(near)}")
    if tag and config.model_name not in (known := timm.list_pretrained(f"{architecture}.*")):
        tags = ", ".join(name.partition(".")[2] for name in known) or "none"
        raise ValueError(f"no weights {tag!r} for timm's {architecture}: no such file, and its tags are: {tags}")
    if config.image_size is not None:
        try:
            return timm.create_model(config.model_name, num_classes=0, img_size=config.image_size, **options)
        except TypeError as error:  # convolutional networks take any size, and no such argument
            if "img_size" not in str(error):
                raise
    return timm.create_model(config.model_name, num_classes=0, **options)
