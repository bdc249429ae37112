"""Seed ranges: reduced precisions are made, chosen and judged on disjoint ranges.

A graph that is judged on the samples that it was tuned on passes by its tuning. ``calibration`` measures ranges
on ``CALIBRATION``, ``precision.probe`` compares plans on ``SELECTION``, and the parity gate (``validate``) judges on
``JUDGMENT``, from its first seed on or from any other (``validate --first-seed``).
"""

from __future__ import annotations

JUDGMENT = range(0, 1 << 40)
CALIBRATION = range(1 << 40, 1 << 41)
SELECTION = range(1 << 41, 1 << 42)
