"""Convert a sampler's output to images and clips: 8-bit arrays, PIL images, contact sheets, files.

Arrays of a sampler are (B, C, H, W) float32 in data units, or (B, C, T, H, W) for clips; pictures are (H, W, C) uint8,
clips (T, H, W, C). C is 1 for gray and 3 for RGB. Callers: ``generator``, ``evaluate``, ``train``, the commands.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ._util.files import atomic_write_bytes
from ._util.lazy import require
from .errors import BackendUnavailable, ConfigError, ShapeError

if TYPE_CHECKING:
    from PIL import Image


_JPEG: dict[str, Any] = {"format": "JPEG", "quality": 95, "subsampling": 0}
PICTURE_FORMATS: Mapping[str, Mapping[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": {"format": "WEBP", "quality": 95},
}
"""Suffix of a picture file: Pillow's arguments that write it."""
CLIP_FORMATS = (".gif", ".webp", ".mp4")
"""Suffixes of a clip's file."""
MAX_FPS = 240


def to_uint8(images: NDArray[np.floating[Any]], value_range: tuple[float, float]) -> NDArray[np.uint8]:
    """Map samples in data units to 8-bit pictures.

    A value x becomes ``(x - lo) / (hi - lo) * 255``, rounded to the nearest level and clipped.

    Args:
        images: Samples, (B, C, H, W) with C 1 or 3, floating point, data units.
        value_range: Values (lo, hi) that become black (0) and full (255); ``spec.value_range``.

    Returns:
        Pictures, (B, H, W, C), uint8, owned by the caller.

    Raises:
        ShapeError: If the shape or the dtype differs from that.
        ConfigError: If ``value_range`` is empty or a sample holds NaN or infinity.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or min(images.shape[2:]) < 1:
        raise ShapeError(
            f"images have shape {images.shape}, expected (B, C, H, W) with C = 1 (gray) or 3 (RGB). "
            "For latents take output_type='raw', for clips 'frames', for other data 'raw' or 'np'."
        )
    if not np.issubdtype(images.dtype, np.floating):
        raise ShapeError(f"images are {images.dtype}, expected floating point numbers in data units.")
    low, high = value_range
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"value_range is {value_range}, expected two finite numbers (lowest, highest).")
    bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
    if bad.size:
        raise ConfigError(
            f"sample {bad[0]} holds NaN or infinity ({bad.size} of {len(images)} samples do), expected "
            "finite numbers. Compare with another backend or precision: scm-export validate"
        )
    levels = (images.astype(np.float64) - low) * (255.0 / (high - low))
    return np.ascontiguousarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


def to_pil(images: NDArray[np.floating[Any]], value_range: tuple[float, float]) -> list[Image.Image]:
    """Map samples in data units to PIL images, mode ``L`` for gray and ``RGB`` for color.

    Arguments and errors are those of ``to_uint8``.
    """
    return [_pil(picture) for picture in to_uint8(images, value_range)]


def clips_to_uint8(clips: NDArray[np.floating[Any]], value_range: tuple[float, float]) -> NDArray[np.uint8]:
    """Map clips in data units to 8-bit pictures, (B, T, H, W, C).

    Args:
        clips: (B, C, T, H, W) with C 1 or 3, floating point, data units.
        value_range: As in ``to_uint8``.

    Raises:
        ShapeError: If the shape or the dtype differs from that.
        ConfigError: As ``to_uint8``.
    """
    if clips.ndim != 5 or clips.shape[1] not in (1, 3) or min(clips.shape[2:]) < 1:
        raise ShapeError(
            f"clips have shape {clips.shape}, expected (B, C, T, H, W) with C = 1 (gray) or 3 (RGB). For images take "
            "output_type='pil', for other data 'raw' or 'np'."
        )
    pictures = to_uint8(clips.swapaxes(1, 2).reshape(-1, clips.shape[1], *clips.shape[3:]), value_range)
    return pictures.reshape(len(clips), -1, *pictures.shape[1:])


def clips_to_pil(clips: NDArray[np.floating[Any]], value_range: tuple[float, float]) -> list[list[Image.Image]]:
    """Map clips in data units to lists of PIL images, one list for each clip.

    Arguments and errors are those of ``clips_to_uint8``.
    """
    return [[_pil(picture) for picture in clip] for clip in clips_to_uint8(clips, value_range)]


def save_clip(clip_uint8: NDArray[np.uint8], path: str | os.PathLike[str], *, fps: float = 16.0) -> None:
    """Write one clip in the format that the file's suffix names, whole or not at all.

    Args:
        clip_uint8: Frames, (T, H, W, C) with C 1 or 3, uint8.
        path: The file; its suffix is one of ``CLIP_FORMATS``.
        fps: Frames per second.

    Raises:
        ConfigError: If the suffix is another.
        ScmError: As ``encode_clip``, and if the file cannot be written.
    """
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    if suffix not in CLIP_FORMATS:
        raise ConfigError(f"{os.fspath(path)} ends in {suffix!r}, expected one of {', '.join(CLIP_FORMATS)}.")
    atomic_write_bytes(path, encode_clip(clip_uint8, suffix, fps=fps))


def encode_clip(clip_uint8: NDArray[np.uint8], suffix: str, *, fps: float = 16.0) -> bytes:
    """Return one clip as the bytes of a file.

    GIF has 256 colors and hundredths of a second; WebP and MP4 (H.264) are lossy. GIF and WebP repeat without end.

    Args:
        clip_uint8: Frames, (T, H, W, C) with C 1 or 3, uint8.
        suffix: The file's format, one of ``CLIP_FORMATS``.
        fps: Frames per second.

    Raises:
        ConfigError: If the suffix is another, or ``fps`` is not in (0, 240].
        ShapeError: If the shape or the dtype differs from that, or an MP4 file's height or width is odd.
        BackendUnavailable: If PyAV, which writes MP4 files, is not installed, or has no H.264 encoder.
    """
    if suffix not in CLIP_FORMATS:
        raise ConfigError(f"suffix is {suffix!r}, expected one of {', '.join(CLIP_FORMATS)}.")
    if not 0 < fps <= MAX_FPS:
        raise ConfigError(f"fps is {fps}, expected a number above 0 and at most {MAX_FPS}.")
    fits = clip_uint8.ndim == 4 and clip_uint8.dtype == np.uint8 and clip_uint8.shape[3] in (1, 3)
    if not fits or not clip_uint8.size:
        raise ShapeError(
            f"clip is {clip_uint8.shape} {clip_uint8.dtype}, expected (T, H, W, C) uint8 with C = 1 or 3. "
            "scm_sdk.images.clips_to_uint8 makes such arrays."
        )
    return _mp4(clip_uint8, fps) if suffix == ".mp4" else _animation(clip_uint8, suffix, fps)


def _animation(clip: NDArray[np.uint8], suffix: str, fps: float) -> bytes:
    first, *rest = [_pil(picture) for picture in clip]
    options = {"format": "GIF"} if suffix == ".gif" else {**PICTURE_FORMATS[".webp"]}
    buffer = io.BytesIO()
    first.save(buffer, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, **options)
    return buffer.getvalue()


def _mp4(clip: NDArray[np.uint8], fps: float) -> bytes:
    """Encode H.264 with the chroma subsampling that every player reads."""
    if clip.shape[1] % 2 or clip.shape[2] % 2:
        raise ShapeError(
            f"frames are {clip.shape[1]}x{clip.shape[2]}, expected an even height and width for H.264. Take GIF or "
            "WebP."
        )
    av: Any = require("av", extra="video", purpose="writing an MP4 file")
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width = clip.shape[1:3]
            stream.pix_fmt, stream.options = "yuv420p", {"crf": "16"}
            for picture in np.broadcast_to(clip, (*clip.shape[:3], 3)):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    except (av.error.FFmpegError, ValueError) as exc:  # ValueError: it was built without the encoder
        raise BackendUnavailable(
            f"PyAV {av.__version__} cannot write H.264: {exc}. Expected its encoder libx264; take GIF or WebP."
        ) from exc
    return buffer.getvalue()


def make_grid(images_uint8: NDArray[np.uint8], columns: int, scale: int = 1, *, padding: int = 0) -> NDArray[np.uint8]:
    """Arrange pictures in a grid, row by row.

    Args:
        images_uint8: Pictures, (B, H, W, C), uint8.
        columns: Pictures in a row, 1 or more. Places left over in the last row are white.
        scale: Each pixel becomes a square of this many pixels a side.
        padding: White pixels between neighbors, after scaling.

    Returns:
        One picture, (rows*H*scale + gaps, columns*W*scale + gaps, C), uint8.

    Raises:
        ShapeError: If the shape or the dtype differs from that, or there is no picture.
        ConfigError: If ``columns``, ``scale`` or ``padding`` is out of range.
    """
    if images_uint8.ndim != 4 or images_uint8.dtype != np.uint8 or not images_uint8.size:
        raise ShapeError(
            f"pictures are {images_uint8.shape} {images_uint8.dtype}, expected (B, H, W, C) uint8, B >= 1. "
            "scm_sdk.images.to_uint8 makes them."
        )
    if columns < 1 or scale < 1 or padding < 0:
        raise ConfigError(
            f"columns is {columns}, scale {scale}, padding {padding}, expected columns and scale of 1 or "
            "more and padding of 0 or more."
        )
    pictures = images_uint8.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = pictures.shape
    rows = -(-count // columns)
    cell_height, cell_width = height + padding, width + padding
    cells = np.full((rows * columns, cell_height, cell_width, channels), 255, np.uint8)
    cells[:count, :height, :width] = pictures
    sheet = cells.reshape(rows, columns, cell_height, cell_width, channels).swapaxes(1, 2)
    whole = sheet.reshape(rows * cell_height, columns * cell_width, channels)
    return np.ascontiguousarray(whole[: rows * cell_height - padding, : columns * cell_width - padding])


def save_png(array_uint8: NDArray[np.uint8], path: str | os.PathLike[str]) -> None:
    """Write one picture as a PNG file, whole or not at all.

    Args:
        array_uint8: Picture, (H, W, C) with C 1 or 3, uint8.
        path: The file.

    Raises:
        ShapeError: If the shape or the dtype differs from that.
        ScmError: If the file cannot be written.
    """
    atomic_write_bytes(path, encode_picture(array_uint8, ".png"))


def save_picture(
    array_uint8: NDArray[np.uint8], path: str | os.PathLike[str], *, texts: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write one picture in the format that the file's suffix names, whole or not at all.

    JPEG and WebP are lossy: the file holds other levels than the array.

    Args:
        array_uint8: Picture, (H, W, C) with C 1 or 3, uint8.
        path: The file; its suffix is one of ``PICTURE_FORMATS``.
        texts: Keyword and text of each tEXt chunk of a PNG file, Latin-1; the other formats have no such place.

    Raises:
        ConfigError: If the suffix is another.
        ShapeError: If the shape or the dtype differs from that.
        ScmError: If the file cannot be written.
    """
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    if suffix not in PICTURE_FORMATS:
        raise ConfigError(f"{os.fspath(path)} ends in {suffix!r}, expected one of {', '.join(PICTURE_FORMATS)}.")
    atomic_write_bytes(path, encode_picture(array_uint8, suffix, texts=texts))


