"""Check whether a custom network can be trained and exported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .graph.network import compose_sampler, export_network

if TYPE_CHECKING:
    from scm_sdk.model.consistency import ConsistencyModel


def check_model(model: ConsistencyModel, *, training: bool = True) -> None:
    """Raise an error for the first problem that prevents distillation, export or inference of a model.

    Takes as long as an export: seconds for a small network, a minute or more for a large one.

    Args:
        model: A float32 model in evaluation mode.
        training: See ``check_network``.

    Raises:
        ShapeError: If F has another shape or dtype than x.
        ConfigError: If the network fails, or violates ``networks.custom.Network`` in another way.
        ExportError: If an operator has no translation, the batch size is fixed, or control flow depends on a tensor;
            the message names the operator and the line of the network.
        UnsupportedGraphError: If the graph holds an operator that engines do not run, or trigonometry of a value other
            than the time.
    """
    from scm_sdk.model.networks.check import check_network

    check_network(model, training=training)
    compose_sampler(export_network(model), model.spec(1))
