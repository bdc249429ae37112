"""Seed ranges: reduced precisions are calibrated, selected and judged on disjoint ranges.

A graph must not be judged on the samples that tuned it. ``calibration`` measures ranges on ``CALIBRATION``,
``precision.probe`` compares plans on ``SELECTION``, and the parity gate (``validate``) judges on ``JUDGMENT``, from its
first seed or another one (``validate --first-seed``).
"""

from __future__ import annotations

JUDGMENT = range(0, 1 << 40)
CALIBRATION = range(1 << 40, 1 << 41)
SELECTION = range(1 << 41, 1 << 42)
