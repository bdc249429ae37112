"""What a sampler graph is fed when nobody asked for a picture: to calibrate it, or to look at it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scm_sdk.request import make_example
from scm_sdk.spec import SamplerSpec


def feeds_of(spec: SamplerSpec, seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the graph's inputs for some seeds, the very ones that ``Generator`` would feed it.

    What no seed gives, such as a prompt's embedding, is drawn: see ``make_example``.
    """
    noise, conditioning = make_example(spec, seeds).inputs(0, len(seeds))
    names = (tensor.name for tensor in spec.noise_inputs)
    return {**dict(zip(names, noise, strict=True)), **conditioning}
