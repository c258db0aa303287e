"""TimmEncoder against timm itself: features, sizes, weights on disk, preprocessing, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

from vargpt.interfaces import VisionEncoder
from vargpt.vision import TimmConfig, TimmEncoder

VIT = "test_vit"  # timm's own tiny network for tests: 160 px, patch 16, width 64, 6 blocks, one class token


def pictures(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("feature_layer", [1, 3, -2, -1])
def test_vit_features_are_block_outputs(feature_layer: int) -> None:
    torch.manual_seed(0)
    whole: Any = timm.create_model(VIT, pretrained=False, num_classes=0).eval()
    outputs: list[torch.Tensor] = []
    for block in whole.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    images = pictures(2, 3, 160, 160)
    whole(images)
    expected = outputs[feature_layer - 1 if feature_layer > 0 else feature_layer]

    for keep_prefix in (False, True):
        config = TimmConfig(model_name=VIT, feature_layer=feature_layer, keep_prefix=keep_prefix)
        encoder = TimmEncoder(config).eval()
        encoder.model.load_state_dict({k: whole.state_dict()[k] for k in encoder.model.state_dict()})
        torch.testing.assert_close(encoder(images), expected if keep_prefix else expected[:, 1:])
        assert (encoder.num_tokens, encoder.width) == (100 + keep_prefix, 64)
        assert len(encoder.model.blocks) == feature_layer % 7


def test_nothing_after_the_feature_layer_is_kept() -> None:
    names = {name.split(".")[0] for name, _ in TimmEncoder(TimmConfig(model_name=VIT)).model.named_parameters()}
    assert names == {"patch_embed", "cls_token", "pos_embed", "blocks"}


@pytest.mark.parametrize(
    ("name", "tokens", "width"),
    [
        ("vit_base_patch16_siglip_224", 196, 768),
        ("vit_small_patch14_dinov2", 37 * 37, 384),
        ("vit_small_patch14_reg4_dinov2", 37 * 37, 384),
        ("vit_large_patch14_clip_336.openai", 576, 1024),
        ("vit_so400m_patch14_siglip_384", 27 * 27, 1152),
        ("eva02_large_patch14_clip_336", 576, 1024),
        ("convnext_tiny", 14 * 14, 384),
        ("swin_tiny_patch4_window7_224", 14 * 14, 384),
        ("resnet50_clip", 14 * 14, 1024),
        ("xcit_nano_12_p16_224", 14 * 14, 128),
    ],
)
def test_swaps_of_many_families_on_the_meta_device(name: str, tokens: int, width: int) -> None:
    with torch.device("meta"):
        encoder = TimmEncoder(TimmConfig(model_name=name)).eval()
    pixels = encoder.preprocess(Image.new("RGB", (90, 60), "red"))
    assert pixels.device.type == "cpu"
    with torch.device("meta"):
        assert encoder(torch.empty(1, *pixels.shape)).shape == (1, encoder.num_tokens, encoder.width)
    assert (encoder.num_tokens, encoder.width) == (tokens, width)


def test_prefix_is_class_and_registers() -> None:
    with torch.device("meta"):
        encoder = TimmEncoder(TimmConfig(model_name="vit_small_patch14_reg4_dinov2", image_size=28, keep_prefix=True))
    assert encoder.num_tokens == 1 + 4 + 4


def test_a_network_without_class_token_has_no_prefix_to_keep() -> None:
    with torch.device("meta"):
        for name in ("test_convnext", "convit_tiny"):
            encoder = TimmEncoder(TimmConfig(model_name=name, keep_prefix=True))
            assert encoder.num_tokens == TimmEncoder(TimmConfig(model_name=name)).num_tokens


@pytest.mark.parametrize(("name", "tokens"), [(VIT, 16), ("test_convnext", 16)])
def test_image_size(name: str, tokens: int) -> None:
    encoder = TimmEncoder(TimmConfig(model_name=name, image_size=64)).eval()
    pixels = encoder.preprocess(Image.new("L", (200, 100), 128))
    assert pixels.shape == (3, 64, 64)
    assert encoder(pixels[None]).shape == (1, tokens, encoder.width)
    assert encoder.num_tokens == tokens


def test_a_single_feature_per_picture() -> None:
    """Batch norm cannot train on it, but the network's sizes can be asked all the same."""
    encoder = TimmEncoder(TimmConfig(model_name="test_resnet", image_size=32, feature_layer=-1))
    assert encoder.eval()(pictures(2, 3, 32, 32)).shape == (2, encoder.num_tokens, encoder.width)
    assert encoder.num_tokens == 1


