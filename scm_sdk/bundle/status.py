"""The state of a model: consistency model or teacher, length of training, whether its quality was measured.

Cards, reports, commands and ``GenerationInfo`` use these facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

Kind = Literal["consistency model", "diffusion model", "few-step model", "unknown"]

_PAPER = "(sCM, [arXiv 2410.11081](https://arxiv.org/abs/2410.11081))"
_OBJECTIVES = {
    "diffusion": "A TrigFlow diffusion model, such as a teacher for distillation; **not a consistency model**",
    "scd": f"A continuous-time consistency model {_PAPER}, distilled from a diffusion model",
    "sct": f"A continuous-time consistency model {_PAPER}, trained without a teacher",
    "cd": "A consistency model, distilled from a diffusion model in discrete time",
    "trajectory": "A consistency model, distilled onto the ends of a diffusion model's trajectories",
    "vsd": "A few-step generator, distilled from a diffusion model by variational score distillation (VSD) alone",
    "sCM and LADD (SANA-Sprint)": f"A continuous-time consistency model {_PAPER}, distilled with an adversarial loss "
    "(LADD) as SANA-Sprint",
    "few-step flow matching": "A few-step model of flow matching, distilled from a model of many steps",
    "flow map (AnyFlow)": "A flow map, distilled as AnyFlow ([arXiv 2605.13724](https://arxiv.org/abs/2605.13724))",
    "rCM": "A continuous-time consistency model with score regularization "
    "(rCM, [arXiv 2510.08431](https://arxiv.org/abs/2510.08431)), distilled from a flow model",
    "rCM or DMD": "A few-step model, distilled as rCM ([arXiv 2510.08431](https://arxiv.org/abs/2510.08431)) or by "
    "distribution matching (DMD)",
}
_FEW_STEP = {"few-step flow matching", "rCM", "rCM or DMD", "flow map (AnyFlow)"}
"""Objectives whose students are few-step models, not all of them consistency models."""
"""Kind of model by the first objective of its provenance (before a ``+``)."""


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """State of a model from its provenance and scores.

    Attributes:
        kind: Kind by the training objective; a diffusion model is a teacher, which needs tens of network calls.
        objective: Recorded training objective; "" if unknown.
        iteration: Completed training iterations; None if unknown.
        num_iterations: Planned training iterations; None if unknown.
        runs: Description of the runs of an averaged model; "" for a single run.
        discrete_points: Number of grid times of discrete-time training; None for continuous time.
        quality_measured: Whether the bundle holds scores of ``scm-export evaluate --keep``.
    """

    kind: Kind
    objective: str = ""
    iteration: int | None = None
    num_iterations: int | None = None
    runs: str = ""
    discrete_points: int | None = None
    quality_measured: bool = False

    @classmethod
    def of(cls, provenance: Mapping[str, Any], *, quality_measured: bool = False) -> ModelStatus:
        """Read the status from the provenance of a model; malformed entries count as absent."""
        objective = str(provenance.get("objective") or "")
        kind: Kind = "consistency model" if objective else "unknown"
        if (main := objective.partition("+")[0].strip()) in _FEW_STEP:
            kind = "few-step model"
        return cls(
            kind="diffusion model" if main == "diffusion" else kind,
            objective=objective,
            iteration=_count(provenance.get("iteration")),
            num_iterations=_count(provenance.get("num_iterations")),
            runs=str(provenance.get("runs") or ""),
            discrete_points=_count(provenance.get("discrete_points")),
            quality_measured=quality_measured,
        )

    @property
    def is_scm(self) -> bool:
        """Whether it was trained by sCD, sCT or SANA-Sprint's objective."""
        return self.objective.partition("+")[0].strip().lower().startswith(("scd", "sct", "scm"))

    @property
    def finished(self) -> bool | None:
        """Whether training reached its last iteration; None if unknown."""
        if self.iteration is None or self.num_iterations is None:
            return None
        return self.iteration >= self.num_iterations

    @property
    def training(self) -> str:
        """Length of the training, as a short text."""
        if self.runs:
            return self.runs
        return "length not on record" if self.iteration is None else self._iterations

    @property
    def _iterations(self) -> str:
        planned = "" if self.num_iterations is None else f" of {self.num_iterations}"
        return f"{self.iteration}{planned} iterations"

    @property
    def quality(self) -> str:
        """Whether quality was measured, as a short text."""
        return "measured" if self.quality_measured else "not measured"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons why the model is not a finished product, one sentence each; () if there are none."""
        return (*self.training_warnings, *(() if self.quality_measured else (QUALITY_WARNING,)))

    @property
    def training_warnings(self) -> tuple[str, ...]:
        """The ``warnings`` about training."""
        found = []
        if self.kind == "diffusion model":
            found.append(
                "this is a diffusion model (a teacher), not a consistency model: 1 or 2 network calls are too few for "
                "it. Distill it first: scm-export distill --teacher RUN"
            )
        if self.finished is False:
            found.append(f"training is unfinished: {self._iterations}. Run the training command again to continue.")
        return tuple(found)

    def describe(self, calls: str) -> str:
        """Return one sentence for a model card.

        Args:
            calls: The numbers of network calls of its samplers, for example ``"1 or 2"``.
        """
        main, _, more = self.objective.partition("+")
        name = _OBJECTIVES.get(main.strip(), f"A consistency model, objective {main!r}")
        if not self.objective:
            name = "A TrigFlow model whose training objective is not on record"
        if self.discrete_points:
            name = name.replace("continuous-time", "discrete-time")
        if more.strip() == "vsd":
            name += ", with variational score distillation (VSD)"
        if self.kind == "diffusion model":
            return f"{name}. Its samplers here take {calls} network calls; a diffusion model needs tens of them."
        return f"{name}: noise becomes a sample in {calls} network calls."

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: the fields, ``finished`` and ``warnings``."""
        return {**msgspec.to_builtins(self), "finished": self.finished, "warnings": list(self.warnings)}


QUALITY_WARNING = "quality: not measured. Measure it: scm-export evaluate BUNDLE --keep"


def _count(value: object) -> int | None:
    text = str(value)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None
