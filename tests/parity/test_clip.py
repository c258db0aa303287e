"""OpenClipEncoder against transformers' CLIP on random weights: every hidden state, and the preprocessing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from vargpt.vision import OpenClipConfig, OpenClipEncoder

transformers = pytest.importorskip("transformers")
data = pytest.importorskip("skimage.data")

TOLERANCE = 1e-4  # float32, against eager attention


def open_clip_names(clip: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """A transformers CLIPVisionModel's weights under open_clip's names."""
    clip = {name.removeprefix("vision_model."): tensor for name, tensor in clip.items()}
    state = {
        "conv1.weight": clip["embeddings.patch_embedding.weight"],
        "class_embedding": clip["embeddings.class_embedding"],
        "positional_embedding": clip["embeddings.position_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        state[f"ln_pre.{kind}"] = clip[f"pre_layrnorm.{kind}"]
        for i in range(depth):
            ours, theirs = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
            qkv = [clip[f"{theirs}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            state[f"{ours}.attn.in_proj_{kind}"] = torch.cat(qkv)
            state[f"{ours}.attn.out_proj.{kind}"] = clip[f"{theirs}.self_attn.out_proj.{kind}"]
            state[f"{ours}.ln_1.{kind}"] = clip[f"{theirs}.layer_norm1.{kind}"]
            state[f"{ours}.ln_2.{kind}"] = clip[f"{theirs}.layer_norm2.{kind}"]
            state[f"{ours}.mlp.c_fc.{kind}"] = clip[f"{theirs}.mlp.fc1.{kind}"]
            state[f"{ours}.mlp.c_proj.{kind}"] = clip[f"{theirs}.mlp.fc2.{kind}"]
    return {f"visual.{name}": tensor for name, tensor in state.items()}


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 4),
    head_width=st.sampled_from([4, 8, 12]),
    mlp_width=st.integers(5, 70),
    depth=st.integers(1, 4),
    patch=st.integers(1, 7),
    grid=st.integers(1, 4),
    quick_gelu=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_hidden_states(heads, head_width, mlp_width, depth, patch, grid, quick_gelu, training, seed) -> None:
    torch.manual_seed(seed)
    config = transformers.CLIPVisionConfig(
        hidden_size=heads * head_width,
        intermediate_size=mlp_width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=patch * grid,
        patch_size=patch,
        hidden_act="quick_gelu" if quick_gelu else "gelu",
        attn_implementation="eager",
    )
    theirs = transformers.CLIPVisionModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # the default ones are near 0 and hide mistakes
            scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.add_(scale * torch.randn_like(parameter))
    images = torch.randn(2, 3, patch * grid, patch * grid)
    with torch.no_grad():
        hidden_states = theirs(images, output_hidden_states=True).hidden_states
    assert len(hidden_states) == depth + 1

    weights = open_clip_names(theirs.state_dict(), depth)
    for layer in range(-depth - 1, depth + 1):
        ours = OpenClipEncoder(
            OpenClipConfig(
                image_size=patch * grid,
                patch_size=patch,
                width=heads * head_width,
                depth=depth,
                num_heads=heads,
                mlp_width=mlp_width,
                quick_gelu=quick_gelu,
                feature_layer=layer,
                keep_cls=True,
            )
        ).train(training)
        ours.load_tower(weights)
        with torch.no_grad():
            error = (ours(images) - hidden_states[layer]).abs().max().item()
        assert error <= TOLERANCE, f"layer {layer}: {error}"


PHOTOS = {
    "square": lambda: Image.fromarray(data.astronaut()),
    "wide": lambda: Image.fromarray(data.chelsea()),
    "tall": lambda: Image.fromarray(data.chelsea()).transpose(Image.Transpose.ROTATE_90),
    "grey": lambda: Image.fromarray(data.camera()).crop((0, 0, 101, 387)),
    "small": lambda: Image.fromarray(data.chelsea()).resize((31, 22)),
    "alpha": lambda: Image.fromarray(data.logo()),
}


@pytest.mark.parametrize("size", [28, 224, 335, 336])
@pytest.mark.parametrize("photo", PHOTOS)
def test_preprocess(photo: str, size: int) -> None:
    image = PHOTOS[photo]()
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    config = OpenClipConfig(image_size=size, patch_size=size, width=8, depth=1, num_heads=1, mlp_width=8)
    pixels = OpenClipEncoder(config).preprocess(image)
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-5, rtol=0)
