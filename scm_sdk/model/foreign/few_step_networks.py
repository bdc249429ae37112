"""The denoisers and decoders of the few-step flow pipelines, each as a module with any batch size and real numbers.

A denoiser takes latents, the flow's time and the prompt's embeddings, and returns the velocity ``eps - x_0``; the
weights and blocks are diffusers' own. Rotary embeddings are written with stacked real and imaginary parts: diffusers
writes them into strided slices or as complex numbers, which ONNX does not have. Positions are constants of the size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..decoder import Decoder
from .few_step_folder import Z_IMAGE_MULTIPLE, FewStepFolder

_MASKED = -1e4
"""Added to the score of a key that is left out: its weight is 0, also in half precision."""


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighboring pairs of channels: rotary position embedding (arXiv 2104.09864).

    Args:
        x: (B, L, heads, D).
        cos: Cosine of each pair's angle, broadcast over (B, L, 1, D/2).
        sin: Sine.
    """
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def _angles(dim: int, positions: Tensor, theta: float) -> Tensor:
    """Return the angles, (positions, dim / 2), float64."""
    rates = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.outer(positions.double(), rates)


def _grid_angles(sizes: tuple[int, ...], dims: tuple[int, ...], theta: float) -> Tensor:
    """Return the angles of a grid of tokens, (prod(sizes), sum(dims) / 2), float64; each axis has its channels."""
    grids = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
    return torch.cat([_angles(d, grid.reshape(-1), theta) for d, grid in zip(dims, grids, strict=True)], dim=-1)


def _normalize(norm: Any, x: Tensor) -> Tensor:
    """Apply a norm; torch's own RMSNorm warns where autocast gives it another dtype than its weight has."""
    if not isinstance(norm, nn.RMSNorm):
        return norm(x)  # type: ignore[no-any-return]
    wide = x.float()
    eps = torch.finfo(wide.dtype).eps if norm.eps is None else norm.eps
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * norm.weight).to(x.dtype)


class _Attention:
    """A diffusers attention processor for blocks with to_q, to_k, to_v, norms and an optional rotation.

    Args:
        across_heads: Whether the norms are of all channels, before these are split into heads.
    """

    def __init__(self, *, across_heads: bool) -> None:
        self.across_heads = across_heads

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        freqs_cis: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the attention's output, (B, L, C).

        Args:
            attn: The module whose processor this is.
            hidden_states: (B, L, C).
            encoder_hidden_states: Keys of cross-attention, (B, K, C); None is self-attention.
            attention_mask: Added to the scores, (B, K), or None.
            rotary_emb: Cosines and sines, (1 or B, L, 1, D/2), or None.
            freqs_cis: The same; Z-Image's name.
        """
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(keys), attn.to_v(keys)
        if self.across_heads:
            q, k = _normalize(attn.norm_q, q), _normalize(attn.norm_k, k)
        q, k, v = (each.unflatten(2, (attn.heads, -1)) for each in (q, k, v))
        if not self.across_heads:
            q, k = (q if norm is None else norm(q) for q, norm in ((q, attn.norm_q), (k, attn.norm_k)))
        if (angles := rotary_emb or freqs_cis) is not None:
            q, k = rotate_pairs(q, *angles), rotate_pairs(k, *angles)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        mask = None if attention_mask is None else attention_mask[:, None, None, :]
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2))
        return out


class _Rotation(nn.Module):
    """Cosines and sines as constants."""

    cos: Tensor
    sin: Tensor

    def __init__(self, angles: Tensor) -> None:
        super().__init__()
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return self.cos, self.sin


class Flux2(nn.Module):
    """FLUX.2-klein's denoiser: latents of 2x2 patches as a sequence, and the prompt's tokens.

    Args:
        transformer: A ``Flux2Transformer2DModel``.
        folder: Its folder.
    """

    image_ids: Tensor
    text_ids: Tensor

    def __init__(self, transformer: nn.Module, folder: FewStepFolder) -> None:
        super().__init__()
        self.transformer = transformer
        _, height, width = folder.sample_shape
        one, tokens = torch.arange(1), torch.arange(folder.settings.max_sequence_length)
        image = torch.cartesian_prod(one, torch.arange(height), torch.arange(width), one)
        self.register_buffer("image_ids", image, persistent=False)
        self.register_buffer("text_ids", torch.cartesian_prod(one, one, one, tokens), persistent=False)

    def forward(self, x: Tensor, time: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Return the velocity, like ``x``, (B, C, H, W)."""
        (v,) = self.transformer(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=time,
            guidance=None,
            encoder_hidden_states=prompt_embeds,
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )
        velocity: Tensor = v.transpose(1, 2).unflatten(2, x.shape[2:])
        return velocity


