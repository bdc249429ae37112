"""Export the text encoder of a SANA-Sprint pipeline as a graph of its own, with its tokenizer and settings.

    text_encoder/model.onnx   input_ids and attention_mask (batch, T) int64 to prompt_embeds (batch, L, D) float32
    text_encoder/tokenizer.json, text_encoder/prompt.json

T is the length of the instruction and the prompt, L that of the prompt: the first and the last L - 1 of the T states.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from scm_sdk._util.files import atomic_write_bytes
from scm_sdk._util.json_struct import to_json
from scm_sdk.bundle.layout import PROMPT_GRAPH_PATH, PROMPT_NAME, TOKENIZER_NAME
from scm_sdk.bundle.manifest import Role
from scm_sdk.errors import BundleError
from scm_sdk.inference.prompt_graph import PromptSettings

from .cleanup import clean
from .decoder import IR_VERSION
from .io import write_model
from .trace import ROOT, trace_tokens, translate

if TYPE_CHECKING:
    from torch import Tensor


def export_text_encoder(pipeline: Path, folder: Path, *, max_sequence_length: int) -> dict[str, Role]:
    """Write the text encoder of a pipeline into the folder of a bundle, float32.

    Args:
        pipeline: Folder of the pipeline.
        folder: Folder of the bundle.
        max_sequence_length: Tokens of a prompt, L.

    Returns:
        Role of each written file whose name does not determine it.

    Raises:
        ConfigError: If the pipeline has no text encoder.
        BundleError: If the tokenizer has no file of the library ``tokenizers``.
        ExportError: If the encoder cannot be exported.
    """
    import torch

    from scm_sdk.model.foreign.prompt_encoder import PromptEncoder

    encoder = PromptEncoder(pipeline)
    tokenizer, instruction = encoder.tokenizer, "\n".join(encoder.instruction)
    length = len(tokenizer.encode(instruction)) + max_sequence_length - 2  # as SanaSprintPipeline counts
    kept = [0, *range(length - max_sequence_length + 1, length)]

    class Encoding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = encoder.text_encoder.float().eval()
            self.network.set_attn_implementation("eager")
            at = torch.arange(length)
            past = at[:, None] - at[None, :]  # how far back a key is from a query
            near = past < self.network.config.sliding_window
            self.register_buffer("kept", torch.tensor(kept), persistent=False)
            self.register_buffer("positions", at[None], persistent=False)
            self.register_buffer("full", (past >= 0)[None, None], persistent=False)
            self.register_buffer("sliding", ((past >= 0) & near)[None, None], persistent=False)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            # The masks are made here, because those of transformers index by the batch, whose shape is not inferred.
            there, lowest = attention_mask[:, None, None, :] > 0, torch.finfo(torch.float32).min
            masks = {
                f"{kind}_attention": torch.where(getattr(self, kind) & there, 0.0, lowest)
                for kind in ("full", "sliding")
            }
            states = self.network(
                input_ids=input_ids, attention_mask=masks, position_ids=self.positions, use_cache=False
            )
            chosen: Tensor = states.last_hidden_state[:, self.kept]
            return chosen

    program = trace_tokens(Encoding().eval(), length)
    model = clean(translate(program, ("input_ids", "attention_mask"), "prompt_embeds"), root=ROOT)
    model.ir_version = IR_VERSION
    graph = folder / PROMPT_GRAPH_PATH
    write_model(model, graph)
    settings = PromptSettings(
        instruction=instruction, length=length, max_sequence_length=max_sequence_length,
        width=int(encoder.text_encoder.config.hidden_size), pad_id=int(tokenizer.pad_token_id),
        pad_token=str(tokenizer.pad_token),
    )  # fmt: skip
    tokenizer.save_pretrained(graph.parent)
    for path in graph.parent.glob("*"):
        if path.name not in (graph.name, f"{graph.name}_data", TOKENIZER_NAME):
            path.unlink()
    if not (graph.parent / TOKENIZER_NAME).is_file():
        raise BundleError(f"{pipeline / 'tokenizer'} has no {TOKENIZER_NAME}, expected a fast tokenizer. Convert it.")
    atomic_write_bytes(graph.parent / PROMPT_NAME, to_json(settings), error=BundleError)
    parent = graph.parent.name
    return {f"{parent}/{TOKENIZER_NAME}": "config", f"{parent}/{PROMPT_NAME}": "config"}
