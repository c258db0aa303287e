"""OpenClipEncoder against open_clip itself: features, names, weights on disk, preprocessing, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vargpt.interfaces import VisionEncoder
from vargpt.vision import OpenClipConfig, OpenClipEncoder

TINY = OpenClipConfig(image_size=12, patch_size=4, width=16, depth=3, num_heads=2, mlp_width=40)


@pytest.fixture
def tiny_model(tmp_path: Path):
    """Registers an open_clip model with a tiny vision tower; gives its name and the model, with random weights."""

    def make(name: str, quick_gelu: bool = True, **vision_cfg) -> tuple[str, open_clip.CLIP]:
        tower = {"image_size": 12, "patch_size": 4, "width": 16, "head_width": 8, "layers": 3, "mlp_ratio": 2.5}
        text = {"context_length": 8, "vocab_size": 32, "width": 8, "heads": 1, "layers": 1}
        config = {"embed_dim": 8, "quick_gelu": quick_gelu, "vision_cfg": tower | vision_cfg, "text_cfg": text}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)
        model = open_clip.create_model(name)
        assert isinstance(model, open_clip.CLIP)
        with torch.no_grad():
            for parameter in model.visual.parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter))
        return name, model.eval()

    return make


def pictures(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def hidden_state(visual, pixel_values: torch.Tensor, block: int) -> torch.Tensor:
    """What open_clip says comes out of a block: class token, then patches."""
    out = visual.forward_intermediates(
        pixel_values, indices=[block], output_fmt="NLC", output_extra_tokens=True, intermediates_only=True
    )
    return torch.cat([out["image_intermediates_prefix"][0], out["image_intermediates"][0]], dim=1)


@pytest.mark.parametrize(
    "tower",
    [
        {},
        {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        {"ls_init_value": 0.1},
        {"pos_embed_type": "sin_cos_2d"},
        {"norm_kwargs": {"eps": 0.5}},
        {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True},
        {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        {"image_size": [12, 12], "patch_size": [6, 6], "patch_dropout": 0.5},
    ],
    ids=lambda tower: "-".join(tower) or "plain",
)
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_from_name_gives_open_clips_hidden_states(tiny_model, tmp_path, tower, quick_gelu) -> None:
    name, model = tiny_model("tiny-" + ("-".join(tower) or "plain") + str(quick_gelu), quick_gelu, **tower)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "weights.safetensors")
    images = pictures(2, 3, 12, 12)
    for feature_layer in (1, 2, -1):
        encoder = OpenClipEncoder.from_name(name, str(tmp_path / "weights.safetensors"), feature_layer)
        expected = hidden_state(model.visual, images, encoder.config.num_blocks - 1)
        torch.testing.assert_close(encoder(images), expected[:, 1:])
        with_cls = OpenClipEncoder(replace(encoder.config, keep_cls=True))
        with_cls.load_tower(model.state_dict())
        torch.testing.assert_close(with_cls(images), expected)
        assert (with_cls.num_tokens, with_cls.width) == (expected.shape[1], expected.shape[2])
        assert encoder.num_tokens == expected.shape[1] - 1


def test_parameter_names_are_open_clips_and_nothing_unused_is_built() -> None:
    names = {name for name, _ in OpenClipEncoder(TINY).named_parameters()}
    block = "ln_1.weight ln_1.bias ln_2.weight ln_2.bias attn.in_proj_weight attn.in_proj_bias attn.out_proj.weight"
    block += " attn.out_proj.bias mlp.c_fc.weight mlp.c_fc.bias mlp.c_proj.weight mlp.c_proj.bias"
    stem = ["conv1.weight", "class_embedding", "positional_embedding", "ln_pre.weight", "ln_pre.bias"]
    blocks = [f"transformer.resblocks.{i}.{name}" for i in (0, 1) for name in block.split()]
    assert names == {f"visual.{name}" for name in stem + blocks}


@pytest.mark.parametrize(
    ("feature_layer", "blocks"), [(-4, 0), (0, 0), (-3, 1), (1, 1), (-2, 2), (2, 2), (-1, 3), (3, 3)]
)
def test_feature_layer_counts_hidden_states(feature_layer: int, blocks: int) -> None:
    encoder = OpenClipEncoder(replace(TINY, feature_layer=feature_layer))
    assert len(encoder.visual.transformer.resblocks) == blocks
    assert encoder(pictures(1, 3, 12, 12)).shape == (1, 9, 16)


def test_mlp_width_is_exact() -> None:
    for mlp_width in range(1, 60):  # int(width * (mlp_width / width)) is one less for some
        encoder = OpenClipEncoder(replace(TINY, width=49, num_heads=1, mlp_width=mlp_width, depth=2))
        assert encoder.get_parameter("visual.transformer.resblocks.0.mlp.c_fc.weight").shape[0] == mlp_width


def test_modes_agree() -> None:
    """nn.MultiheadAttention has a fused path for inference; it must be the same function."""
    torch.manual_seed(0)
    encoder, images = OpenClipEncoder(TINY), pictures(2, 3, 12, 12)
    trained = encoder.train()(images)
    with torch.no_grad():
        for module in (encoder.train(), encoder.eval()):
            torch.testing.assert_close(module(images), trained.detach())
    torch.testing.assert_close(encoder.eval()(images), trained)
    trained.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_weights_take_float32_pictures(training: bool) -> None:
    torch.manual_seed(0)
    encoder, images = OpenClipEncoder(TINY).train(training), pictures(2, 3, 12, 12)
    with torch.no_grad():
        expected = encoder(images)
        features = encoder.to(torch.bfloat16)(images)
    assert features.dtype == torch.bfloat16
    assert (features - expected).abs().max() < 0.03 * expected.abs().max()


def test_satisfies_the_protocol() -> None:
    encoder: VisionEncoder = OpenClipEncoder(TINY)
    image = encoder.preprocess(Image.new("RGB", (30, 20), "red"))
    assert encoder(image[None]).shape == (1, encoder.num_tokens, encoder.width)


def test_every_plain_open_clip_tower_builds_on_the_meta_device() -> None:
    built = 0
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        assert config is not None
        tower = config["vision_cfg"]
        if "timm_model_name" in tower or isinstance(tower["layers"], list):
            with pytest.raises(ValueError, match="TimmEncoder"):
                OpenClipEncoder.from_name(name)
            continue
        with torch.device("meta"):
            encoder = OpenClipEncoder.from_name(name)
        assert encoder.visual.positional_embedding.shape == (1 + encoder.num_tokens, tower["width"])
        assert len(encoder.visual.transformer.resblocks) == tower["layers"] - 1
        built += 1
    assert built > 40


def test_vargpts_tower() -> None:
    with torch.device("meta"):
        encoder = OpenClipEncoder.from_name("ViT-L-14-336-quickgelu", keep_cls=False)
    expected = OpenClipConfig(image_size=336, patch_size=14, width=1024, depth=24, num_heads=16, mlp_width=4096)
    assert encoder.config == expected
    assert (encoder.num_tokens, len(encoder.visual.transformer.resblocks)) == (576, 23)


def test_a_tag_decides_preprocessing_and_activation(tiny_model, tmp_path, monkeypatch) -> None:
    name, model = tiny_model("tiny-tag", quick_gelu=False)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    tag = {"file": str(tmp_path / "weights.pt"), "mean": (0.5, 0.5, 0.5), "std": (0.1, 0.2, 0.3), "quick_gelu": True}
    tag |= {"interpolation": "bilinear", "resize_mode": "squash"}
    monkeypatch.setitem(sys.modules["open_clip.pretrained"]._PRETRAINED, name, {"some_tag": tag})
    encoder = OpenClipEncoder.from_name(name, "some_tag")
    assert encoder.config.quick_gelu
    assert (encoder.config.mean, encoder.config.std) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    assert (encoder.config.interpolation, encoder.config.resize) == ("bilinear", "squash")
    torch.testing.assert_close(encoder.visual.conv1.weight, model.visual.conv1.weight)
    with pytest.raises(ValueError, match=r"'other' for tiny-tag.*some_tag"):
        OpenClipEncoder.from_name(name, "other")


def test_load_tower_refuses_what_does_not_fit() -> None:
    whole = OpenClipEncoder(replace(TINY, feature_layer=-1)).state_dict()
    encoder = OpenClipEncoder(TINY)
    encoder.load_tower(whole | {"visual.proj": torch.ones(1), "logit_scale": torch.ones(1)})
    torch.testing.assert_close(dict(encoder.state_dict()), {name: whole[name] for name in encoder.state_dict()})
    with pytest.raises(ValueError, match=r"visual\.conv1\.weight"):
        encoder.load_tower({name: tensor for name, tensor in whole.items() if "conv1" not in name})
    with pytest.raises(ValueError, match=r"visual\.surprise"):
        encoder.load_tower(whole | {"visual.surprise": torch.ones(1)})
    with pytest.raises(ValueError, match=r"visual\.class_embedding"):
        encoder.load_tower(whole | {"visual.class_embedding": torch.ones(3)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 13}, "image_size 13 must be a multiple of patch_size 4"),
        ({"num_heads": 3}, "width 16 must be a multiple of num_heads 3"),
        ({"feature_layer": 4}, "feature_layer must be from -4 to 3 for 3 blocks, not 4"),
        ({"feature_layer": -5}, "not -5"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"mean": (0.5,)}, "mean and std"),
        ({"interpolation": "cubic"}, "interpolation"),
        ({"resize": "longest"}, "resize"),
        ({"options": {"proj": 1}}, r"unknown options \['proj'\]"),
    ],
)
def test_config_refusals(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_from_name_refusals(tiny_model) -> None:
    with pytest.raises(ValueError, match="no model 'ViT-L-14-337'; try ViT-L-14-336"):
        OpenClipEncoder.from_name("ViT-L-14-337")
    with pytest.raises(ValueError, match="'vit_base_patch16_siglip_224'"):
        OpenClipEncoder.from_name("ViT-B-16-SigLIP")
    for name, tower in {
        "act": {"act_kwargs": {"approximate": "tanh"}},
        "cosine": {"scaled_cosine_attn": True},
        "norm": {"norm_kwargs": {"bias": False}},
    }.items():
        with pytest.raises(ValueError, match="cannot build"):
            OpenClipEncoder.from_name(tiny_model(f"tiny-bad-{name}", quick_gelu=False, **tower)[0])
    name, _ = tiny_model("tiny-wide", image_size=[12, 16])
    with pytest.raises(ValueError, match=r"square.*\[12, 16\]"):
        OpenClipEncoder.from_name(name)


def test_forward_names_the_wrong_size() -> None:
    with pytest.raises(ValueError, match=r"\('B', 3, 12, 12\), not \(1, 3, 12, 16\)"):
        OpenClipEncoder(TINY)(pictures(1, 3, 12, 16))


def test_preprocess_resizes_crops_and_normalises() -> None:
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 8, 20))  # outside the centre square
    config = replace(TINY, mean=(0.5, 0.0, 0.25), std=(0.5, 1.0, 0.25))
    red = torch.tensor([1.0, 0.0, -1.0])[:, None, None].expand(3, 12, 12)
    torch.testing.assert_close(OpenClipEncoder(config).preprocess(image), red)
    squashed = OpenClipEncoder(replace(config, resize="squash")).preprocess(image)
    torch.testing.assert_close(squashed[:, 0, 0], torch.tensor([-1.0, 0.0, 3.0]))
    torch.testing.assert_close(squashed[:, 0, -1], torch.tensor([1.0, 0.0, -1.0]))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_preprocess_takes_any_kind_of_picture(mode: str) -> None:
    pixels = OpenClipEncoder(TINY).preprocess(Image.new("RGB", (5, 31), "white").convert(mode))
    white = (1 - torch.tensor(TINY.mean)) / torch.tensor(TINY.std)
    torch.testing.assert_close(pixels, white[:, None, None].expand(3, 12, 12))


def test_importing_loads_no_backend() -> None:
    backends = {"open_clip", "timm", "torchvision", "transformers"}
    code = f"import sys, vargpt.vision; sys.exit(bool({backends} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
