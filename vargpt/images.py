"""Pictures in and out: files, PIL pictures, and tensors in [-1, 1]."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vargpt.files import atomic_file

# Not all that PIL can open: for EPS, say, it starts Ghostscript, and a picture off the web must not.
_READS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_WRITES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def load_image(source: str | os.PathLike[str] | bytes, *, name: str | None = None) -> Image.Image:
    """The picture in a file as RGB, the right way up (EXIF), transparent parts white; the first frame of several.

    Args:
        source: the file's path, or its bytes.
        name: what an error calls it; by default its path.

    Raises:
        ValueError: one line that says why the file is no picture: missing, truncated, too large, of another kind.
    """
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=_READS) as file:
            return _as_rgb(ImageOps.exif_transpose(file))
    except Exception as error:  # PIL's readers raise OSError, SyntaxError, ValueError, struct.error and more
        called = name or ("bytes" if isinstance(source, bytes) else source)
        raise ValueError(f"not a picture: {called} ({_reason(error)}); use a PNG, JPEG or WebP file") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # PIL would clip 16-bit grey to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):
        return "unknown or damaged format"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return text.splitlines()[0]


def for_drawing(image: Image.Image, size: int, crop: torch.Generator | None = None) -> Float[Tensor, "3 size size"]:
    """A picture as the image tokenizer sees it: float32 in [-1, 1].

    The shorter side becomes ``round(1.125 * size)`` (Lanczos; 288 for 256), then a square of ``size`` is cut out: at
    the centre, or where ``crop`` says. Same as torchvision's Resize and CenterCrop or RandomCrop (VAR, section 4).
    """
    image, resized = image.convert("RGB"), round(1.125 * size)
    shorter = min(image.size)
    width, height = int(resized * image.width / shorter), int(resized * image.height / shorter)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    if crop is None:
        top, left = round((height - size) / 2), round((width - size) / 2)
    else:
        top, left = (int(torch.randint(room + 1, (), generator=crop)) for room in (height - size, width - size))
    return to_tensor(image.crop((left, top, left + size, top + size)))


def to_tensor(image: Image.Image) -> Float[Tensor, "3 height width"]:
    """A picture as it is, as float32 in [-1, 1]."""
    pixels = np.asarray(image.convert("RGB"), np.float32) / 127.5 - 1
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def to_pil(images: Float[Tensor, "B 3 height width"]) -> list[Image.Image]:
    """Pictures in [-1, 1] (values beyond are clamped) as B pictures of 8-bit RGB, rounded to the nearest level."""
    levels = (images.detach().float().clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)
    return [Image.fromarray(pixels) for pixels in levels.permute(0, 2, 3, 1).cpu().numpy()]


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a picture in the format of its suffix (.png, .jpg, .jpeg, .webp): the whole file appears, or none.

    Raises:
        ValueError: one line that says why the file cannot be written.
    """
    path = Path(path)
    kind = _format(path)
    with atomic_file(path) as file:
        image.save(file, format=kind, quality=95)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out before long work whether its result can be saved.

    Raises:
        ValueError: one line that says why the file cannot be written.
    """
    path = Path(path)
    _format(path)
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path} (no directory {path.parent}); make it first")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write {path} (not writable); choose another place")


def _format(path: Path) -> str:
    if path.suffix.lower() not in _WRITES:
        raise ValueError(f"cannot write {path} (unknown suffix {path.suffix!r}); use .png, .jpg, .jpeg or .webp")
    return _WRITES[path.suffix.lower()]