def encode_picture(
    array_uint8: NDArray[np.uint8], suffix: str, *, texts: Mapping[str, str] = MappingProxyType({})
) -> bytes:
    """Return one picture as the bytes of a file.

    Args:
        array_uint8: Picture, (H, W, C) with C 1 or 3, uint8.
        suffix: The file's format, one of ``PICTURE_FORMATS``.
        texts: As in ``save_picture``.

    Raises:
        ConfigError: If the suffix is another.
        ShapeError: If the shape or the dtype differs from that.
    """
    if suffix not in PICTURE_FORMATS:
        raise ConfigError(f"suffix is {suffix!r}, expected one of {', '.join(PICTURE_FORMATS)}.")
    fits = array_uint8.ndim == 3 and array_uint8.dtype == np.uint8 and array_uint8.shape[2] in (1, 3)
    if not fits or not array_uint8.size:
        raise ShapeError(
            f"picture is {array_uint8.shape} {array_uint8.dtype}, expected (H, W, C) uint8 with C = 1 or 3. "
            "scm_sdk.images.to_uint8 and make_grid make such arrays."
        )
    buffer, options = io.BytesIO(), dict(PICTURE_FORMATS[suffix])
    if suffix == ".png" and texts:
        from PIL.PngImagePlugin import PngInfo

        options["pnginfo"] = PngInfo()
        for keyword, text in texts.items():
            options["pnginfo"].add_text(keyword, text)
    _pil(array_uint8).save(buffer, **options)
    return buffer.getvalue()


def _pil(picture: NDArray[np.uint8]) -> Image.Image:
    # Inside: generating arrays never needs it, and it would slow the start of every process.
    from PIL import Image

    return Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
