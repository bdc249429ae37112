"""The model card of a bundle: a README that Hugging Face shows, written from what the bundle holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scm_sdk.spec import SamplerSpec


def model_card(name: str, specs: Sequence[SamplerSpec], provenance: Mapping[str, Any]) -> str:
    """Return the card as Markdown with a YAML head.

    Args:
        name: Human name of the model.
        specs: Its samplers.
        provenance: Data, licence, recipe; ``license`` goes into the head.
    """
    spec = specs[0]
    steps = ", ".join(str(s.num_inference_steps) for s in specs)
    labels = ", ".join(spec.class_names) or (f"0..{spec.num_classes - 1}" if spec.num_classes else "none")
    rows = "\n".join(f"| {key} | {value} |" for key, value in provenance.items())
    call = f"gen(num_images=4{f', class_labels={spec.class_names[0]!r}' if spec.class_names else ''}, seed=0)"
    return f"""---
library_name: scm-sdk
license: {provenance.get("license", "other")}
tags: [consistency-model, scm, onnx]
---
# {name}

A continuous-time consistency model (sCM) as a bundle of [scm-sdk](https://pypi.org/project/scm-sdk/): the
weights, one ONNX graph for the whole sampler of each number of steps, and recorded samples.

```python
from scm_sdk import Generator

gen = Generator.from_pretrained("path/to/this/folder")
images = {call}.images
```

| | |
|---|---|
| steps | {steps} |
| sample | {" x ".join(map(str, spec.sample_shape))} |
| labels | {labels} |
| sigma_data | {spec.sigma_data} |
{rows}

Files and hashes are listed in `scm_manifest.json`; `scm-export bundle verify` checks them.
"""