class ZImage(nn.Module):
    """Z-Image's denoiser for prompts of one stored length with a mask, any batch size.

    diffusers' own forward takes lists of prompts of different lengths. The same tokens are made here: the prompt, then
    the learned padding up to a multiple of 32, which is attended to; whatever is behind is left out of the attention.
    The image's first position follows the prompt's last.

    Args:
        transformer: A ``ZImageTransformer2DModel``.
        folder: Its folder.
    """

    def __init__(self, transformer: Any, folder: FewStepFolder) -> None:
        super().__init__()
        self.transformer = transformer
        _set_attention(transformer, across_heads=False)
        first, *grid = transformer.axes_dims
        theta = float(transformer.rope_theta)
        _, height, width = folder.sample_shape
        self.size = (height // 2, width // 2)
        self.tokens = self.size[0] * self.size[1]
        self.filled = -self.tokens % Z_IMAGE_MULTIPLE
        self.depth = _Rotation(_angles(first, torch.arange(transformer.axes_lens[0]), theta))
        self.plane = _Rotation(_grid_angles(self.size, tuple(grid), theta))

    def forward(self, x: Tensor, time: Tensor, prompt_embeds: Tensor, prompt_attention_mask: Tensor) -> Tensor:
        """Return the velocity, like ``x``, (B, C, H, W).

        Args:
            x: Latents, (B, C, H, W).
            time: The flow's time, (B,): 1 is noise.
            prompt_embeds: (B, L, D).
            prompt_attention_mask: 1 for tokens and 0 for padding, (B, L), int64.
        """
        model: Any = self.transformer
        adaln = model.t_embedder((1 - time) * model.t_scale).to(x.dtype)
        prompt, left_out, prompt_angles, length = self._prompt(prompt_embeds, prompt_attention_mask)
        image, image_angles = self._image(x, length)
        for layer in model.noise_refiner:
            image = layer(image, None, image_angles, adaln)
        for layer in model.context_refiner:
            prompt = layer(prompt, left_out, prompt_angles)
        tokens = torch.cat([image, prompt], dim=1)
        angles = tuple(torch.cat([i, p], dim=1) for i, p in zip(image_angles, prompt_angles, strict=True))
        mask = torch.cat([torch.zeros_like(image[:, :, 0]), left_out], dim=1)
        for layer in model.layers:
            tokens = layer(tokens, mask, angles, adaln)
        tokens = model.all_final_layer["2-1"](tokens, c=adaln)[:, : self.tokens]
        patches = tokens.unflatten(1, self.size).unflatten(3, (2, 2, x.shape[1]))  # B h w 2 2 C
        velocity: Tensor = -patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return velocity

    def _image(self, x: Tensor, length: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        model: Any = self.transformer
        batch, channels = x.shape[:2]
        patches = x.reshape(batch, channels, self.size[0], 2, self.size[1], 2).permute(0, 2, 4, 3, 5, 1)  # B h w 2 2 C
        image = model.all_x_embedder["2-1"](patches.flatten(3).flatten(1, 2))
        padding = model.x_pad_token.expand(x.shape[0], self.filled, -1)
        angles = []
        for depth, plane, at_zero in ((self.depth.cos, self.plane.cos, 1.0), (self.depth.sin, self.plane.sin, 0.0)):
            start = depth[length + 1][:, None].expand(-1, self.tokens, -1)
            whole = torch.cat([start, plane.expand(x.shape[0], -1, -1)], dim=2)
            angles.append(functional.pad(whole, (0, 0, 0, self.filled), value=at_zero)[:, :, None])
        return torch.cat([image, padding], dim=1), (angles[0], angles[1])

    def _prompt(self, embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
        """Return the prompt's tokens, what is left out of the attention, its rotation, and its filled length."""
        model: Any = self.transformer
        missing = -embeds.shape[1] % Z_IMAGE_MULTIPLE
        kept = functional.pad(mask, (0, missing))
        count = kept.sum(dim=1, keepdim=True)
        length = (count + Z_IMAGE_MULTIPLE - 1) // Z_IMAGE_MULTIPLE * Z_IMAGE_MULTIPLE
        position = torch.where(kept > 0, kept.cumsum(1) - 1, count + (1 - kept).cumsum(1) - 1)
        embedded = model.cap_embedder(functional.pad(embeds, (0, 0, 0, missing)))
        prompt = torch.where(kept[:, :, None] > 0, embedded, model.cap_pad_token)
        left_out = (position >= length).to(embeds.dtype) * _MASKED
        angles = [
            functional.pad(depth[position + 1], (0, self.plane.cos.shape[1]), value=at_zero)[:, :, None]
            for depth, at_zero in ((self.depth.cos, 1.0), (self.depth.sin, 0.0))
        ]
        return prompt, left_out, (angles[0], angles[1]), length[:, 0]


class Wan(nn.Module):
    """Wan 2.1's text-to-video denoiser.

    Args:
        transformer: A ``WanTransformer3DModel``.
        folder: Its folder.
    """

    def __init__(self, transformer: Any, folder: FewStepFolder) -> None:
        super().__init__()
        self.transformer = transformer
        _make_wan_exportable(transformer, folder)

    def forward(self, x: Tensor, time: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Return the velocity, like ``x``, (B, C, T, H, W)."""
        (v,) = self.transformer(
            hidden_states=x, timestep=1000 * time, encoder_hidden_states=prompt_embeds, return_dict=False
        )
        velocity: Tensor = v
        return velocity


class AnyFlow(nn.Module):
    """AnyFlow's text-to-video flow map: the mean velocity between two times (arXiv 2605.13724).

    Args:
        transformer: An ``AnyFlowTransformer3DModel``.
        folder: Its folder.
    """

    def __init__(self, transformer: Any, folder: FewStepFolder) -> None:
        super().__init__()
        self.transformer = transformer
        _make_wan_exportable(transformer, folder)
        if not isinstance(transformer.condition_embedder, _OneTime):  # a transformer at another size
            transformer.condition_embedder = _OneTime(transformer.condition_embedder)

    def forward(self, x: Tensor, time: Tensor, r: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Return the mean velocity from ``time`` to ``r``, like ``x``, (B, C, T, H, W)."""
        (v,) = self.transformer(
            hidden_states=x.transpose(1, 2), timestep=1000 * time[:, None], r_timestep=1000 * r[:, None],
            encoder_hidden_states=prompt_embeds, return_dict=False,
        )  # fmt: skip
        velocity: Tensor = v.transpose(1, 2)
        return velocity


def _set_attention(transformer: Any, *, across_heads: bool) -> None:
    for module in transformer.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(_Attention(across_heads=across_heads))


def _make_wan_exportable(transformer: Any, folder: FewStepFolder) -> None:
    """Replace the attention and the rotation of a transformer of Wan's layout by ones that export."""
    _set_attention(transformer, across_heads=True)
    _, frames, height, width = folder.sample_shape
    transformer.rope = _Rotation(_wan_angles(transformer.config.attention_head_dim, (frames, height // 2, width // 2)))


class _OneTime(nn.Module):
    """AnyFlow's embedding of the times, computed once, because all tokens have the same time."""

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.embedder = embedder

    def forward(self, timestep: Tensor, r_timestep: Tensor, text: Tensor, image: None, *, layout_cfg: object) -> object:
        return self.embedder(timestep, r_timestep, text, image, layout_cfg={"full_token_per_frame": 1})


def _wan_angles(head_dim: int, sizes: tuple[int, int, int], theta: float = 10000.0) -> Tensor:
    """Return Wan's angles, (1, tokens, 1, head_dim / 2): thirds of the channels turn with frame, row and column."""
    plane = 2 * (head_dim // 6)
    return _grid_angles(sizes, (head_dim - 2 * plane, plane, plane), theta)[None, :, None]


class ImageDecoder(nn.Module):
    """The decoder of a KL autoencoder: latents of one stage, (B, C, H, W), to pixels.

    Args:
        vae: The autoencoder.
        patches: Side of the patches that the latents come in: their channels are C times its square.
    """

    def __init__(self, vae: Any, *, patches: int = 1) -> None:
        super().__init__()
        self.patches = patches
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        """Return pixels, (B, 3, H', W')."""
        z = functional.pixel_shuffle(latents, self.patches) if self.patches > 1 else latents
        pixels: Tensor = self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))
        return pixels


class WanDecoder(nn.Module):
    """The decoder of ``AutoencoderKLWan``: one latent frame after the other, with the causal convolutions' caches.

    Args:
        vae: The autoencoder.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        kind = type(vae.post_quant_conv)
        self.num_caches = sum(isinstance(module, kind) for module in vae.decoder.modules())

    def forward(self, latents: Tensor) -> Tensor:
        """Return pixels, (B, 3, 1 + 4 (T - 1), H, W), clipped to [-1, 1]."""
        caches = self.no_caches()
        return torch.cat([self.decode(frame, caches) for frame in torch.split(latents, 1, dim=2)], dim=2)

    def no_caches(self) -> list[Any]:
        """Return the caches before the first frame."""
        return [None] * self.num_caches

    def decode(self, latents: Tensor, caches: list[Any]) -> Tensor:
        """Return the pixels of one latent frame, (B, 3, 1 or 4, H, W), clipped to [-1, 1], and update the caches."""
        z = self.post_quant_conv(latents)
        frames: Tensor = self.decoder(z, feat_cache=caches, feat_idx=[0], first_chunk=caches[0] is None)
        return frames.clamp(-1.0, 1.0)


class WanFrame(nn.Module):
    """One call of ``WanDecoder.decode`` with tensors alone, as ``decoder.FrameDecoder`` describes it.

    diffusers keeps one frame or a word in a cache after the first frame, and two frames later. Frames of zeros before
    the first mean the same, because the convolutions pad with them, so every cache has two.

    Args:
        decoder: The decoder, with a ``WanDecoder``.
        sample_shape: Shape of the latents of a clip, (C, T, H, W).

    Attributes:
        cache_shapes: Shape of each cache, without the batch axis.
    """

    def __init__(self, decoder: Decoder, sample_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.decoder = decoder
        channels, _, height, width = sample_shape
        self.cache_shapes = _cache_shapes(self._wan, (channels, 2, height, width))

    @property
    def _wan(self) -> WanDecoder:
        assert isinstance(self.decoder.module, WanDecoder)
        return self.decoder.module

    def forward(self, latents: Tensor, caches: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the frame's pixels, and the caches for the next."""
        kept = [*caches, *self._wan.no_caches()[len(caches) :]]
        pixels = self._wan.decode(self.decoder.to_latents(latents), kept)
        pairs = zip(kept, self.cache_shapes, strict=False)  # 1x1 convolutions have none
        return pixels, *(_two_frames(cache, latents.new_zeros(latents.shape[0], *shape)) for cache, shape in pairs)


def _two_frames(cache: Any, zeros: Tensor) -> Tensor:
    """Fill a cache of diffusers up to two frames; zeros are one without frames."""
    if not isinstance(cache, Tensor):  # "Rep", of a time convolution that the first frame skips
        return zeros
    return torch.cat([zeros[:, :, cache.shape[2] :], cache], dim=2) if cache.shape[2] < zeros.shape[2] else cache


def _cache_shapes(decoder: WanDecoder, latents: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the shapes after the second latent frame, found without computing or memory."""

    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
            caches = self.decoder.no_caches()
            for frame in torch.split(latents, 1, dim=2):
                self.decoder.decode(frame, caches)
            return tuple(cache for cache in caches if cache is not None)

    tensors = {name: tensor.to("meta") for name, tensor in Caches().state_dict().items()}
    found = torch.func.functional_call(Caches(), tensors, (torch.empty((1, *latents), device="meta"),))
    return tuple(tuple(cache.shape[1:]) for cache in found)


NETWORKS: dict[str, Callable[[Any, FewStepFolder], nn.Module]] = {
    "Flux2KleinPipeline": Flux2,
    "ZImagePipeline": ZImage,
    "WanPipeline": Wan,
    "AnyFlowPipeline": AnyFlow,
}
"""The denoiser's module by the pipeline's class."""
