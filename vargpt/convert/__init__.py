"""Published checkpoints as ours, and back."""

from vargpt.convert.published import Published, convert, open_published, published_layout

__all__ = ["Published", "convert", "open_published", "published_layout"]
