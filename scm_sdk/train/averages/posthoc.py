"""Post-hoc EMA: reconstruct a power-function average of any width from stored snapshots.

An average is a weighted sum of the weights of all iterations; the factors are its *profile*. A sum of snapshots has the
sum of their profiles, so the least-squares fit of profiles gives the best approximation of the wanted average. Its
error follows from the profiles and is reported.

EDM2 defines profiles as functions of continuous time; here they are functions of the iteration, so that a profile in
the span of the snapshots is reproduced exactly.

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
"""Maximum relative distance between the wanted and the reconstructed profile."""
BINS = 1 << 13
"""Maximum number of bins of a profile."""
RCOND = 1e-6
"""Relative singular value of the profiles below which a direction is dropped, because its factors would amplify the
rounding of the stored float32 weights."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stored average: its width and its number of iterations."""

    sigma_rel: float
    iteration: Annotated[int, msgspec.Meta(ge=1, le=2**53)]


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """A reconstructed average.

    Attributes:
        model: Model with the averaged weights.
        sigma_rel: Relative width.
        iteration: Number of averaged iterations.
        num_snapshots: Number of snapshots in the sum.
        error: Relative distance between its profile and the wanted one.
    """

    model: ConsistencyModel
    sigma_rel: float
    iteration: int
    num_snapshots: int
    error: float


def profile(snapshot: Snapshot, edges: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the profile of an average per bin, (len(edges) - 1,); the sum over all iterations is 1.

    Args:
        snapshot: The average.
        edges: Rising iterations; iteration i is between the edges i - 1 and i.
    """
    power = power_exponent(snapshot.sigma_rel) + 1.0
    shares: NDArray[np.float64] = np.diff(np.minimum(edges / snapshot.iteration, 1.0) ** power)
    return shares


def solve_weights(snapshots: Sequence[Snapshot], wanted: Snapshot) -> tuple[NDArray[np.float64], float]:
    """Return the factor of each snapshot, (K,), float64, with sum 1, and the relative error of the profile."""
    times = [each.iteration for each in (*snapshots, wanted)]
    # One bin per iteration in a short run; in a long run neighbors share a bin, within which profiles are flat.
    edges = np.unique([*times, *np.linspace(0, max(times), min(max(times), BINS) + 1).astype(np.int64)])
    width = np.sqrt(np.diff(edges))
    columns = np.stack([profile(each, edges) / width for each in snapshots], axis=1)
    target = profile(wanted, edges) / width
    # Constant weights must be reproduced, so the sum of the factors is 1; the last factor takes the remainder.
    basis, rest = columns[:, :-1] - columns[:, -1:], target - columns[:, -1]
    sizes = np.linalg.norm(basis, axis=0)
    first = np.linalg.lstsq(basis / sizes, rest, rcond=RCOND)[0] / sizes
    factors = np.append(first, 1.0 - first.sum())
    return factors, float(np.linalg.norm(columns @ factors - target) / np.linalg.norm(target))


def reconstruct(out: str | Path, sigma_rel: float, *, iteration: int | None = None) -> Reconstruction:
    """Reconstruct a run's power-function average of any width.

    Args:
        out: The run's folder; it was trained with ``averages.profiles``.
        sigma_rel: The wanted width.
        iteration: Number of averaged iterations; None for the last snapshot.

    Raises:
        ConfigError: If there is no average of this width.
        TrainError: If the folder holds no snapshots, or the error exceeds ``MAX_ERROR``.
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
    """Sum the snapshots in float64, one tensor at a time to limit memory."""
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
