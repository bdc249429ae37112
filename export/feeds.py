"""What a sampler graph is fed when nobody asked for a picture: to calibrate it, or to look at it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scm_sdk.examples import Examples, read_examples
from scm_sdk.request import make_example
from scm_sdk.sources import open_source
from scm_sdk.spec import SamplerSpec


def feeds_of(spec: SamplerSpec, seeds: Sequence[int], examples: Examples | None = None) -> dict[str, np.ndarray]:
    """Return the graph's inputs for some seeds, the very ones that ``Generator`` would feed it.

    What no seed gives, such as a prompt's embedding, is a row of ``examples``, or drawn: see ``make_example``.
    """
    noise, conditioning = make_example(spec, seeds, examples=examples).inputs(0, len(seeds))
    names = (tensor.name for tensor in spec.noise_inputs)
    return {**dict(zip(names, noise, strict=True)), **conditioning}


def bundle_examples(path: str | os.PathLike[str], prompts: Path) -> Examples:
    """Read a user's prompts for a bundle, with its own text encoder where they are text.

    Raises:
        ScmError: As ``Bundle.open`` and ``read_examples`` do.
    """
    source = open_source(path, verify="none")
    return read_examples(prompts, source.spec(source.default_steps, unrolled=False), source.text_encoder)
