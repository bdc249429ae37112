"""Text encoders of the few-step flow pipelines, which encode prompts as the pipelines do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from .few_step_folder import read_few_step_folder
from .pipelines import is_sana
from .prompt_encoder import PromptEncoder, TextPipeline


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
        self._text = TextPipeline(
            folder, has_text_encoder=found.has_text_encoder, pipeline=found.row.name, tokenizer="T5TokenizerFast",
            encoder=found.row.text_encoder, device=device,
        )  # fmt: skip

    def encode(self, prompts: Sequence[str], max_sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Encode prompts.

        Args:
            prompts: Texts.
            max_sequence_length: Tokens of each.

        Returns:
            Embeddings (N, L, D) float32 and a mask (N, L) int64 of ones: padding is part of the embeddings.
        """
        with torch.inference_mode():
            embeds, _ = self._text.pipeline.encode_prompt(
                list(prompts),
                do_classifier_free_guidance=False,
                device=self._text.device,
                max_sequence_length=max_sequence_length,
            )
        made: np.ndarray = embeds.float().cpu().numpy()
        return made, np.ones(made.shape[:2], np.int64)
