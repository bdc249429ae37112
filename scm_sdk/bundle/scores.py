"""Quality scores stored in a bundle by ``scm-export evaluate --keep``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .._util.files import safe_join
from ..errors import SchemaError
from .manifest import Manifest

SCORES_PATH = "reports/quality.json"
_MAX_BYTES = 8 << 20


def read_scores(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Return the scores of a bundle in the form of ``evaluate.quality.scoring.Score.to_dict``; [] if none are listed.

    Raises:
        SchemaError: If the file cannot be read or has another content.
    """
    entry = next((entry for entry in manifest.files if entry.path == SCORES_PATH), None)
    if entry is None:
        return []
    try:
        if entry.size > _MAX_BYTES:
            raise ValueError(f"{entry.size} bytes")
        scores = json.loads(safe_join(folder, SCORES_PATH).read_bytes())
        return [{**score, "quality": dict(score["quality"]), "sampler": str(score["sampler"])} for score in scores]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        raise SchemaError(
            f"{SCORES_PATH} of {folder} cannot be read ({exc}), expected what scm-export evaluate --keep wrote. "
            "Run that command again."
        ) from exc
