"""Text prompts and precomputed embeddings as inputs of a sampler.

The text encoder is a separate component of PyTorch or a graph, and is loaded with the first prompt. ``prompt_embeds``
needs neither the encoder nor torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import ConfigError
from ..spec import SamplerSpec
from .parts import Part

EMBEDS, MASK = "prompt_embeds", "prompt_attention_mask"
"""Names of the inputs of a prompt."""


class Encoder(Protocol):
    """A text encoder."""

    def encode(self, prompts: Sequence[str], max_sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return embeddings (N, L, D) float32 and mask (N, L) int64."""
        ...

    def close(self) -> None:
        """Release the memory."""
        ...


class Prompts:
    """Creates the conditioning of a call; thread-safe.

    Args:
        folder: Pipeline folder with the text encoder, or None if the model has none.
        device: Device of the encoder; None is the CPU.
        check: Called before the encoder is loaded; raises if its files changed.
        note: Appended to the error for a prompt without an encoder.
        graph: Graph of the text encoder, which is taken instead of the folder.
        turn: See ``Part``.
    """

    def __init__(
        self,
        folder: Path | None,
        device: str | None = None,
        *,
        check: Callable[[], object] = lambda: None,
        note: str = "",
        graph: Path | None = None,
        turn: threading.Lock | None = None,
    ) -> None:
        self._folder, self._device, self._check, self._note = folder, device, check, note
        self._graph = graph
        self._encoder: Part[Encoder] = Part(self._open, turn)
        self._lock = threading.Lock()

    def conditioning(
        self,
        spec: SamplerSpec,
        count: int,
        *,
        prompt: str | Sequence[str] | None = None,
        prompt_embeds: np.ndarray | None = None,
        prompt_attention_mask: np.ndarray | None = None,
        conditioning: Mapping[str, np.ndarray] | None = None,
    ) -> Mapping[str, np.ndarray] | None:
        """Return the conditioning of a call, by name, for ``make_request`` to check.

        Args:
            spec: The sampler.
            count: Number of images.
            prompt: One text for all images, or one for each.
            prompt_embeds: Instead of it: (count, L, D) float32, or (1, L, D) for all.
            prompt_attention_mask: Goes with them: (count, L) or (1, L) int64; None keeps every token.
            conditioning: The model's other inputs.

        Raises:
            ConfigError: If the model takes no prompt, there are too many or too few, or no text encoder is there.
            BackendUnavailable: If torch, diffusers or transformers is not here and a prompt is to be encoded.
        """
        given = {EMBEDS: prompt_embeds, MASK: prompt_attention_mask}
        named = [name for name, value in ({"prompt": prompt} | given).items() if value is not None]
        if not named:
            return self._asked_for(spec, conditioning)
        tensors = {tensor.name: tensor for tensor in spec.conditioning}
        if EMBEDS not in tensors:
            raise ConfigError(f"{named[0]} is given, but this model takes no prompt. Leave {named[0]} out.")
        if prompt is not None and len(named) > 1:
            raise ConfigError(f"prompt and {named[1]} are both given, expected one: the embeddings are the prompt's.")
        if prompt_embeds is None and prompt is None:
            raise ConfigError(f"{MASK} is given without {EMBEDS}, expected both, or a prompt.")
        if prompt is not None:
            given = self._encode(_as_list(prompt, count), tensors[EMBEDS].shape[0])
        made = {name: _repeat(value, count) for name, value in given.items() if value is not None}
        if prompt is not None:  # the padding of some encoders is part of the embeddings, and has no mask
            made = {name: value for name, value in made.items() if name in tensors}
        return {**(conditioning or {}), **made}

    def _asked_for(
        self, spec: SamplerSpec, conditioning: Mapping[str, np.ndarray] | None
    ) -> Mapping[str, np.ndarray] | None:
        wanted = any(tensor.name == EMBEDS for tensor in spec.conditioning)
        if wanted and EMBEDS not in (conditioning or {}):
            raise ConfigError(f"this model makes pictures of a text, expected prompt='...', or {EMBEDS} made before.")
        return conditioning

    def _encode(self, prompts: list[str], tokens: int) -> dict[str, np.ndarray | None]:
        if self._folder is None and self._graph is None:
            raise ConfigError(
                f"a prompt is given, but this model came without its text encoder. Give {EMBEDS}, or import it again "
                f"with the text encoder.{self._note}"
            )
        with self._lock, self._encoder.use() as encoder:  # one at a time, since its values for a batch are large
            embeds, mask = encoder.encode(list(dict.fromkeys(prompts)), tokens)
        rows = {text: row for row, text in enumerate(dict.fromkeys(prompts))}
        chosen = [rows[text] for text in prompts]
        return {EMBEDS: embeds[chosen], MASK: mask[chosen]}

    def close(self) -> None:
        """Release the memory of the text encoder."""
        self._encoder.close()

    def _open(self) -> Encoder:
        self._check()
        if self._graph is not None:
            from .prompt_graph import PromptGraph

            return PromptGraph(self._graph, device=self._device)
        from ..model.foreign.flow_prompts import open_encoder

        assert self._folder is not None, "_encode checks that there is one of the two"
        return open_encoder(self._folder, device=self._device)


def _as_list(prompt: str | Sequence[str], count: int) -> list[str]:
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, Sequence) or not all(isinstance(text, str) for text in prompt):
        raise ConfigError(f"prompt is {prompt!r}, expected a text, or one for each image.")
    if len(prompt) != count:
        raise ConfigError(f"prompt holds {len(prompt)} texts, expected num_images = {count}, or one text for all.")
    return list(prompt)


def _repeat(value: np.ndarray, count: int) -> np.ndarray:
    array = np.asarray(value)
    return np.repeat(array, count, axis=0) if array.ndim and len(array) == 1 and count > 1 else array
