"""What tests of shared batches share: samplers, requests right and wrong, and the check against single calls."""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from hypothesis import strategies as st

from scm_sdk import Generator
from scm_sdk.errors import ScmError
from scm_sdk.inference.output import GeneratorOutput
from scm_sdk.spec import SamplerSpec

PLAIN = SamplerSpec(times=(1.56, 1.1), sample_shape=(3, 4, 4), num_classes=3, max_batch=4)
BOTH = (msgspec.structs.replace(PLAIN, times=(1.56,)), PLAIN)

requests = st.builds(
    lambda count, seed, label, steps: {
        "num_images": count, "seed": seed, "class_labels": label, "num_inference_steps": steps, "output_type": "raw",
    },
    st.integers(1, 7), st.integers(0, 2**64 - 8), st.none() | st.integers(0, 3), st.sampled_from([1, 2]),
)  # fmt: skip
wrong = st.sampled_from([{"num_images": 0}, {"class_labels": "horse"}, {"seed": -1}, {"num_inference_steps": 9}])


def same(outputs: Sequence[GeneratorOutput | Exception], asked: Sequence[dict[str, Any]], gen: Generator) -> None:
    """Check every output, bit by bit, against the call of its own request."""
    for out, request in zip(outputs, asked, strict=True):
        try:
            alone = gen(**request)
        except ScmError as exc:
            assert type(out) is type(exc)
            assert str(out) == str(exc)
            continue
        assert isinstance(out, GeneratorOutput), out
        assert (out.seeds, out.class_labels) == (alone.seeds, alone.class_labels)
        np.testing.assert_array_equal(out.images, alone.images)
