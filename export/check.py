"""Check whether a network of your own can be trained and exported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .graph.network import compose_sampler, export_network

if TYPE_CHECKING:
    from scm_sdk.model.consistency import ConsistencyModel


def check_model(model: ConsistencyModel, *, training: bool = True) -> None:
    """Name the first thing that keeps a model from being distilled, exported and run.

    Takes as long as an export: seconds for a small network, a minute or more for a large one.

    Args:
        model: In evaluation mode, float32.
        training: See ``check_network``.

    Raises:
        ShapeError: If F has another shape or dtype than x.
        ConfigError: If the network fails, or breaks ``model.own.Network`` in another way.
        ExportError: If an operator has no translation, the batch is fixed, or it decides by a tensor's value; the
            message names the operator and the line of the network.
        UnsupportedGraphError: If the graph holds what no engine runs, or trigonometry of what is not the time.
    """
    from scm_sdk.model.networks.check import check_network

    check_network(model, training=training)
    compose_sampler(export_network(model), model.spec(1))
