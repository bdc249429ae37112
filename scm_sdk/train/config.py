"""``TrainConfig``: the settings that determine the result of a run; frozen and JSON-serializable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from .._util.arguments import did_you_mean
from .._util.json_struct import from_json
from ..errors import ConfigError
from ..model.consistency import NetworkConfig
from ..spec import DEFAULT_MID_TIME
from .averages.schedules import inverse_sqrt_decay, linear_decay, power_decay, power_exponent

ObjectiveName = Literal["diffusion", "sct", "scd", "cd", "trajectory", "vsd"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What an objective needs and allows; its loss is in ``objectives.select``.

    Attributes:
        description: What it trains, for help texts.
        teacher: Whether it distills a teacher.
        generative: Whether it trains a diffusion model, not a consistency model.
        data_velocity: Whether it regresses onto the velocity of the data, for which ``stable_targets`` have a mean.
        tangent: Whether its target holds dF/dt, which ``TangentConfig`` is about.
        anchor: Whether ``AnchorConfig`` may add a diffusion loss.
        one_process: Whether several processes would each repeat work that is done for the whole batch.
    """

    description: str
    teacher: Literal["required", "optional", "none"] = "none"
    generative: bool = False
    data_velocity: bool = False
    tangent: bool = False
    anchor: bool = False
    one_process: bool = False


