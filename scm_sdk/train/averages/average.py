"""The mean of the weights of several runs with a common start (model soup).

Runs that continue from one checkpoint end in one basin of the loss, each displaced from its center by its last batches.
Their mean is closer to the center, at no cost at inference.

Source: Wortsman et al., 2022, "Model soups", arXiv 2203.05482, the uniform soup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch

from ...errors import ConfigError
from ...model.consistency import ConsistencyModel


def average_models(folders: Sequence[str | Path]) -> ConsistencyModel:
    """Return the model with the mean weights of several checkpoints, summed in float64.

    Args:
        folders: Two or more models, as ``ConsistencyModel.from_pretrained`` takes them; the config of the first is
            kept, with the iterations of the least finished run.

    Raises:
        ConfigError: If there are fewer than two, or they differ in more than weights and provenance.
        BundleError: If a model cannot be loaded.
    """
    if len(folders) < 2:
        raise ConfigError(f"{len(folders)} model is given, expected two or more to average.")
    first = ConsistencyModel.from_pretrained(folders[0])
    provenance = first.config.provenance
    mean = {name: value.double() for name, value in first.network.state_dict().items()}
    lengths = [provenance.get("iteration", "")]
    for folder in folders[1:]:
        other = ConsistencyModel.from_pretrained(folder)
        _require_alike(first, other, str(folders[0]), str(folder))
        if _trained(other.config.provenance) < _trained(provenance):
            provenance = provenance | {key: other.config.provenance[key] for key in ("iteration", "num_iterations")}
        lengths.append(other.config.provenance.get("iteration", ""))
        for name, value in other.network.state_dict().items():
            mean[name] += value.double()
    dtypes = {name: value.dtype for name, value in first.network.state_dict().items()}
    with torch.no_grad():
        first.network.load_state_dict({name: (value / len(folders)).to(dtypes[name]) for name, value in mean.items()})
    provenance = provenance | {"averaged": f"the weights of {len(folders)} runs"}
    if all(lengths):
        provenance["runs"] = f"mean of {len(lengths)} runs of {', '.join(lengths[:-1])} and {lengths[-1]} iterations"
    return ConsistencyModel(msgspec.structs.replace(first.config, provenance=provenance), first.network)


def _trained(provenance: Mapping[str, str]) -> float:
    """Return the completed share of a run's iterations; 1 if unknown."""
    try:
        return int(provenance["iteration"]) / int(provenance["num_iterations"])
    except (KeyError, ValueError, ZeroDivisionError):
        return 1.0


def _require_alike(first: ConsistencyModel, other: ConsistencyModel, name: str, other_name: str) -> None:
    """Refuse models with different configs; only the provenance may differ."""
    mine, its = (msgspec.to_builtins(msgspec.structs.replace(m.config, provenance={})) for m in (first, other))
    differing = sorted(key for key in mine if mine[key] != its[key])
    if differing:
        key = differing[0]
        raise ConfigError(
            f"{other_name} has {key} = {its[key]}, {name} has {mine[key]}; expected models that differ in their "
            "weights alone. Average runs that started from one checkpoint."
        )
