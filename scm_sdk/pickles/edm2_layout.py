"""Names and shapes of the tensors of an EDM2 network, for a strict check of a file.

Derived from the architecture; the tests compare it with the published numbers of parameters of all sizes.
Source: Karras et al. 2024, arXiv 2312.02696, appendix B and table 6.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

CLASS_NAME = "Precond"
MAX_BLOCKS = 1024
"""Maximum number of blocks of the encoder or decoder; the largest published network has 12."""
Shape = tuple[int, ...]


def edm2_shapes(arguments: Mapping[str, Any]) -> dict[str, Shape]:
    """Return name and shape of each tensor of an EDM2 network.

    Args:
        arguments: Constructor arguments; missing ones have EDM2's defaults.

    Raises:
        ValueError: If an argument is invalid for EDM2.
    """
    resolution, channels = _int(arguments, "img_resolution"), _int(arguments, "img_channels")
    labels, width = _int(arguments, "label_dim"), _int(arguments, "model_channels", 192)
    mult, blocks = _ints(arguments, "channel_mult", (1, 2, 3, 4)), _int(arguments, "num_blocks", 3)
    attention = _ints(arguments, "attn_resolutions", (16, 8), least=0)
    head = _int(arguments, "channels_per_head", 64) or 1
    if blocks * len(mult) > MAX_BLOCKS:
        raise ValueError(f"num_blocks is {blocks}, expected at most {MAX_BLOCKS // len(mult)} a resolution")
    logvar = _int(arguments, "logvar_channels", 128)
    widths = [width * m for m in mult]
    noise = width * _int(arguments, "channel_mult_noise", 1)
    embedding = width * _int(arguments, "channel_mult_emb", max(mult))
    shapes: dict[str, Shape] = {
        "unet.out_gain": (),
        "unet.emb_fourier.freqs": (noise,),
        "unet.emb_fourier.phases": (noise,),
        "unet.emb_noise.weight": (embedding, noise),
        "unet.out_conv.weight": (channels, widths[0], 3, 3),
        "logvar_fourier.freqs": (logvar,),
        "logvar_fourier.phases": (logvar,),
        "logvar_linear.weight": (1, logvar),
    }
    if labels:
        shapes["unet.emb_label.weight"] = (embedding, labels)

    def add(name: str, before: int, after: int, *, decoder: bool = False, attend: bool = False) -> None:
        attend = attend and after >= head  # narrower than one head is no attention
        shapes.update(_block(f"unet.{name}.", before, after, embedding, decoder=decoder, attend=attend))

    now, skips = channels + 1, []  # one channel of ones
    for level, after in enumerate(widths):
        size = resolution >> level
        if level == 0:
            shapes[f"unet.enc.{size}x{size}_conv.weight"] = (after, now, 3, 3)
            now = after
        else:
            add(f"enc.{size}x{size}_down", now, now)
        skips.append(now)
        for block in range(blocks):
            add(f"enc.{size}x{size}_block{block}", now, after, attend=size in attention)
            now = after
            skips.append(now)
    for level, after in reversed(list(enumerate(widths))):
        size = resolution >> level
        if level == len(widths) - 1:
            add(f"dec.{size}x{size}_in0", now, now, decoder=True, attend=True)
            add(f"dec.{size}x{size}_in1", now, now, decoder=True)
        else:
            add(f"dec.{size}x{size}_up", now, now, decoder=True)
        for block in range(blocks + 1):
            add(f"dec.{size}x{size}_block{block}", now + skips.pop(), after, decoder=True, attend=size in attention)
            now = after
    return shapes


def _block(
    name: str, before: int, after: int, embedding: int, *, decoder: bool, attend: bool
) -> Iterator[tuple[str, Shape]]:
    yield f"{name}emb_gain", ()
    yield f"{name}conv_res0.weight", (after, before if decoder else after, 3, 3)
    yield f"{name}emb_linear.weight", (after, embedding)
    yield f"{name}conv_res1.weight", (after, after, 3, 3)
    if before != after:
        yield f"{name}conv_skip.weight", (after, before, 1, 1)
    if attend:
        yield f"{name}attn_qkv.weight", (3 * after, after, 1, 1)
        yield f"{name}attn_proj.weight", (after, after, 1, 1)


def _int(arguments: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = arguments.get(name, default)
    value = default if value is None else value
    if type(value) is not int or not 0 <= value < 2**20:
        raise ValueError(f"{name} is {value!r}, expected a whole number")
    return value


def _ints(arguments: Mapping[str, Any], name: str, default: tuple[int, ...], *, least: int = 1) -> tuple[int, ...]:
    value = arguments.get(name, default)
    if not isinstance(value, list | tuple) or not least <= len(value) <= 16:
        raise ValueError(f"{name} is not a short list of whole numbers")
    return tuple(_int({name: each}, name) for each in value)
