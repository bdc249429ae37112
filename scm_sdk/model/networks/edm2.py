"""The magnitude-preserving U-Net for ImageNet: EDM2 in its configuration G, with the three sCM changes.

With ``double_norm=False`` the modulation is that of EDM2, ``y * (1 + gain * linear(emb))``; otherwise that of the sCM
paper, ``norm(y) * pnorm(s) + pnorm(b)`` with the norm over channels. The paper gives the parameter counts of the former
and the formula of the latter.

Shape letters: B batch, C channels, H height, W width, E embedding, N places.
Source: Karras et al. 2024, arXiv 2312.02696, sections 2 and B; arXiv 2410.11081, section 4.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from .conditioning import PositionalEmbedding, TimeNetwork, complete_conditioning, float32_island
from .layers import attend
from .magnitude import MPConv, mp_cat, mp_silu, mp_sum, normalize
from .paper_unet import Block, PaperUNetConfig, Place, places, walk

RESIDUAL_SHARE = 0.3
ATTENTION_SHARE = 0.3
SKIP_SHARE = 0.5
LABEL_SHARE = 0.5
LARGEST_ACTIVATION = 256.0


class EDM2Config(PaperUNetConfig, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="edm2"):
    """The shape of an EDM2 network; ImageNet-64's, size S, by default."""

    image_size: int = 64
    channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attention_resolutions: tuple[int, ...] = (16, 8)
    head_channels: int = 64


class _Block(Block):
    """Two 3x3 convolutions with the embedding between them, blended with their input; then attention."""

    def __init__(self, config: EDM2Config, place: Place) -> None:
        super().__init__(place)
        in_channels, out_channels = place.in_channels, place.out_channels
        emb_channels = max(config.channel_mult) * config.channels
        self.double_norm = config.double_norm
        self.conv_skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.conv0 = MPConv(out_channels if place.side == "encoder" else in_channels, out_channels, 3)
        self.modulation = (
            MPConv(emb_channels, 2 * out_channels, 0)
            if config.double_norm
            else MPConv(emb_channels, out_channels, 0, learned_gain=True)
        )
        self.dropout = nn.Dropout(config.dropout_at(place.resolution))
        self.conv1 = MPConv(out_channels, out_channels, 3)
        self.num_heads = config.heads_of(out_channels)
        self.qkv = MPConv(out_channels, 3 * out_channels, 1) if place.attention else None
        self.proj = MPConv(out_channels, out_channels, 1) if place.attention else None

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        """Return (B, out_channels, H, W), H and W halved or doubled where the block resamples."""
        x = x_BCHW
        if self.place.resample == "down":
            x = functional.avg_pool2d(x, 2)
        elif self.place.resample == "up":
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.place.side == "encoder":
            x = normalize(x if self.conv_skip is None else self.conv_skip(x))
        h = self.conv0(mp_silu(x))
        if self.double_norm:
            scale_BC, shift_BC = self.modulation(emb_BE).chunk(2, dim=1)
            h = normalize(h) * normalize(scale_BC)[:, :, None, None] + normalize(shift_BC)[:, :, None, None]
        else:
            h = h * (self.modulation(emb_BE) + 1.0)[:, :, None, None]
        h = self.conv1(self.dropout(mp_silu(h)))
        if self.place.side == "decoder" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, h, RESIDUAL_SHARE)
        if self.qkv is not None and self.proj is not None:
            x = mp_sum(x, self.proj(self._attend(self.qkv(x))), ATTENTION_SHARE)
        return x.clamp(-LARGEST_ACTIVATION, LARGEST_ACTIVATION)

    def _attend(self, qkv_BCHW: Tensor) -> Tensor:
        """Attend between all places with queries, keys and values of unit magnitude."""
        B, _, H, W = qkv_BCHW.shape
        qkv = normalize(qkv_BCHW.reshape(B, 3, self.num_heads, -1, H * W), dim=3)
        return attend(*qkv.transpose(-2, -1).unbind(1)).transpose(-2, -1).reshape(B, -1, H, W)


class EDM2(TimeNetwork):
    """F_theta(x, t, class_labels): unit-variance samples and a time in, a unit-variance target out."""

    def __init__(self, config: EDM2Config) -> None:
        super().__init__()
        self.config = config
        channels, widths = config.channels, [config.channels * m for m in config.channel_mult]
        emb_channels = max(widths)
        self.time_embedding = PositionalEmbedding(channels, config.time_max_period, config.time_fourier_scale)
        self.time_linear = MPConv(channels, emb_channels, 0)
        classes = config.num_classes
        self.label_linear = MPConv(classes, emb_channels, 0, scale=math.sqrt(classes)) if classes else None
        # The gain starts at zero, so that a student with the weights of its teacher computes the same as the teacher.
        self.guidance_linear = MPConv(channels, emb_channels, 0, learned_gain=True) if config.guidance else None

        self.conv_in = MPConv(config.in_channels + 1, channels, 3)  # one channel of ones replaces biases
        self.down, self.middle, self.up = (
            nn.ModuleList(_Block(config, place) for place in part) for part in places(config, attention_up="all")
        )
        self.conv_out = MPConv(widths[0], config.in_channels, 3, learned_gain=True)

    @float32_island
    def embed(self, t_B: Tensor, class_labels_B: Tensor | None, guidance_scale_B: Tensor | None) -> Tensor:
        """Embed times, labels and guidance scales as (B, E).

        Raises:
            ShapeError: If labels or guidance are given to a network without them.
        """
        config = self.config
        labels_B, scale_B = complete_conditioning(
            t_B, class_labels_B, guidance_scale_B, num_classes=config.num_classes, guidance=config.guidance
        )
        emb = self.time_linear(self.time_embedding(t_B) * math.sqrt(2.0))  # sinusoids of unit magnitude
        if self.label_linear is not None and labels_B is not None:
            numbers = torch.arange(config.num_classes, device=t_B.device)
            one_hot = (labels_B[:, None] == numbers).to(emb.dtype)  # all zeros for "no label"
            emb = mp_sum(emb, self.label_linear(one_hot), LABEL_SHARE)
        if self.guidance_linear is not None:
            emb = emb + self.guidance_linear(self.time_embedding(scale_B) * math.sqrt(2.0))
        return mp_silu(emb)

    def forward(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """Return F, (B, C, H, W): see ``TimeNetwork``."""
        emb = self.embed(t, class_labels, guidance_scale)
        h = self.conv_in(functional.pad(x, (0, 0, 0, 0, 0, 1), value=1.0))
        h = walk(self.down, self.middle, self.up, h, emb, join=lambda a, b: mp_cat(a, b, SKIP_SHARE))
        out: Tensor = self.conv_out(h)
        return out
