"""Reference statistics as files in EDM's format: an ``.npz`` with ``mu`` (D,) and ``sigma`` (D, D).

Files of scm-sdk also record the network and the number and size of the images; recorded values must match.

Source: Karras et al., 2022, arXiv 2206.00364, whose published reference files hold these two arrays.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np

from ..._util.files import atomic_write_bytes
from ...errors import ConfigError, IntegrityError
from .distances import FeatureStats
from .nets import FeatureNet


def read_stats(path: Path, net: FeatureNet, picture: tuple[int, ...]) -> FeatureStats:
    """Read reference statistics.

    Args:
        path: The file.
        net: The feature network.
        picture: Shape of one image, (H, W, C).

    Returns:
        Mean and covariance; ``count`` is 0 if the file does not record it.

    Raises:
        IntegrityError: If the file cannot be read or holds no statistics.
        ConfigError: If network, weights, dimension or image size differ.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as exc:
        raise IntegrityError(f"{path} is no readable .npz ({exc}), expected one with mu and sigma.") from exc
    mean, cov = (np.asarray(found.get(name, np.zeros(0))) for name in ("mu", "sigma"))
    if mean.ndim != 1 or not mean.size or cov.shape != (mean.size, mean.size):
        raise IntegrityError(f"{path} holds {sorted(found)}, expected mu (D,) and sigma (D, D), as EDM's files do.")
    mean, cov = mean.astype(np.float64), cov.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(cov).all() and np.allclose(cov, cov.T)):
        raise IntegrityError(f"{path} holds a covariance that is not finite and symmetric. Make the file again.")
    own = {"net": net.name, "weights_sha256": net.weights_sha256, "picture": str(tuple(picture))}
    for name, wanted in own.items():
        if name in found and str(found[name]) != wanted:
            raise ConfigError(
                f"{path} has {name} {found[name]}, expected {wanted}: statistics of different networks or pictures "
                "are not comparable. Give those of this network, or choose its network with --feature-net."
            )
    if mean.size != net.dim:
        raise ConfigError(
            f"{path} has {mean.size} dimensions, expected {net.dim}, those of {net.name}: statistics of different "
            "networks are not comparable. Choose its network with --feature-net."
        )
    return FeatureStats(mean=mean, cov=cov, count=int(found.get("n", 0)))


def write_stats(path: Path, stats: FeatureStats, net: FeatureNet, picture: tuple[int, ...]) -> None:
    """Write statistics so that ``read_stats``, and any reader of EDM's files, reads them.

    Raises:
        ScmError: If the file cannot be written.
    """
    buffer = io.BytesIO()
    np.savez(
        buffer,
        mu=stats.mean,
        sigma=stats.cov,
        n=np.array(stats.count),
        net=np.array(net.name),
        weights_sha256=np.array(net.weights_sha256),
        picture=np.array(str(tuple(picture))),
    )
    atomic_write_bytes(path, buffer.getvalue())
