"""Text encoders of the few-step flow pipelines, which encode prompts as the pipelines do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..._util.lazy import require
from ...errors import ConfigError, IntegrityError
from .few_step_folder import read_few_step_folder
from .pipelines import is_sana

PURPOSE = "encoding a prompt"


class Encoder(Protocol):
    """What encodes prompts for a sampler."""

    def encode(self, prompts: Sequence[str], max_sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return embeddings (N, L, D) float32 and mask (N, L) int64."""
        ...


def open_encoder(folder: Path, *, device: str | None = None) -> Encoder:
    """Load the text encoder of a pipeline's folder.

    Args:
        folder: A pipeline folder with a text encoder.
        device: A torch device; None is the CPU.

    Raises:
        ScmError: As ``PromptEncoder`` and ``FlowPromptEncoder``.
    """
    if is_sana(folder):
        from .prompt_encoder import PromptEncoder

        return PromptEncoder(folder, device=device)
    return FlowPromptEncoder(folder, device=device)


class FlowPromptEncoder:
    """UMT5 and its tokenizer, in the dtype of the stored weights, on one device.

    A prompt is cleaned as in the pipeline's call and padded on the right; embeddings of padding are 0.

    Args:
        folder: A pipeline folder with a text encoder.
        device: A torch device; None is the CPU.

    Raises:
        BackendUnavailable: If diffusers or transformers is not installed.
        ConfigError: If the folder has no text encoder.
        IntegrityError: If its files cannot be loaded.
    """

    def __init__(self, folder: Path, *, device: str | None = None) -> None:
        found = read_few_step_folder(folder)
        if not found.has_text_encoder:
            raise ConfigError(f"{folder} has no text encoder, expected one to encode a prompt. Give prompt_embeds.")
        transformers = require("transformers", extra="diffusers", purpose=PURPOSE)
        diffusers = require("diffusers", extra="diffusers", purpose=PURPOSE)
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            tokenizer = transformers.T5TokenizerFast.from_pretrained(folder / "tokenizer", **options)
            encoder = getattr(transformers, found.row.text_encoder).from_pretrained(
                folder / "text_encoder", use_safetensors=True, dtype="auto", **options
            )
        except (OSError, ValueError, RuntimeError) as exc:
            text = str(exc).strip().split("\n")[0]
            raise IntegrityError(f"the text encoder in {folder} cannot be loaded: {text}. Copy it again.") from exc
        encoder = encoder.eval().requires_grad_(False).to(device or "cpu")
        self._pipeline: Any = getattr(diffusers, found.row.name)(
            tokenizer=tokenizer, text_encoder=encoder, vae=None, transformer=None, scheduler=None
        )
        self._device = torch.device(device or "cpu")

    def encode(self, prompts: Sequence[str], max_sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Encode prompts.

        Args:
            prompts: Texts.
            max_sequence_length: Tokens of each.

        Returns:
            Embeddings (N, L, D) float32 and a mask (N, L) int64 of ones: padding is part of the embeddings.
        """
        with torch.inference_mode():
            embeds, _ = self._pipeline.encode_prompt(
                list(prompts),
                do_classifier_free_guidance=False,
                device=self._device,
                max_sequence_length=max_sequence_length,
            )
        made: np.ndarray = embeds.float().cpu().numpy()
        return made, np.ones(made.shape[:2], np.int64)
