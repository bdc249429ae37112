"""Post-hoc EMA: reconstruct a power-function average of any width from stored snapshots.

An average is a weighted sum of the weights of all iterations: its *profile*. A sum of snapshots has the sum of their
profiles, so the sum whose profile is nearest to the wanted one, by least squares, is the average itself as far as the
snapshots allow. How far that is follows from the profiles alone, and is told.

EDM2 states profiles as functions of a continuous time; here they are those of the iterations themselves, so that a
profile that the snapshots span is met exactly.

Source: EDM2, arXiv 2312.02696, section 3.2 and appendix C.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..._util.files import open_regular
from ...bundle.layout import CONFIG_NAME
from ...errors import ConfigError, IntegrityError, TrainError
from ...model.checkpoint import read_config
from ...model.consistency import ConsistencyModel
from ..parallel.state import UNREADABLE, check_tensor
from .ema import SNAPSHOT_FOLDER, SNAPSHOT_METADATA
from .schedules import power_exponent

MAX_ERROR = 0.1
"""Largest distance between the wanted profile and the one that is made, relative to the wanted one's size."""
BINS = 1 << 13
"""Bins of a profile at most."""
RCOND = 1e-6
"""Singular values of the profiles, relative to the largest, below which a direction is left out: there, factors
would be so large that the rounding of the stored float32 weights shows."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stored average: its width and the iterations it looks back on."""

    sigma_rel: float
    iteration: Annotated[int, msgspec.Meta(ge=1, le=2**53)]


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """An average made afterwards.

    Attributes:
        model: It, as a model.
        sigma_rel: Its width.
        iteration: Iterations it looks back on.
        num_snapshots: Snapshots it is made from.
        error: Distance between its profile and the wanted one, relative to the wanted one's size.
    """

    model: ConsistencyModel
    sigma_rel: float
    iteration: int
    num_snapshots: int
    error: float


def profile(snapshot: Snapshot, edges: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the share that the weights between two edges have in an average, (len(edges) - 1,); from 0 on, 1 in all.

    Args:
        snapshot: The average.
        edges: Rising iterations; iteration i lies between i - 1 and i.
    """
    power = power_exponent(snapshot.sigma_rel) + 1.0
    shares: NDArray[np.float64] = np.diff(np.minimum(edges / snapshot.iteration, 1.0) ** power)
    return shares


def solve_weights(snapshots: Sequence[Snapshot], wanted: Snapshot) -> tuple[NDArray[np.float64], float]:
    """Return the factor of each snapshot, (K,), float64, which sum to 1, and the relative error of their profile."""
    times = [each.iteration for each in (*snapshots, wanted)]
    # Every iteration by itself in a short run; in a long one neighbors share a bin, within which profiles are flat.
    edges = np.unique([*times, *np.linspace(0, max(times), min(max(times), BINS) + 1).astype(np.int64)])
    width = np.sqrt(np.diff(edges))
    columns = np.stack([profile(each, edges) / width for each in snapshots], axis=1)
    target = profile(wanted, edges) / width
    # What does not change in a run must come out as it is: the factors' sum is held at 1, the last takes up the rest.
    basis, rest = columns[:, :-1] - columns[:, -1:], target - columns[:, -1]
    sizes = np.linalg.norm(basis, axis=0)
    first = np.linalg.lstsq(basis / sizes, rest, rcond=RCOND)[0] / sizes
    factors = np.append(first, 1.0 - first.sum())
    return factors, float(np.linalg.norm(columns @ factors - target) / np.linalg.norm(target))


def reconstruct(out: str | Path, sigma_rel: float, *, iteration: int | None = None) -> Reconstruction:
    """Return a run's power-function average of a width that it need not have tracked.

    Args:
        out: The run's folder; it was trained with ``averages.profiles``.
        sigma_rel: The wanted width.
        iteration: Iterations the average looks back on; the last snapshot's when None.

    Raises:
        ConfigError: If there is no average of this width.
        TrainError: If the folder holds no snapshots, or they do not reach the wanted average.
        IntegrityError: If a snapshot is damaged or belongs to another network.
    """
    out = Path(out)
    power_exponent(sigma_rel)
    paths = sorted((out / SNAPSHOT_FOLDER).glob("*.safetensors"))
    if not paths:
        raise TrainError(
            f"{out / SNAPSHOT_FOLDER} holds no snapshots, expected those of a run with --ema-profile, "
            "for example --ema-profile 0.05 --ema-profile 0.1. Train with them, then reconstruct."
        )
    model = ConsistencyModel(read_config(out / CONFIG_NAME)).eval().requires_grad_(False)
    with ExitStack() as stack:
        stored = [_open(path, stack) for path in paths]
        last = max(snapshot.iteration for snapshot, _ in stored)
        wanted = Snapshot(sigma_rel=sigma_rel, iteration=last if iteration is None else iteration)
        if not 0 < wanted.iteration <= last:
            raise TrainError(f"iteration is {iteration}, expected 1 to {last}: there is no later snapshot in {out}.")
        stored = [(snapshot, archive) for snapshot, archive in stored if snapshot.iteration <= wanted.iteration]
        factors, error = solve_weights([snapshot for snapshot, _ in stored], wanted) if stored else (np.zeros(0), 1.0)
        if error > MAX_ERROR:
            raise TrainError(
                f"{len(stored)} snapshots up to iteration {wanted.iteration} make sigma_rel {sigma_rel} with a "
                f"profile that is off by {error:.0%}, at most {MAX_ERROR:.0%} is allowed. Choose a width nearer to "
                f"{', '.join(sorted({format(snapshot.sigma_rel, 'g') for snapshot, _ in stored})) or 'a stored one'}, "
                "or store snapshots more often."
            )
        weights = _sum(model.network.state_dict(), [archive for _, archive in stored], factors, paths)
    model.network.load_state_dict(weights)
    about = {
        "ema": f"power function, sigma_rel {sigma_rel:g}, iteration {wanted.iteration}",
        "iteration": str(wanted.iteration),
    }
    model.config = msgspec.structs.replace(model.config, provenance={**model.config.provenance, **about})
    return Reconstruction(
        model=model, sigma_rel=sigma_rel, iteration=wanted.iteration, num_snapshots=len(stored), error=error
    )


def _open(path: Path, stack: ExitStack) -> tuple[Snapshot, Any]:
    try:
        stack.enter_context(open_regular(path))
        archive = stack.enter_context(safe_open(path, framework="pt"))
        snapshot = msgspec.json.decode(archive.metadata()[SNAPSHOT_METADATA], type=Snapshot)
        power_exponent(snapshot.sigma_rel)
    except (*UNREADABLE, ConfigError) as exc:
        raise IntegrityError(f"{path} is no snapshot of an average ({exc}). Delete it or copy it again.") from exc
    return snapshot, archive


def _sum(
    like: dict[str, Tensor], archives: list[Any], factors: NDArray[np.float64], paths: list[Path]
) -> dict[str, Tensor]:
    """Add the snapshots up in float64, one tensor at a time: the files need not fit in memory together."""
    weights = {}
    for name, expected in like.items():
        total = torch.zeros(expected.shape, dtype=torch.float64)
        for archive, factor in zip(archives, factors, strict=True):
            try:
                tensor = archive.get_tensor(name)
                check_tensor(name, tensor, expected.shape, expected.dtype)
                total += factor * tensor
            except (SafetensorError, ValueError) as exc:
                raise IntegrityError(
                    f"a snapshot in {paths[0].parent} does not belong to the run's network: {name!r}, {exc}. "
                    "Delete those of another run."
                ) from exc
        weights[name] = total.to(expected.dtype)
    return weights
