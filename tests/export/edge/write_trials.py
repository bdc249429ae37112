"""Write scm_sdk/assets/trial.tflite and trial.pte: what ``scm-export doctor`` tries LiteRT and ExecuTorch with.

make test-edge && .venv-edge/bin/python tests/export/edge/write_trials.py
"""

from pathlib import Path

import torch

ASSETS = Path(__file__).resolve().parents[3] / "scm_sdk" / "assets"


class Trial(torch.nn.Module):
    """Half of the noise, as ``trial.onnx``."""

    def forward(self, noise_0: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"images": 0.5 * noise_0}


def main() -> None:
    import litert_torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    noise = torch.zeros(1, 1, 2, 2)
    litert_torch.convert(Trial().eval(), (), {"noise_0": noise}).export(str(ASSETS / "trial.tflite"))
    program = torch.export.export(Trial().eval(), (noise,))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    (ASSETS / "trial.pte").write_bytes(lowered.buffer)


if __name__ == "__main__":
    main()
