"""A text encoder as a graph: prompts are encoded by ONNX Runtime and the library ``tokenizers``, without PyTorch.

Prompts are preprocessed as in the pipeline's own call and padded on the right to one length. SANA-Sprint: lower case,
after its instruction to the language model; the first and the last states are kept. FLUX.2-klein and Z-Image: between
the texts of a chat template. Wan and AnyFlow: without HTML entities and repeated white space.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from .._util.files import read_regular
from .._util.lazy import require
from ..bundle.layout import CONFIG_MAX_BYTES, PROMPT_NAME, TOKENIZER_NAME
from ..errors import BundleError, ConfigError, IntegrityError
from ..spec import TensorSpec
from .backends import open_graph

MAX_TOKENIZER_BYTES = 64 << 20
"""Maximum size of a tokenizer, bytes; Gemma's has 34 MB."""


def _web(text: str) -> str:
    """Clean a text of the web as diffusers does; ftfy repairs its characters, as for the prompts of the training."""
    text = require("ftfy", extra="prompts", purpose="cleaning a prompt").fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split())


CLEANING: Mapping[str, Callable[[str], str]] = {
    "lower": lambda text: text.lower().strip(), "web": _web, "none": lambda text: text,
}  # fmt: skip
"""Preprocessing of a prompt's text by name."""


class PromptSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Preprocessing of a prompt; ``prompt.json`` next to the graph.

    Attributes:
        instruction: Text before each prompt.
        after: Text after each prompt.
        clean: Preprocessing of the prompt, a key of ``CLEANING``.
        mask: Whether the sampler leaves padding out by a mask; else padding is part of the embeddings.
        length: Tokens of the whole text.
        max_sequence_length: Tokens that are kept.
        width: Width of an embedding.
        pad_id: Number of the padding token.
        pad_token: The padding token.
    """

    instruction: str
    length: int
    max_sequence_length: int
    width: int
    pad_id: int
    pad_token: str
    after: str = ""
    clean: Literal["lower", "web", "none"] = "lower"
    mask: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.max_sequence_length <= self.length <= 1 << 16 or not 1 <= self.width <= 1 << 16:
            raise ConfigError(
                f"{PROMPT_NAME} has length {self.length}, max_sequence_length {self.max_sequence_length} and width "
                f"{self.width}, expected 1 <= max_sequence_length <= length <= 65536 and a width up to 65536."
            )


class PromptGraph:
    """Tokenizer and text encoder, float32.

    Args:
        graph: The ``.onnx`` file, whose files were checked.
        device: Device of ONNX Runtime; None is the CPU.

    Raises:
        BackendUnavailable: If onnxruntime or tokenizers is not installed.
        IntegrityError: If a file is missing, damaged, or does not fit the graph.
    """

    def __init__(self, graph: Path, *, device: str | None = None) -> None:
        tokenizers = require("tokenizers", extra="prompts", purpose="encoding a prompt")
        try:
            self.settings = msgspec.json.decode(
                read_regular(graph.with_name(PROMPT_NAME), most=CONFIG_MAX_BYTES), type=PromptSettings
            )
            text = read_regular(graph.with_name(TOKENIZER_NAME), most=MAX_TOKENIZER_BYTES).decode()
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(text)
        except (BundleError, ConfigError):
            raise
        except Exception as exc:  # those of msgspec, and of tokenizers, which have no common base class
            raise IntegrityError(
                f"the tokenizer next to {graph} cannot be loaded: {exc}. Expected {PROMPT_NAME} and {TOKENIZER_NAME} "
                "as the import wrote them. Import the pipeline again."
            ) from exc
        s = self.settings
        self._tokenizer.enable_truncation(max_length=s.length)
        self._tokenizer.enable_padding(length=s.length, pad_id=s.pad_id, pad_token=s.pad_token, direction="right")
        inputs = [TensorSpec(name=name, shape=(s.length,), dtype="int64") for name in ("input_ids", "attention_mask")]
        output = TensorSpec(name="prompt_embeds", shape=(s.max_sequence_length, s.width))
        self._graph = open_graph(graph, inputs, [output], device=device)

    def encode(self, prompts: Sequence[str], max_sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Encode prompts, one at a time.

        Args:
            prompts: Texts.
            max_sequence_length: Tokens of each; that of the import.

        Returns:
            Embeddings (N, L, D) float32 and mask (N, L) int64.

        Raises:
            ConfigError: If the number of tokens is another.
            BackendFailure: If onnxruntime raised.
        """
        s = self.settings
        if max_sequence_length != s.max_sequence_length:
            raise ConfigError(
                f"prompts of {max_sequence_length} tokens are asked for, expected {s.max_sequence_length}, for which "
                "the text encoder was exported. Import the pipeline again with --tokens."
            )
        clean = CLEANING[s.clean]
        encoded = self._tokenizer.encode_batch([s.instruction + clean(text) + s.after for text in prompts])
        ids, mask = (
            np.array([getattr(each, name) for each in encoded], np.int64) for name in ("ids", "attention_mask")
        )
        feeds = ({"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]} for i in range(len(ids)))
        embeds = np.concatenate([self._graph.run(feed)[0] for feed in feeds])
        kept = [0, *range(s.length - s.max_sequence_length + 1, s.length)]
        return embeds, mask[:, kept] if s.mask else np.ones_like(mask[:, kept])

    def close(self) -> None:
        """Release the memory of the graph."""
        self._graph.close()
