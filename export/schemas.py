"""What ONNX's own schemas say about the types of an operator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


@cache
def types_of(
    op_type: str, domain: str, opset: int, num_inputs: int, num_outputs: int
) -> tuple[tuple[bool, ...], tuple[bool, ...], frozenset[str]]:
    """Return which inputs and outputs of an operator may change their float type, and what it may become.

    Returns:
        For each input and each output whether its type is free, and the low types that all free ones
        take, out of ``FLOAT16`` and ``BFLOAT16``.
    """
    import onnx

    schema = onnx.defs.get_schema(op_type, opset, domain)
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}

    def formal(parameters: Sequence[onnx.defs.OpSchema.FormalParameter], count: int) -> Iterator[str]:
        for i in range(count):  # the last one may be variadic
            yield parameters[min(i, len(parameters) - 1)].type_str

    inputs, outputs = list(formal(schema.inputs, num_inputs)), list(formal(schema.outputs, num_outputs))
    names = {"FLOAT16": "tensor(float16)", "BFLOAT16": "tensor(bfloat16)"}
    floats = [types for name in {*inputs, *outputs} if "tensor(float)" in (types := allowed.get(name, set()))]
    able = frozenset(name for name, text in names.items() if all(text in types for types in floats))
    free = {name for name, types in allowed.items() if "tensor(float)" in types}
    return tuple(t in free for t in inputs), tuple(t in free for t in outputs), able
