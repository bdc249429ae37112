"""Text encoders of the few-step flow pipelines, which encode prompts as the pipelines do."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..._util.lazy import require
from ...errors import ConfigError
from .few_step_folder import FewStepFolder, read_few_step_folder
from .pipelines import is_sana
from .prompt_encoder import PromptEncoder, TextPipeline

_PROBES = ("a", "  Two\n lines & <b>&amp;</b> ")
"""Prompts that a chat template must leave as they are."""


def open_encoder(folder: Path, *, device: str | None = None) -> PromptEncoder | FlowPromptEncoder:
    """Load the text encoder of a pipeline's folder.

    Args:
        folder: A pipeline folder with a text encoder.
        device: A torch device; None is the CPU.

    Raises:
        ScmError: As ``PromptEncoder`` and ``FlowPromptEncoder``.
    """
    if is_sana(folder):
        return PromptEncoder(folder, device=device)
    return FlowPromptEncoder(read_few_step_folder(folder), device=device)


class FlowPromptEncoder:
    """UMT5 or Qwen3 and its tokenizer, in the dtype of the stored weights, on one device.

    UMT5 takes a cleaned prompt; Qwen3 takes it in the chat template of its tokenizer, and gives the states of some of
    its layers. Prompts are padded to one length.

    Args:
        found: A verified folder of a pipeline with a text encoder.
        device: A torch device; None is the CPU.

    Raises:
        BackendUnavailable: If diffusers or transformers is not installed.
        ConfigError: If the folder has no text encoder, or its tokenizer no chat template where one is needed.
        IntegrityError: If its files cannot be loaded.

    Attributes:
        text: How the pipeline encodes prompts.
        mask: Whether its sampler takes a mask.
        tokenizer: Tokenizer of transformers.
        text_encoder: Text encoder of transformers.
    """

    def __init__(self, found: FewStepFolder, *, device: str | None = None) -> None:
        if found.row.text.thinking is None:  # without it diffusers would encode some prompts otherwise
            require("ftfy", extra="diffusers", purpose="cleaning a prompt")
        encoder, tokenizer = found.text_classes or ("", "")
        self._text = TextPipeline(
            found.path, has_text_encoder=found.has_text_encoder, pipeline=found.row.name, tokenizer=tokenizer,
            encoder=encoder, device=device,
        )  # fmt: skip
        self._folder = folder = found.path
        self.text, self.mask = found.row.text, found.row.mask
        self.tokenizer: Any = self._text.pipeline.tokenizer
        self.text_encoder: Any = self._text.pipeline.text_encoder
        if self.text.thinking is not None and not self.tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer in {folder} has no chat template, expected one: {found.row.name} encodes a prompt "
                "inside it. Copy the folder again, with chat_template.jinja or tokenizer_config.json."
            )

    def encode(self, prompts: Sequence[str], max_sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Encode prompts.

        Args:
            prompts: Texts.
            max_sequence_length: Tokens of each.

        Returns:
            Embeddings (N, L, D) float32 and a mask (N, L) int64, of ones where padding is part of the embeddings.
        """
        encode = self._text.pipeline.encode_prompt
        guided = "do_classifier_free_guidance" in inspect.signature(encode).parameters
        with torch.inference_mode():
            embeds, _ = encode(
                list(prompts),
                device=self._text.device,
                max_sequence_length=max_sequence_length,
                **({"do_classifier_free_guidance": False} if guided else {}),
            )
        rows = [each.float().cpu().numpy() for each in embeds]  # of a pipeline with a mask without the padding
        made = np.zeros((len(rows), max_sequence_length, rows[0].shape[1]), np.float32)
        mask = np.zeros(made.shape[:2], np.int64)
        for i, row in enumerate(rows):
            made[i, : len(row)], mask[i, : len(row)] = row, 1
        return made, mask

    def close(self) -> None:
        """Release the weights."""
        self.text_encoder = None
        self._text.close()

    def around(self) -> tuple[str, str]:
        """Return the text that the chat template puts before and after a prompt; nothing without a template.

        Raises:
            ConfigError: If the template changes the prompt.
        """
        if self.text.thinking is None:
            return "", ""

        def rendered(prompt: str) -> str:
            text: str = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True,
                enable_thinking=self.text.thinking,
            )  # fmt: skip
            return text

        before, _, after = rendered(mark := "\ue000").partition(mark)
        if any(rendered(probe) != before + probe + after for probe in _PROBES):
            raise ConfigError(
                f"the chat template of {self._folder} changes a prompt, expected one that puts text around it. Leave "
                "out --onnx-text-encoder: prompts are then encoded in PyTorch."
            )
        return before, after
