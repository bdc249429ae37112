"""Decode image files: for training, from folders and shards, and to start samplers from.

Images become 8-bit gray or RGB. 16-bit images keep their range and lose their lower bits. The EXIF orientation is
applied. Transparent pixels become white. Animations, of which only a part would be read, and 32-bit and floating-point
images, whose range is unknown, are refused.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..._util.files import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
BACKGROUND = (255, 255, 255)
"""Color of transparent pixels."""
_GREY = frozenset({"1", "L", "LA", "La", "I", "F"})


def look_at(content: bytes, *, max_pixels: int) -> tuple[int, int, int]:
    """Return height, width and channels of an image: 1 channel for gray, else 3.

    Raises:
        ValueError: If it is not a supported image, or is too large; with the reason.
    """
    with _opened(content) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"it is {image.height}x{image.width}, expected at most {max_pixels} pixels")
        return _shape(image)


def decode_picture(
    file: Path | bytes, *, shape: tuple[int, int, int] | None = None, formats: tuple[str, ...] | None = None
) -> NDArray[np.uint8]:
    """Decode an image file.

    Args:
        file: Path or content of the file.
        shape: Required (H, W, C), checked before decoding. With 3 channels a gray image is converted to RGB; with 1 a
            color image is refused. None accepts any size, in RGB.
        formats: Pillow's names of the accepted formats; None is all that Pillow reads.

    Returns:
        Pixels, (H, W, C), uint8.

    Raises:
        ValueError: If it cannot be read, or has another shape; with the reason.
    """
    with _opened(file, formats) as image:
        if shape is not None and sorted(image.size) != sorted(shape[:2]):
            raise ValueError(f"it is {image.height}x{image.width}, expected {shape[0]}x{shape[1]}")
        height, width, channels = _shape(image)
        if shape is not None and (height, width) != shape[:2]:
            raise ValueError(f"it is rotated, as {height}x{width}, expected {shape[0]}x{shape[1]}")
        if shape is not None and channels > shape[2]:
            raise ValueError("it has colors, expected a gray picture")
        gray = shape is not None and shape[2] == 1
        from PIL import ImageOps

        pixels = np.asarray(_flat(ImageOps.exif_transpose(image)).convert("L" if gray else "RGB"))
        return pixels.reshape(height, width, 1 if gray else 3)


@contextmanager
def _opened(file: Path | bytes, formats: tuple[str, ...] | None = None) -> Iterator[Image]:
    """Open an image; any exception of Pillow becomes a ``ValueError``."""
    from PIL import Image, UnidentifiedImageError

    try:
        with (
            io.BytesIO(file) if isinstance(file, bytes) else open_regular(file) as stream,
            Image.open(stream, formats=formats) as image,
        ):
            if (frames := getattr(image, "n_frames", 1)) > 1:
                raise ValueError(f"it holds {frames} pictures, an animation or pages; expected one")
            if image.mode == "F":
                raise ValueError("it holds floating point pixels, whose range it does not say; expected 8 or 16 bits")
            yield image
    except ValueError:
        raise
    except UnidentifiedImageError as exc:  # its message names an object in memory
        raise ValueError(f"it is no {' or '.join(formats) if formats else 'picture'} file that can be read") from exc
    except (
        Exception
    ) as exc:  # SyntaxError, struct.error, zlib.error, DecompressionBombError and others, depending on the format
        raise ValueError(f"{type(exc).__name__}: {exc}") from exc


def _shape(image: Image) -> tuple[int, int, int]:
    """Return height, width and channels after applying the EXIF orientation; PNG is decoded for that."""
    width, height = image.size
    if image.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # orientations with a rotation by 90 degrees
        width, height = height, width
    return height, width, 1 if image.mode in _GREY or image.mode.startswith("I;16") else 3


def _flat(image: Image) -> Image:
    """Convert an image to 8 bits without transparency."""
    from PIL import Image

    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its pixels reach from {values.min()} to {values.max()}, expected 8 or 16 bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image.convert("RGBA"))
    return image