OBJECTIVES: Mapping[str, Objective] = {
    "diffusion": Objective(
        description="a TrigFlow diffusion model, the teacher (Eq. 4)", generative=True, data_velocity=True
    ),
    "sct": Objective(description="consistency training from data (Algorithm 1)", data_velocity=True, tangent=True),
    "scd": Objective(
        description="consistency distillation of a teacher (Algorithm 1)", teacher="required", tangent=True
    ),
    "cd": Objective(description="consistency distillation in discrete time", teacher="required", anchor=True),
    "trajectory": Objective(
        description="distillation onto the ends of a teacher's trajectories", teacher="required", one_process=True
    ),
    "vsd": Objective(description="variational score distillation alone", teacher="optional"),
}
"""Every objective by its name in configs."""


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group of settings."""


class DataConfig(Section, frozen=True, kw_only=True):
    """The images of a run.

    Attributes:
        source: ``avatars`` (shipped), ``fashion-mnist`` or its held-out ``fashion-mnist-t10k``, a folder of images, an
            ``.npz`` or ``.npy`` file, or a folder of tar or npz shards (``shards``), which are read in place.
        label: Column of labels to condition on, or "" for none. For a folder: ``folder`` names the
            classes after its sub-folders, in which all pictures then are.
        rows: First and last-plus-one row that are trained on; the others are held out. (0, 0): all.
    """

    source: str = "avatars"
    label: str = ""
    rows: tuple[int, int] = (0, 0)


class NoiseConfig(Section, frozen=True, kw_only=True):
    """Distribution of noise levels: ln(sigma) is normal, where sigma = sigma_data tan(t) at time t.

    Attributes:
        p_mean: Mean of ln(sigma).
        p_std: Standard deviation of ln(sigma).
    """

    p_mean: float = -0.8
    p_std: float = 1.4


class OptimizerConfig(Section, frozen=True, kw_only=True):
    """Optimizer and learning-rate schedule.

    Attributes:
        name: ``adam`` or ``radam``.
        learning_rate: Peak learning rate.
        betas: Moment decay rates.
        epsilon: Term that is added to the denominator of the update.
        warmup_iterations: Iterations of linear learning-rate warm-up.
        schedule: What follows: ``linear`` is a plateau and a linear decay; ``inverse_sqrt`` is EDM2's.
        decay_fraction: Last share of the run in which the learning rate decays linearly to 1 %; 0 for none.
        decay_reference: Iterations after which EDM2's learning rate decays, t_ref.
        grad_clip: Largest gradient norm; larger gradients are scaled down. 0 for none.
    """

    name: Literal["adam", "radam"] = "adam"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    epsilon: float = 1e-8
    warmup_iterations: int = 200
    schedule: Literal["linear", "inverse_sqrt"] = "linear"
    decay_fraction: float = 0.3
    decay_reference: int = 35_000
    grad_clip: float = 10.0


class AveragesConfig(Section, frozen=True, kw_only=True):
    """Exponential moving averages of the weights.

    Attributes:
        halflife: Half-life of the average that is sampled with, samples; shorter early in the run.
        ramp: Largest half-life as a share of the samples seen so far.
        sigma_rel: Width of a power-function average to sample with instead; 0 for the half-life's.
        profiles: Widths of power-function averages whose snapshots are stored, to make others from (``posthoc``).
        snapshot_every: Iterations between snapshots.
    """

    halflife: int = 50_000
    ramp: float = 0.05
    sigma_rel: float = 0.0
    profiles: tuple[float, ...] = ()
    snapshot_every: int = 1_000


class TangentConfig(Section, frozen=True, kw_only=True):
    """The tangent dF/dt of ``sct`` and ``scd``.

    Attributes:
        mode: How dF/dt is computed (``tangent``): ``jvp2`` and ``jvp`` by forward differentiation apart from the pass
            that is trained or in it, ``fd`` by central differences.
        step: Step of the central differences, a share of cos(t) sin(t) dx/dt.
        discrete_points: Times of a grid between whose neighbors the tangent is a difference quotient, as in the
            paper's discrete-time ablation; 0 for continuous time.
        norm: Norm of the tangent over one sample; ``l2`` is the paper's, ``rms`` suits samples of few elements;
            ``clamp`` clips each element to [-1, 1] instead.
        c: Constant c of the tangent normalization ``g / (||g|| + c)``.
        warmup_iterations: Iterations H over which the JVP part of the tangent is faded in.
        normalize: False switches the normalization off, for ablations.
    """

    mode: Literal["jvp", "jvp2", "fd"] = "jvp2"
    step: float = 3e-3
    discrete_points: int = 0
    norm: Literal["l2", "rms", "clamp"] = "l2"
    c: float = 0.1
    warmup_iterations: int = 10_000
    normalize: bool = True


class AnchorConfig(Section, frozen=True, kw_only=True):
    """A diffusion loss at small times that is added to the loss of ``cd``.

    Attributes:
        weight: Factor of the loss; 0 for none.
        noise: Noise levels of the loss.
    """

    weight: float = 0.0
    noise: NoiseConfig = NoiseConfig(p_mean=-1.5, p_std=1.0)


class TrajectoryConfig(Section, frozen=True, kw_only=True):
    """The objective ``trajectory``.

    Attributes:
        steps: Steps of the teacher along one trajectory.
        huber: Error, data units, above which the loss grows linearly; 0 for the squared error.
    """

    steps: int = 12
    huber: float = 0.0


class VsdConfig(Section, frozen=True, kw_only=True):
    """Variational score distillation, alone or added to the loss of another objective.

    Attributes:
        weight: Factor of the VSD loss when it is added; 0 for none. The paper's is 1.
        weighting: ``learned`` is the paper's, whose pull does not fade near the teacher; ``error`` divides by the
            teacher's error on each sample (``objectives.vsd``).
        steps: Sampler steps whose samples VSD compares, in turn; the paper's is 1.
        noise: Noise levels of the comparison; the paper's are (0.4, 2).
        learning_rate: Peak learning rate of the fake score; 0 for the student's own, as in the paper. A fake score
            that lags behind lets the student drop modes.
        warmup_iterations: Iterations in which only the fake score and the weighting are trained: where the fake score
            starts from the teacher, the first differences carry no information on the student.
    """

    weight: float = 0.0
    weighting: Literal["learned", "error"] = "learned"
    steps: int = 1
    noise: NoiseConfig = NoiseConfig(p_mean=0.4, p_std=2.0)
    learning_rate: float = 0.0
    warmup_iterations: int = 0


class TrainConfig(Section, frozen=True, kw_only=True):
    """One training run.

    Attributes:
        objective: ``diffusion`` trains a TrigFlow teacher (Eq. 4); ``scd`` distills a teacher and
            ``sct`` trains from data alone (Algorithm 1); ``cd`` distills a teacher in discrete time
            (``objectives.discrete``) and ``trajectory`` onto the ends of its trajectories (``objectives.trajectory``);
            ``vsd`` is variational score distillation alone.
        data: The images.
        network: The network; None takes the teacher's.
        init_from: Checkpoint folder whose weights start the run, "" for random weights; where a teacher is distilled,
            "" for the teacher's.
        teacher: Checkpoint folder of the diffusion model that is distilled. ``vsd`` takes the exact score of the data
            instead with ``stable_targets``.
        sigma_data: Standard deviation of the data, data units.
        mid_time: Second time of the two-step sampler that the model will have, radians.
        batch_size: Samples of one iteration.
        num_iterations: Length of the run.
        optimizer: Optimizer and learning-rate schedule.
        averages: Moving averages of the weights.
        noise: Noise levels that are trained on.
        stable_targets: Regress onto the mean of all images that a noisy sample may come from rather
            than the one that does (``objectives.stable_target``); for data sets that fit in memory. In ``cd``: of the
            anchor.
        tangent: How ``sct`` and ``scd`` compute the tangent.
        discrete_step: Longest step of the teacher in ``cd``, radians.
        anchor: The diffusion loss that ``cd`` may add.
        trajectory: The objective ``trajectory``.
        vsd: Variational score distillation.
        label_dropout: Share of samples trained without their label; guidance needs a teacher that had some.
        guidance: Scales of classifier-free guidance of the teacher, drawn evenly between the two for each sample and
            an input of the network; two equal ones are baked into a network that has no such input. 1 is no guidance.
        dropout: Dropout of the network, replaces the network's own.
        adaptive_weighting: False switches the learned weighting off, for ablations.
        precision: Of the networks' trunks: ``fp32``, or ``bf16`` or ``fp16`` in mixed precision. Weights, time and
            loss stay float32.
        seed: Random seed: batches, times, noise and initial weights follow from it.
        max_bad_steps: Consecutive non-finite steps that are skipped before the run stops.
        compile: Use ``torch.compile`` for the loss.
    """

    objective: ObjectiveName
    data: DataConfig = DataConfig()
    network: NetworkConfig | None = None
    init_from: str = ""
    teacher: str = ""
    sigma_data: float = 0.5
    mid_time: float = DEFAULT_MID_TIME
    batch_size: int = 64
    num_iterations: int = 10_000
    optimizer: OptimizerConfig = OptimizerConfig()
    averages: AveragesConfig = AveragesConfig()
    noise: NoiseConfig = NoiseConfig()
    stable_targets: bool = False
    tangent: TangentConfig = TangentConfig()
    discrete_step: float = 0.4
    anchor: AnchorConfig = AnchorConfig()
    trajectory: TrajectoryConfig = TrajectoryConfig()
    vsd: VsdConfig = VsdConfig()
    label_dropout: float = 0.0
    guidance: tuple[float, float] = (1.0, 1.0)
    dropout: float = 0.0
    adaptive_weighting: bool = True
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = 0
    max_bad_steps: int = 10
    compile: bool = False

    def __post_init__(self) -> None:
        self._check_ranges()
        kind = self.kind
        if kind.teacher != "optional" and (kind.teacher == "required") != bool(self.teacher):
            distilling = [name for name, one in OBJECTIVES.items() if one.teacher == "required"]
            raise ConfigError(
                f"objective is {self.objective!r} and teacher {self.teacher!r}: {', '.join(distilling)} distill a "
                "teacher, a checkpoint folder; 'diffusion' and 'sct' have none."
            )
        if self.anchor.weight and not kind.anchor:
            raise ConfigError(
                f"anchor.weight is {self.anchor.weight} with objective {self.objective!r}, expected 0: "
                "it goes with 'cd'."
            )
        if kind.generative and self.vsd.weight:
            raise ConfigError(f"vsd.weight is {self.vsd.weight} for a diffusion model, expected 0: VSD distills one.")
        if self.uses_vsd and bool(self.teacher) == self.stable_targets:
            raise ConfigError(
                "VSD follows one score: expected a teacher, or stable_targets for the data's exact one, not both and "
                "not neither."
            )
        if self.stable_targets and not (kind.data_velocity or kind.anchor or self.uses_vsd):
            raise ConfigError(
                f"stable_targets replace the data's velocity; {self.objective!r} follows its teacher's. Leave them out."
            )
        points = self.tangent.discrete_points
        if points == 1 or (points and not kind.tangent):
            raise ConfigError(
                f"tangent.discrete_points is {points} with objective {self.objective!r}, expected 0, or 2 or "
                "more with 'scd' or 'sct', whose tangent it replaces."
            )
        if not 0 < self.guidance[0] <= self.guidance[1]:
            raise ConfigError(f"guidance is {self.guidance}, expected two rising scales above 0, for example (1, 2).")
        if self.guided and not self.teacher:
            raise ConfigError(
                f"guidance is {self.guidance} without a teacher, expected (1, 1): it is the teacher that is guided."
            )
        averages = self.averages
        for sigma_rel in (*averages.profiles, *([averages.sigma_rel] if averages.sigma_rel else [])):
            power_exponent(sigma_rel)
        if len(set(averages.profiles)) < len(averages.profiles):
            raise ConfigError(f"averages.profiles are {averages.profiles}, expected each width once.")
        if self.network is None and not self.first_weights:
            raise ConfigError("a run needs a network or init_from, a checkpoint folder; both are absent.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}, expected 0 <= seed < 2**32.")

    def _check_ranges(self) -> None:
        for name in _AT_LEAST_ONE:
            if (value := _get(self, name)) < 1:
                raise ConfigError(f"{name} is {value}, expected 1 or more.")
        for name in _POSITIVE:
            if not (value := _get(self, name)) > 0:
                raise ConfigError(f"{name} is {value}, expected more than 0.")
        for name in _SHARES:
            if not 0 <= (value := _get(self, name)) <= 1:
                raise ConfigError(f"{name} is {value}, expected a share in [0, 1].")
        for name in _NOT_NEGATIVE:
            if not (value := _get(self, name)) >= 0:
                raise ConfigError(f"{name} is {value}, expected 0 or more.")

    @property
    def kind(self) -> Objective:
        """What the objective needs and allows."""
        return OBJECTIVES[self.objective]

    @property
    def uses_vsd(self) -> bool:
        """Whether there is a fake score."""
        return self.objective == "vsd" or self.vsd.weight > 0

    @property
    def guided(self) -> bool:
        """Whether the teacher is guided."""
        return self.guidance != (1.0, 1.0)

    @property
    def takes_guidance(self) -> bool:
        """Whether the guidance scale is an input of the student."""
        return self.guidance[0] < self.guidance[1]

    @property
    def first_weights(self) -> str:
        """Checkpoint folder whose weights start the run, "" for random weights."""
        return self.init_from or self.teacher

    def learning_rate_at(self, iteration: int) -> float:
        """Return the learning rate of an iteration: warm-up, then what ``optimizer.schedule`` says."""
        its = self.optimizer
        warmup = its.warmup_iterations
        if its.schedule == "inverse_sqrt":
            return its.learning_rate * inverse_sqrt_decay(iteration, warmup=warmup, reference=its.decay_reference)
        total, decay = self.num_iterations, its.decay_fraction * self.num_iterations
        return its.learning_rate * linear_decay(iteration, warmup=warmup, decay=decay, total=total)

    def ema_decay_at(self, iteration: int) -> float:
        """Return the weight average's decay of an iteration."""
        if self.averages.sigma_rel:
            return power_decay(self.averages.sigma_rel, iteration)
        seen = (iteration + 1) * self.batch_size
        halflife = min(float(self.averages.halflife), self.averages.ramp * seen)
        return float(0.5 ** (self.batch_size / max(halflife, 1e-8)))

    @classmethod
    def from_settings(cls, settings: Mapping[str, object]) -> TrainConfig:
        """Make a config from settings by their names on the command line and in old records: see ``SETTINGS``.

        Args:
            settings: Values by name, for example ``{"objective": "diffusion", "learning_rate": 1e-3}``; a field of
                ``TrainConfig`` itself may be given by its own name.

        Raises:
            ConfigError: If there is no such setting, its type is wrong, or a value breaks the contract.
        """
        return _from_plain(_nested(_checked_names(settings), {}))

    def with_settings(self, settings: Mapping[str, object]) -> TrainConfig:
        """Return this config with other values for some settings, named as in ``from_settings``.

        Raises:
            ConfigError: If there is no such setting, its type is wrong, or a value breaks the contract.
        """
        return _from_plain(_nested(_checked_names(settings), msgspec.to_builtins(self)))

    def to_json(self) -> str:
        """Return indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> TrainConfig:
        """Parse what ``to_json`` wrote, also before settings had sections.

        Raises:
            ConfigError: If it cannot be read or a value breaks the contract.
        """
        plain = from_json(text, dict[str, Any], _unreadable)
        return _from_plain(_nested(plain, {}))


SETTINGS: Mapping[str, tuple[str, ...]] = {
    **{
        name: ("optimizer", name)
        for name in (
            "learning_rate", "betas", "epsilon", "warmup_iterations", "schedule", "decay_fraction", "decay_reference",
            "grad_clip",
        )
    },
    **{f"ema_{name}": ("averages", name) for name in AveragesConfig.__struct_fields__},
    **{name: ("noise", name) for name in NoiseConfig.__struct_fields__},
    **{f"tangent_{name}": ("tangent", name) for name in ("mode", "step", "norm", "c")},
    "tangent_warmup": ("tangent", "warmup_iterations"),
    "discrete_points": ("tangent", "discrete_points"),
    "normalize_tangent": ("tangent", "normalize"),
    "anchor_weight": ("anchor", "weight"),
    "anchor_p_mean": ("anchor", "noise", "p_mean"),
    "anchor_p_std": ("anchor", "noise", "p_std"),
    "trajectory_steps": ("trajectory", "steps"),
    "huber": ("trajectory", "huber"),
    **{f"vsd_{name}": ("vsd", name) for name in ("weight", "weighting", "steps", "learning_rate")},
    "vsd_warmup": ("vsd", "warmup_iterations"),
    "vsd_p_mean": ("vsd", "noise", "p_mean"),
    "vsd_p_std": ("vsd", "noise", "p_std"),
}  # fmt: skip
"""Path of each setting in ``TrainConfig`` by its flat name, of the command line and of records before sections."""
_AT_LEAST_ONE = (
    "batch_size", "num_iterations", "max_bad_steps", "averages.halflife", "averages.snapshot_every", "vsd.steps",
    "trajectory.steps", "optimizer.decay_reference",
)  # fmt: skip
_POSITIVE = (
    "optimizer.learning_rate", "optimizer.epsilon", "sigma_data", "noise.p_std", "tangent.c", "tangent.step",
    "averages.ramp", "vsd.noise.p_std", "anchor.noise.p_std", "discrete_step",
)  # fmt: skip
_SHARES = ("label_dropout", "dropout", "optimizer.decay_fraction")
_NOT_NEGATIVE = (
    "optimizer.warmup_iterations", "optimizer.grad_clip", "tangent.warmup_iterations", "tangent.discrete_points",
    "vsd.warmup_iterations", "vsd.weight", "vsd.learning_rate", "anchor.weight", "trajectory.huber",
    "averages.sigma_rel",
)  # fmt: skip


def _get(config: TrainConfig, path: str) -> float:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    number: float = value
    return number


def _checked_names(settings: Mapping[str, object]) -> Mapping[str, object]:
    known = (*SETTINGS, *TrainConfig.__struct_fields__)
    for name in settings:
        if name not in known:
            raise ConfigError(f"there is no training setting {name!r}. {did_you_mean(name, known)}")
    return settings


def _nested(settings: Mapping[str, object], into: dict[str, Any]) -> dict[str, Any]:
    """Put settings at their places in a nested config of built-in types; names that are not flat stay as they are."""
    for name, value in settings.items():
        path = SETTINGS.get(name, (name,))
        if name == "optimizer" and isinstance(value, str):  # its name, as command line and old records have it
            path = ("optimizer", "name")
        at = into
        for section in path[:-1]:
            at = at.setdefault(section, {})
            if not isinstance(at, dict):
                raise ConfigError(f"training config has {section} = {at!r}, expected an object with {path[-1]}.")
        at[path[-1]] = msgspec.to_builtins(value)
    return into


def _from_plain(plain: dict[str, Any]) -> TrainConfig:
    try:
        return msgspec.convert(plain, TrainConfig)
    except msgspec.MsgspecError as exc:
        raise _unreadable(exc) from exc


def _unreadable(exc: Exception) -> ConfigError:
    return ConfigError(f"training config cannot be read: {exc}.")
