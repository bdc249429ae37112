"""A component of a pipeline is loaded without a second copy of its weights."""

from pathlib import Path
from typing import Any, ClassVar

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

from scm_sdk.model.foreign.component_module import load_component  # noqa: E402


class Part(nn.Module):
    """A linear layer, and a table that its constructor computes, as rotary embeddings are."""

    weights_made: ClassVar[list[bool]] = []

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.unused = nn.Linear(width, width)
        self.register_buffer("table", torch.arange(width).float(), persistent=False)
        self.weights_made.append(any(not p.is_meta for p in self.parameters()))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Part":
        return cls(**config)


def test_tables_are_computed_and_weights_are_not_drawn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    part = Part(4)
    save_file(
        {name: tensor.bfloat16() for name, tensor in part.state_dict().items()},
        tmp_path / "diffusion_pytorch_model.safetensors",
    )
    Part.weights_made.clear()
    found: Any = load_component(Part, {"width": 4}, tmp_path, keep="linear.")
    assert not any(Part.weights_made), "a constructor of large models would fill gigabytes, only to discard them"
    assert torch.equal(found.table, torch.arange(4).float())
    assert found.linear.weight.dtype == torch.float32 and found.unused.weight.is_meta
    assert torch.equal(found.linear.weight, part.linear.weight.bfloat16().float())
    assert not any(p.is_meta for p in Part(4).parameters()), "modules that others make are as before"
