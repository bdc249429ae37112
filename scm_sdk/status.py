"""What a model is: consistency model or teacher, how far it was trained, whether its quality was measured.

Cards, reports, commands and ``GenerationInfo`` all take these facts from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

Kind = Literal["consistency model", "diffusion model", "unknown"]

_NAMES: dict[Kind, str] = {
    "consistency model": "A continuous-time consistency model (sCM, [arXiv 2410.11081]"
    "(https://arxiv.org/abs/2410.11081))",
    "diffusion model": "A TrigFlow diffusion model, such as a teacher for distillation; **not a consistency model**",
    "unknown": "A TrigFlow model whose training objective is not on record",
}


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's provenance and scores say about it.

    Attributes:
        kind: By the training objective; a diffusion model is a teacher, whose samples take tens of network calls.
        objective: The training objective on record; "" if there is none.
        iteration: Training iterations done; None if not on record.
        num_iterations: Training iterations planned; None if not on record.
        quality_measured: Whether the bundle holds scores of ``scm-export evaluate --keep``.
    """

    kind: Kind
    objective: str = ""
    iteration: int | None = None
    num_iterations: int | None = None
    quality_measured: bool = False

    @classmethod
    def of(cls, provenance: Mapping[str, Any], *, quality_measured: bool = False) -> ModelStatus:
        """Read the status from a model's provenance; entries that are malformed count as absent."""
        objective = str(provenance.get("objective") or "")
        kind: Kind = "consistency model" if objective else "unknown"
        return cls(
            kind="diffusion model" if objective.partition("+")[0].strip() == "diffusion" else kind,
            objective=objective,
            iteration=_count(provenance.get("iteration")),
            num_iterations=_count(provenance.get("num_iterations")),
            quality_measured=quality_measured,
        )

    @property
    def finished(self) -> bool | None:
        """Whether training reached its last iteration; None if not on record."""
        if self.iteration is None or self.num_iterations is None:
            return None
        return self.iteration >= self.num_iterations

    @property
    def training(self) -> str:
        """The length of training, in a few words."""
        if self.iteration is None:
            return "length not on record"
        if self.num_iterations is None:
            return f"{self.iteration} iterations"
        return f"{self.iteration} of {self.num_iterations} iterations"

    @property
    def quality(self) -> str:
        """Whether quality was measured, in a few words."""
        return "measured" if self.quality_measured else "not measured"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What forbids to take the model for a finished product, one sentence each; () if nothing does."""
        return (*self.training_warnings, *(() if self.quality_measured else (QUALITY_WARNING,)))

    @property
    def training_warnings(self) -> tuple[str, ...]:
        """Those of ``warnings`` that training decides."""
        found = []
        if self.kind == "diffusion model":
            found.append(
                "this is a diffusion model (a teacher), not a consistency model: 1 or 2 network calls are too few for "
                "it. Distill it first: scm-export distill --teacher RUN"
            )
        if self.finished is False:
            found.append(f"training is unfinished: {self.training}. Run the training command again to continue.")
        return tuple(found)

    def describe(self, calls: str) -> str:
        """Return one sentence for a model card.

        Args:
            calls: The numbers of network calls of its samplers, for example ``"1 or 2"``.
        """
        name = _NAMES[self.kind]
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
