"""Pictures in and out: reading whatever a file holds, the drawing crop, and writing all or nothing."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from vargpt.images import check_writable, for_drawing, load_image, save_image, to_pil


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def same(image: Image.Image, other: Image.Image) -> bool:
    """The same pixels; ``==`` would compare the metadata too."""
    return np.array_equal(np.asarray(image), np.asarray(other))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class TestLoadImage:
    @pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "I;16", "RGBA", "LA"])
    def test_gives_rgb(self, tmp_path: Path, mode: str) -> None:
        grey = np.array([[0, 153, 255]], np.uint8)  # a level that PIL's standard palette has
        if mode == "I;16":
            image = Image.fromarray(grey.astype(np.uint16) * 256 + 99)
        else:
            image = Image.fromarray(grey).convert("RGB").convert(mode, dither=Image.Dither.NONE)
        path = tmp_path / "a.tiff"
        image.save(path)
        loaded = load_image(path)
        assert loaded.mode == "RGB"
        expected = [[0, 255, 255]] if mode == "1" else grey
        np.testing.assert_allclose(np.asarray(loaded)[..., 1], expected, atol=1)

    def test_transparency_becomes_white(self, tmp_path: Path) -> None:
        image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
        image.putpixel((1, 0), (255, 0, 0, 255))
        image.save(tmp_path / "rgba.png")
        image.quantize(4).save(tmp_path / "palette.png")
        Image.new("RGB", (2, 1), "black").save(tmp_path / "key.png", transparency=(0, 0, 0))
        for name, second in {"rgba": (255, 0, 0), "palette": (255, 0, 0), "key": (255, 255, 255)}.items():
            loaded = load_image(tmp_path / f"{name}.png")
            assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), second], name

    def test_turns_the_right_way_up(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # Orientation: the camera was turned by a quarter
        image = noise(5, 3)
        image.save(tmp_path / "a.png", exif=exif)
        assert same(load_image(tmp_path / "a.png"), image.transpose(Image.Transpose.ROTATE_270))

    def test_first_frame_of_an_animation(self, tmp_path: Path) -> None:
        frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
        assert load_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)

    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            ("missing.png", None, "no such file"),
            ("text.png", b"hello", "unknown or damaged format"),
            ("empty.jpg", b"", "unknown or damaged format"),
            ("cut.png", encoded(noise(64, 64), "PNG")[:5000], "truncated"),
            ("cut.jpg", encoded(noise(64, 64), "JPEG")[:2000], "truncated"),
            ("page.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "unknown or damaged"),
            ("bomb.png", encoded(Image.new("1", (20000, 20000)), "PNG"), "exceeds limit"),
        ],
    )
    def test_says_in_one_line_why_not(self, tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        line = rf"\Anot a picture: {re.escape(str(path))} \(.*{reason}.*\); use a PNG, JPEG or WebP file\Z"
        with pytest.raises(ValueError, match=line):  # a dot is no line break
            load_image(path)

    def test_refuses_a_directory(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"not a picture: .* \(Is a directory\)"):
            load_image(tmp_path)

    @pytest.mark.filterwarnings("ignore")  # PIL warns of some damage that it reads over
    @settings(max_examples=150, deadline=None)
    @given(kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]), data=st.data())
    def test_damaged_files_never_end_in_another_error(self, tmp_path_factory, kind: str, data: st.DataObject) -> None:
        content = bytearray(encoded(noise(9, 7), kind))
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, min(len(content), 120) - 1))] = data.draw(st.integers(0, 255))
        path = tmp_path_factory.getbasetemp() / f"damaged.{kind}"
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        try:
            outcome = load_image(path).mode
        except ValueError as error:
            outcome = str(error)
        assert outcome == "RGB" or outcome.startswith("not a picture: ")


class TestForDrawing:
    @pytest.mark.parametrize("shape", [(300, 200), (200, 301), (256, 256), (40, 57), (9, 100)])
    @pytest.mark.parametrize("size", [256, 33])
    def test_is_torchvisions_resize_and_centre_crop(self, shape: tuple[int, int], size: int) -> None:
        image = noise(*shape)
        published = transforms.Compose(
            [
                transforms.Resize(round(1.125 * size), interpolation=transforms.InterpolationMode.LANCZOS),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                lambda x: x * 2 - 1,
            ]
        )
        pixels = for_drawing(image, size)
        assert (pixels.shape, pixels.dtype, pixels.is_contiguous()) == ((3, size, size), torch.float32, True)
        torch.testing.assert_close(pixels, published(image), atol=1e-6, rtol=0)

    def test_range_is_minus_one_to_one(self) -> None:
        image = Image.new("L", (20, 20), 0)
        assert for_drawing(image, 8).eq(-1).all()
        assert for_drawing(Image.new("L", (20, 20), 255), 8).eq(1).all()

    def test_random_crop_follows_the_generator_and_reaches_every_place(self) -> None:
        image = noise(36, 18)  # already of the resized height, so crops are exact
        whole = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
        generator = torch.Generator().manual_seed(0)
        places = set()
        for _ in range(1000):
            crop = for_drawing(image, 16, generator)
            windows = whole.unfold(1, 16, 1).unfold(2, 16, 1)  # 3, top, left, 16, 16
            (place,) = (windows - crop[:, None, None]).abs().amax(dim=(0, 3, 4)).lt(1e-6).nonzero().tolist()
            places.add(tuple(place))
        assert places == {(top, left) for top in range(3) for left in range(21)}
        twice = [for_drawing(image, 16, torch.Generator().manual_seed(7)) for _ in range(2)]
        assert torch.equal(*twice)


class TestToPil:
    def test_inverts_for_drawing(self) -> None:
        levels = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
        pixels = torch.from_numpy(np.array(levels)).permute(2, 0, 1) / 127.5 - 1
        assert to_pil(torch.stack([pixels, -pixels])) == [levels, Image.eval(levels, lambda level: 255 - level)]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_clamps(self, dtype: torch.dtype) -> None:
        images = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0], dtype=dtype, requires_grad=True).expand(1, 3, 1, 5)
        (image,) = to_pil(images)
        assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 128, 255, 255]


class TestSaveImage:
    @pytest.mark.parametrize(
        ("name", "kind"), [("a.png", "PNG"), ("b.JPG", "JPEG"), ("c.jpeg", "JPEG"), ("d.webp", "WEBP")]
    )
    def test_format_follows_the_suffix(self, tmp_path: Path, name: str, kind: str) -> None:
        save_image(noise(8, 6), tmp_path / name)
        with Image.open(tmp_path / name) as saved:
            assert (saved.format, saved.size) == (kind, (8, 6))
        assert [path.name for path in tmp_path.iterdir()] == [name]

    def test_replaces_and_reads_back(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        path.write_text("old")
        save_image(noise(8, 6), str(path))
        assert same(load_image(path), noise(8, 6))

    @pytest.mark.parametrize("name", ["a", "a.xyz", "a.pdf"])
    def test_refuses_an_unknown_suffix(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ValueError, match=r"unknown suffix .*use \.png, \.jpg, \.jpeg or \.webp"):
            save_image(noise(8, 6), tmp_path / name)
        assert not list(tmp_path.iterdir())

    def test_refuses_places_it_cannot_write_to(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "dir.png").mkdir()
        for place, reason in {
            "none/a.png": "No such file",
            "file/a.png": "Not a directory",
            "dir.png": "directory",
        }.items():
            with pytest.raises(ValueError, match=f"cannot write .*{place} .*{reason}"):
                save_image(noise(8, 6), tmp_path / place)
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["dir.png", "file"]

    def test_refuses_pixels_the_format_cannot_hold(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"cannot write .*a\.jpg \(cannot write mode RGBA as JPEG\)"):
            save_image(noise(8, 6).convert("RGBA"), tmp_path / "a.jpg")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
    @pytest.mark.parametrize("step", ["save", "replace"])
    def test_an_interruption_leaves_the_old_file_and_nothing_else(self, tmp_path, monkeypatch, error, step) -> None:
        path = tmp_path / "a.png"
        path.write_text("old")

        def interrupted_save(self, file, **options) -> None:
            file.write(b"half a pic")
            raise error

        def interrupted_replace(source, target) -> None:
            assert (Path(source).parent, target) == (tmp_path, path)
            with Image.open(source) as written:
                assert same(written, noise(8, 6))
            raise error

        if step == "save":
            monkeypatch.setattr(Image.Image, "save", interrupted_save)
        else:
            monkeypatch.setattr("os.replace", interrupted_replace)
        with pytest.raises(error):
            save_image(noise(8, 6), path)
        assert [item.name for item in tmp_path.iterdir()] == ["a.png"]
        assert path.read_text() == "old"


class TestCheckWritable:
    def test_says_what_save_image_would(self, tmp_path: Path) -> None:
        (tmp_path / "dir.png").mkdir()
        check_writable(tmp_path / "a.png")
        for place, reason in {
            "a.xyz": r"unknown suffix '\.xyz'",
            "none/a.png": "no directory .*none",
            "dir.png": "not writable",
        }.items():
            for function in (check_writable, lambda path: save_image(noise(8, 6), path)):
                with pytest.raises(ValueError, match=f"cannot write .*{place}"):
                    function(tmp_path / place)
            with pytest.raises(ValueError, match=reason):
                check_writable(tmp_path / place)
        assert [path.name for path in tmp_path.iterdir()] == ["dir.png"]
