"""The text encoder of a SANA-Sprint pipeline, which encodes prompts as ``SanaSprintPipeline`` does."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..._util.lazy import require
from ...errors import ConfigError, IntegrityError
from .sana_folder import PIPELINE, TEXT_ENCODERS, read_sana_folder

PURPOSE = "encoding a prompt"


class TextPipeline:
    """A pipeline of diffusers that holds a tokenizer and a text encoder alone, in the dtype of their stored weights.

    Args:
        folder: A pipeline folder.
        has_text_encoder: Whether the folder has a text encoder.
        pipeline: Class of diffusers.
        tokenizer: Class of transformers.
        encoder: Class of transformers.
        device: A torch device; None is the CPU.

    Raises:
        BackendUnavailable: If diffusers or transformers is not installed.
        ConfigError: If the folder has no text encoder.
        IntegrityError: If its files cannot be loaded.

    Attributes:
        pipeline: The pipeline.
        device: Where the text encoder runs.
    """

    def __init__(
        self, folder: Path, *, has_text_encoder: bool, pipeline: str, tokenizer: str, encoder: str, device: str | None
    ) -> None:
        if not has_text_encoder:
            raise ConfigError(f"{folder} has no text encoder, expected one to encode a prompt. Give prompt_embeds.")
        transformers = require("transformers", extra="diffusers", purpose=PURPOSE)
        diffusers = require("diffusers", extra="diffusers", purpose=PURPOSE)
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            loaded = getattr(transformers, tokenizer).from_pretrained(folder / "tokenizer", **options)
            model = getattr(transformers, encoder).from_pretrained(
                folder / "text_encoder", use_safetensors=True, dtype="auto", **options
            )
        except (OSError, ValueError, RuntimeError) as exc:
            text = str(exc).strip().split("\n")[0]
            raise IntegrityError(f"the text encoder in {folder} cannot be loaded: {text}. Copy it again.") from exc
        self.device = torch.device(device or "cpu")
        self.pipeline: Any = getattr(diffusers, pipeline)(
            tokenizer=loaded, text_encoder=model.eval().requires_grad_(False).to(self.device), vae=None,
            transformer=None, scheduler=None,
        )  # fmt: skip

    def close(self) -> None:
        """Release the weights, also those that the pipeline's own references to itself would keep."""
        self.pipeline = None
        gc.collect()


class PromptEncoder:
    """Tokenizer and text encoder, in the dtype of their stored weights, on one device.

    Prompts are preprocessed as in the pipeline's call: lower case, after its instruction to the language model, padded
    on the right; the first and the last tokens of the hidden states are kept.

    Args:
        folder: A pipeline folder with a text encoder.
        device: A torch device; None is the CPU.

    Raises:
        BackendUnavailable: If diffusers or transformers is not installed.
        ConfigError: If the folder has no text encoder.
        IntegrityError: If its files cannot be loaded.

    Attributes:
        tokenizer: Tokenizer of transformers.
        text_encoder: Text encoder of transformers.
        instruction: Lines before each prompt, those of the pipeline.
    """

    def __init__(self, folder: Path, *, device: str | None = None) -> None:
        found = read_sana_folder(folder)
        self._text = TextPipeline(
            folder, has_text_encoder=found.has_text_encoder, pipeline=PIPELINE, tokenizer=found.tokenizer_class,
            encoder=TEXT_ENCODERS[0], device=device,
        )  # fmt: skip
        pipeline = self._text.pipeline
        call = inspect.signature(type(pipeline).__call__)
        self.tokenizer: Any = pipeline.tokenizer
        self.text_encoder: Any = pipeline.text_encoder
        self.instruction: list[str] = call.parameters["complex_human_instruction"].default

    def encode(
        self, prompts: Sequence[str], max_sequence_length: int, *, instruction: Sequence[str] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode prompts.

        Args:
            prompts: Texts.
            max_sequence_length: Tokens of each.
            instruction: Lines before each prompt; None is the instruction of the pipeline, () is none.

        Returns:
            Embeddings (N, L, D) float32 and mask (N, L) int64.
        """
        lines = self.instruction if instruction is None else list(instruction)
        with torch.inference_mode():
            embeds, mask = self._text.pipeline.encode_prompt(
                list(prompts),
                device=self._text.device,
                max_sequence_length=max_sequence_length,
                complex_human_instruction=lines or None,
            )
        return embeds.float().cpu().numpy(), mask.to(torch.int64).cpu().numpy()

    def close(self) -> None:
        """Release the weights."""
        self.text_encoder = None
        self._text.close()
