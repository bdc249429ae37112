"""The scores that ``scm-export evaluate --keep`` left in a bundle, as a report shows them."""

from __future__ import annotations

import json
from typing import Any

from ..bundle import Bundle
from ..errors import SchemaError

QUALITY_PATH = "reports/quality.json"


def read_quality(bundle: Bundle) -> list[dict[str, Any]]:
    """Return the kept scores, each as ``evaluate.scoring.Score.to_dict`` gave it; [] if there are none.

    Raises:
        SchemaError: If the file holds something else.
    """
    if not any(entry.path == QUALITY_PATH for entry in bundle.manifest.files):
        return []
    try:
        scores = json.loads(bundle.file(QUALITY_PATH).read_bytes())
        return [{**score, "quality": dict(score["quality"]), "sampler": str(score["sampler"])} for score in scores]
    except (ValueError, KeyError, TypeError) as exc:
        raise SchemaError(
            f"{QUALITY_PATH} of {bundle.path} cannot be read ({exc}), expected what scm-export evaluate --keep wrote. "
            "Run it again."
        ) from exc
