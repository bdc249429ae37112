"""Train, export and run continuous-time consistency models (sCM).

``import scm_sdk`` loads nothing heavy: each public name is imported on first use (PEP 562). The public
interface is what ``scm_sdk``, ``scm_sdk.train`` and ``scm_sdk.model`` list in ``__all__``; all else is internal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._util.public import lazy_names
from ._version import __version__

if TYPE_CHECKING:
    from ._util.events import EventLines, Events, ProgressBar
    from .bundle.bundle import Bundle
    from .bundle.scheduler import diffusers_scheduler
    from .bundle.signing import Identity, PublicKey
    from .errors import (
        BackendError,
        BackendFailure,
        BackendUnavailable,
        BundleError,
        ConfigError,
        ExportError,
        IncompatibleEngineError,
        IntegrityError,
        LatencyError,
        ParityError,
        QueueFull,
        SchemaError,
        ScmError,
        ShapeError,
        TrainError,
        UnknownArgument,
        UnsupportedGraphError,
    )
    from .export.build_all import build_all
    from .export.bundle_export import export_bundle
    from .export.check import check_model
    from .export.diagnose.validate import validate
    from .export.engines.add import add_engines
    from .export.flow_pipeline import import_flow_pipeline
    from .export.sana import import_sana
    from .inference.batcher import Batcher
    from .inference.generator import Generator
    from .inference.latency import Latency, measure
    from .inference.output import GeneratorOutput
    from .inference.parity.compare import Parity, compare
    from .inference.selection import Plan
    from .model.consistency import ConsistencyModel, ModelConfig
    from .model.decoder import Decoder
    from .model.networks.custom import register_network
    from .model.sampler import Sampler
    from .noise import draw_noise
    from .serve.client import Client, ClientOutput
    from .spec import Precision, SamplerSpec, TensorSpec

__all__ = [
    "BackendError",
    "BackendFailure",
    "BackendUnavailable",
    "Batcher",
    "Bundle",
    "BundleError",
    "Client",
    "ClientOutput",
    "ConfigError",
    "ConsistencyModel",
    "Decoder",
    "EventLines",
    "Events",
    "ExportError",
    "Generator",
    "GeneratorOutput",
    "Identity",
    "IncompatibleEngineError",
    "IntegrityError",
    "Latency",
    "LatencyError",
    "ModelConfig",
    "Parity",
    "ParityError",
    "Plan",
    "Precision",
    "ProgressBar",
    "PublicKey",
    "QueueFull",
    "Sampler",
    "SamplerSpec",
    "SchemaError",
    "ScmError",
    "ShapeError",
    "TensorSpec",
    "TrainError",
    "UnknownArgument",
    "UnsupportedGraphError",
    "__version__",
    "add_engines",
    "build_all",
    "check_model",
    "compare",
    "diffusers_scheduler",
    "draw_noise",
    "export_bundle",
    "import_flow_pipeline",
    "import_sana",
    "measure",
    "register_network",
    "validate",
]

_HOMES = {
    "BackendError": ".errors",
    "BackendFailure": ".errors",
    "BackendUnavailable": ".errors",
    "Batcher": ".inference.batcher",
    "Bundle": ".bundle.bundle",
    "BundleError": ".errors",
    "Client": ".serve.client",
    "ClientOutput": ".serve.client",
    "ConfigError": ".errors",
    "ConsistencyModel": ".model.consistency",
    "Decoder": ".model.decoder",
    "EventLines": "._util.events",
    "Events": "._util.events",
    "ExportError": ".errors",
    "Generator": ".inference.generator",
    "GeneratorOutput": ".inference.output",
    "Identity": ".bundle.signing",
    "IncompatibleEngineError": ".errors",
    "IntegrityError": ".errors",
    "Latency": ".inference.latency",
    "LatencyError": ".errors",
    "ModelConfig": ".model.consistency",
    "Parity": ".inference.parity.compare",
    "ParityError": ".errors",
    "Plan": ".inference.selection",
    "Precision": ".spec",
    "ProgressBar": "._util.events",
    "PublicKey": ".bundle.signing",
    "QueueFull": ".errors",
    "Sampler": ".model.sampler",
    "SamplerSpec": ".spec",
    "SchemaError": ".errors",
    "ScmError": ".errors",
    "ShapeError": ".errors",
    "TensorSpec": ".spec",
    "TrainError": ".errors",
    "UnknownArgument": ".errors",
    "UnsupportedGraphError": ".errors",
    "add_engines": ".export.engines.add",
    "build_all": ".export.build_all",
    "check_model": ".export.check",
    "compare": ".inference.parity.compare",
    "diffusers_scheduler": ".bundle.scheduler",
    "draw_noise": ".noise",
    "export_bundle": ".export.bundle_export",
    "import_flow_pipeline": ".export.flow_pipeline",
    "import_sana": ".export.sana",
    "measure": ".inference.latency",
    "register_network": ".model.networks.custom",
    "validate": ".export.diagnose.validate",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
