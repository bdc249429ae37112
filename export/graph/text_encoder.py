"""Export the text encoder of a pipeline as a graph of its own, with its tokenizer and settings.

    text_encoder/model.onnx   input_ids and attention_mask (batch, T) int64 to prompt_embeds (batch, L, D) float32
    text_encoder/tokenizer.json, text_encoder/prompt.json

T is the number of tokens of the text. SANA-Sprint keeps the first and the last L - 1 of the T states, behind its
instruction; for the other pipelines L is T.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from scm_sdk._util.files import atomic_write_bytes
from scm_sdk._util.json_struct import to_json
from scm_sdk.bundle.layout import PROMPT_GRAPH_PATH, PROMPT_NAME, TOKENIZER_NAME
from scm_sdk.bundle.manifest import Role
from scm_sdk.errors import BundleError, ConfigError
from scm_sdk.inference.prompt_graph import PromptSettings

from .cleanup import clean
from .decoder import IR_VERSION
from .io import write_model
from .trace import ROOT, trace_tokens, translate

if TYPE_CHECKING:
    from torch import nn

    from scm_sdk.model.foreign.few_step_folder import FewStepFolder
    from scm_sdk.model.foreign.flow_prompts import FlowPromptEncoder
    from scm_sdk.model.foreign.prompt_encoder import PromptEncoder
    from scm_sdk.model.foreign.sana_folder import SanaFolder


def export_text_encoder(
    encoder: PromptEncoder | FlowPromptEncoder, folder: Path, *, max_sequence_length: int
) -> dict[str, Role]:
    """Write the text encoder of a pipeline into the folder of a bundle, float32.

    Args:
        encoder: The encoder; its layers are changed, so that it cannot be used afterwards.
        folder: Folder of the bundle.
        max_sequence_length: Tokens of a prompt, L.

    Returns:
        Role of each written file whose name does not determine it.

    Raises:
        ConfigError: If the tokenizer pads on the left, or its chat template changes a prompt.
        BundleError: If the tokenizer has no file of the library ``tokenizers``.
        ExportError: If the encoder cannot be exported.
    """
    from scm_sdk.model.foreign.prompt_encoder import PromptEncoder

    tokenizer = encoder.tokenizer
    if isinstance(encoder, PromptEncoder):
        network, settings = _of_sana(encoder, max_sequence_length)
    else:
        network, settings = _of_flow(encoder, max_sequence_length)
    program = trace_tokens(network.eval(), settings.length)
    model = clean(translate(program, ("input_ids", "attention_mask"), "prompt_embeds"), root=ROOT)
    model.ir_version = IR_VERSION
    graph = folder / PROMPT_GRAPH_PATH
    write_model(model, graph)
    tokenizer.save_pretrained(graph.parent)
    for path in graph.parent.glob("*"):
        if path.name not in (graph.name, f"{graph.name}_data", TOKENIZER_NAME):
            path.unlink()
    if not (graph.parent / TOKENIZER_NAME).is_file():
        raise BundleError(f"the tokenizer of the pipeline has no {TOKENIZER_NAME}, expected a fast one. Convert it.")
    atomic_write_bytes(graph.parent / PROMPT_NAME, to_json(settings), error=BundleError)
    parent = graph.parent.name
    return {f"{parent}/{TOKENIZER_NAME}": "config", f"{parent}/{PROMPT_NAME}": "config"}


def check_has_text_encoder(folder: SanaFolder | FewStepFolder) -> None:
    """Refuse a pipeline without a text encoder that can be exported, before anything slow.

    Raises:
        ConfigError: If it has none.
    """
    if not folder.has_text_encoder:
        raise ConfigError(
            f"{folder.path} has no text encoder that is known here, expected one for --onnx-text-encoder. Leave it out "
            "and give prompt_embeds."
        )


def _of_sana(encoder: PromptEncoder, max_sequence_length: int) -> tuple[nn.Module, PromptSettings]:
    from scm_sdk.model.foreign.text_networks import Gemma2

    tokenizer, instruction = encoder.tokenizer, "\n".join(encoder.instruction)
    length = len(tokenizer.encode(instruction)) + max_sequence_length - 2  # as SanaSprintPipeline counts
    kept = [0, *range(length - max_sequence_length + 1, length)]
    return Gemma2(encoder.text_encoder, length, kept), PromptSettings(
        instruction=instruction, length=length, max_sequence_length=max_sequence_length,
        width=int(encoder.text_encoder.config.hidden_size), pad_id=int(tokenizer.pad_token_id),
        pad_token=str(tokenizer.pad_token),
    )  # fmt: skip


def _of_flow(encoder: FlowPromptEncoder, max_sequence_length: int) -> tuple[nn.Module, PromptSettings]:
    from scm_sdk.model.foreign.text_networks import UMT5, Qwen3

    text, tokenizer, config = encoder.text, encoder.tokenizer, encoder.text_encoder.config
    if tokenizer.padding_side != "right":
        raise ConfigError(
            f"the tokenizer of the pipeline pads on the {tokenizer.padding_side}, expected the right. Leave out "
            "--onnx-text-encoder: prompts are then encoded in PyTorch."
        )
    before, after = encoder.around()
    if text.thinking is None:
        network: nn.Module = UMT5(encoder.text_encoder, max_sequence_length)
        width = int(config.d_model)
    else:
        network = Qwen3(encoder.text_encoder, max_sequence_length, text.layers, zero_padding=text.zero_padding)
        width = len(text.layers) * int(config.hidden_size)
    return network, PromptSettings(
        instruction=before, after=after, clean="web" if text.thinking is None else "none", mask=encoder.mask,
        length=max_sequence_length, max_sequence_length=max_sequence_length, width=width,
        pad_id=int(tokenizer.pad_token_id), pad_token=str(tokenizer.pad_token),
    )  # fmt: skip