def test_preprocess_is_timms_own() -> None:
    encoder = TimmEncoder(TimmConfig(model_name=VIT))
    whole: Any = timm.create_model(VIT, pretrained=False)
    transform: Any = create_transform(**resolve_model_data_config(whole), is_training=False)
    image = Image.radial_gradient("L").resize((300, 200)).convert("RGB")
    assert torch.equal(encoder.preprocess(image.convert("RGBA")), transform(image))


def test_tag_in_the_name_picks_the_preprocessing() -> None:
    means = []
    for name in ("vit_base_patch16_clip_224.openai", "vit_base_patch16_224.augreg_in21k"):
        with torch.device("meta"):
            encoder = TimmEncoder(TimmConfig(model_name=name))
        means.append(encoder.preprocess(Image.new("RGB", (224, 224), "black"))[0, 0, 0].item())
    assert means == pytest.approx([-0.48145466 / 0.26862954, -0.5 / 0.5])


def test_from_name_loads_a_checkpoint_on_disk(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole: Any = timm.create_model(VIT, pretrained=False).eval()  # its classifier is not wanted, and must not matter
    path = tmp_path / "weights.safetensors"
    save_file(whole.state_dict(), path)
    encoder = TimmEncoder.from_name(VIT, str(path), feature_layer=3).eval()
    images = pictures(1, 3, 160, 160)
    (expected,) = whole.forward_intermediates(images, indices=[2], output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(encoder(images), expected)


def test_satisfies_the_protocol_in_bfloat16() -> None:
    torch.manual_seed(0)
    module = TimmEncoder(TimmConfig(model_name=VIT)).eval()
    encoder: VisionEncoder = module
    images = encoder.preprocess(Image.radial_gradient("L"))[None]
    with torch.no_grad():
        expected = encoder(images)
        features = module.to(torch.bfloat16)(images)
    assert features.dtype == torch.bfloat16
    assert (features - expected).abs().max() < 0.05 * expected.abs().max()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no model 'vit_base_patch16_siglip_225'; try vit_base_patch16_siglip_2"):
        TimmEncoder(TimmConfig(model_name="vit_base_patch16_siglip_225"))
    with pytest.raises(ValueError, match=r"no weights 'nosuch' for timm's test_vit.*r160_in1k"):
        TimmEncoder.from_name(VIT, "nosuch")
    with pytest.raises(ValueError, match="feature_layer must be from -7 to 6 for 6 blocks, not 7"):
        TimmEncoder(TimmConfig(model_name=VIT, feature_layer=7))
    for embeddings in (0, -7):
        with pytest.raises(ValueError, match="embeddings"):
            TimmEncoder(TimmConfig(model_name=VIT, feature_layer=embeddings))
    with pytest.raises(ValueError, match=r"cannot take pictures \(3, 100, 100\)"):
        TimmEncoder(TimmConfig(model_name=VIT, image_size=100))
    with pytest.raises(ValueError, match="image_size"):
        TimmConfig(model_name=VIT, image_size=0)
    with pytest.raises(ValueError, match=r"\('B', 3, 160, 160\), not \(1, 3, 160, 176\)"):
        TimmEncoder(TimmConfig(model_name=VIT))(pictures(1, 3, 160, 176))
