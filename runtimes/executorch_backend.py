"""Run the sampler with ExecuTorch's XNNPACK kernels on the CPU. Its Python binding imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scm_sdk._util.lazy import installed_version, require
from scm_sdk.errors import ConfigError

from .fixed_batch import FixedBatchBackend, Port, cannot_load

METHOD = "forward"
_TYPES = {6: "float32", 4: "int64"}  # executorch's ScalarType


class ExecuTorchBackend(FixedBatchBackend):
    """One method of a ``.pte`` file; see ``Backend``.

    Raises:
        ConfigError: If ``num_threads`` is set, which its Python binding has no way to do.
    """

    name = "executorch"

    def load(self, path: Path, num_threads: int | None) -> tuple[Sequence[Port], Sequence[Port]]:
        """See ``FixedBatchBackend.load``."""
        if num_threads is not None:
            raise ConfigError(
                f"num_threads is {num_threads}, expected None: executorch chooses its threads by itself. Leave it out, "
                "or use another backend."
            )
        runtime = require("executorch.runtime", extra="executorch", purpose="backend 'executorch'")
        try:
            checked = runtime.Verification.InternalConsistency
            self._program: Any = runtime.Runtime.get().load_program(path, verification=checked)
            self._method: Any = self._program.load_method(METHOD)
            facts = self._method.metadata
            inputs = [_port(facts.input_tensor_meta(i)) for i in range(facts.num_inputs())]
            outputs = [_port(facts.output_tensor_meta(i)) for i in range(facts.num_outputs())]
        except Exception as exc:  # RuntimeError of its C++ parts
            raise cannot_load("executorch", installed_version("executorch"), path, exc) from exc
        # A program names no inputs; they are in the order of the spec.
        names = [tensor.name for tensor in self.spec.inputs]
        names += [f"input {i}" for i in range(len(names), len(inputs))]
        return (
            [(name, *port) for name, port in zip(names, inputs, strict=False)],
            [(self.spec.output_name if i == 0 else f"output {i}", *port) for i, port in enumerate(outputs)],
        )

    def run(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """See ``FixedBatchBackend.run``."""
        import torch

        (images,) = self._method.execute([torch.from_numpy(feeds[tensor.name]) for tensor in self.spec.inputs])
        return np.asarray(images.numpy()).copy()  # the method's own memory is written again by its next call

    def unload(self) -> None:
        """See ``FixedBatchBackend.unload``."""
        self._method = self._program = None


def _port(tensor: Any) -> tuple[str, tuple[int, ...]]:
    return _TYPES.get(tensor.dtype(), str(tensor.dtype())), tuple(tensor.sizes())


open_backend = ExecuTorchBackend
