"""Write a bundle's card anew from what it records by now: comparisons, budgets and scores come after the export."""

from __future__ import annotations

import os

from scm_sdk.bundle import Bundle
from scm_sdk.card import bundle_card
from scm_sdk.extend import extend_bundle
from scm_sdk.report.quality import read_quality

CARD_PATH = "README.md"


def refresh_card(path: str | os.PathLike[str], *, where: str = "") -> Bundle:
    """Replace a bundle's card. A card is a description: build id and recorded parity stay.

    Args:
        path: The bundle.
        where: Hub id, or other place, that its usage lines name.

    Returns:
        The bundle with its new card.

    Raises:
        BundleError: If the bundle is damaged or cannot be written.
    """
    with extend_bundle(path) as draft:
        card = bundle_card(draft.bundle.manifest, quality=read_quality(draft.bundle), where=where)
        draft.path(CARD_PATH).write_bytes(card.encode())
    return Bundle.open(path, verify="none")
