"""``TrainConfig``: everything that determines the result of a run, as one frozen, JSON-serializable value."""

from __future__ import annotations

from typing import Literal

import msgspec

from ..errors import ConfigError
from ..model.consistency import NetworkConfig
from ..spec import DEFAULT_MID_TIME
from .averages.schedules import inverse_sqrt_decay, linear_decay, power_decay, power_exponent

Objective = Literal["diffusion", "sct", "scd", "cd", "trajectory", "vsd"]
DISTILLING = ("scd", "cd", "trajectory")


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which images are trained on.

    Attributes:
        source: ``avatars`` (shipped), ``fashion-mnist`` or its held-out ``fashion-mnist-t10k``, a folder of images, an
            ``.npz`` or ``.npy`` file, or a folder of tar or npz shards (``shards``), which are read where they lie.
        label: Column of labels to condition on, or "" for none. For a folder: ``folder`` names the
            classes after its sub-folders, in which all pictures then lie.
        rows: First and last-plus-one row that are trained on; the others are held out. (0, 0): all.
    """

    source: str = "avatars"
    label: str = ""
    rows: tuple[int, int] = (0, 0)


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training run.

    Attributes:
        objective: ``diffusion`` trains a TrigFlow teacher (Eq. 4); ``scd`` distills a teacher and
            ``sct`` trains from data alone (Algorithm 1); ``cd`` distills a teacher in discrete time
            (``discrete``) and ``trajectory`` onto the ends of its trajectories (``trajectory``); ``vsd`` is variational
            score distillation alone.
        data: The images.
        network: The network; None takes the teacher's.
        init_from: Checkpoint folder whose weights start the run, "" for random weights; where a teacher is distilled,
            "" for the teacher's.
        teacher: Checkpoint folder of the diffusion model that is distilled. ``vsd`` takes the exact score of the data
            instead with ``stable_targets``.
        sigma_data: Standard deviation of the data, data units.
        batch_size: Samples of one iteration.
        num_iterations: Length of the run.
        optimizer: ``adam`` or ``radam``.
        learning_rate: Peak learning rate.
        betas: Moment decay rates.
        epsilon: The optimizer's epsilon.
        warmup_iterations: Linear learning-rate warm-up.
        schedule: What follows: ``linear`` is a plateau and a linear fall; ``inverse_sqrt`` is EDM2's.
        decay_fraction: Last share of the run in which the learning rate falls linearly to 1 %; 0 for none.
        decay_reference: Iterations after which EDM2's learning rate falls, t_ref.
        grad_clip: Largest gradient norm; larger gradients are scaled down. 0 for none.
        ema_halflife: Half-life of the weight average, samples; shorter early in the run.
        ema_ramp: Largest half-life as a share of the samples seen so far.
        ema_sigma_rel: Width of a power-function average to sample with instead; 0 for the half-life's.
        ema_profiles: Widths of power-function averages that are stored now and then, to make others from (``posthoc``).
        ema_snapshot_every: Iterations between those.
        p_mean: Mean of ln(sigma), where sigma = sigma_data tan(t).
        p_std: Standard deviation of ln(sigma).
        stable_targets: Regress onto the mean of all images that may lie behind a noisy sample rather
            than the one that does (``stable_target``); for data sets that fit in memory. In ``cd``: the anchor's.
        discrete_step: Longest step of the teacher in ``cd``, radians.
        anchor_weight: Factor of the diffusion loss at small times beside ``cd``; 0 for none.
        anchor_p_mean: Mean of ln(sigma) of those times.
        anchor_p_std: Its standard deviation.
        trajectory_steps: Steps of the teacher along one trajectory in ``trajectory``.
        huber: Error, data units, above which the loss of ``trajectory`` grows linearly; 0 for the square.
        mid_time: Second time of the two-step sampler that the model will have, radians.
        vsd_weight: Factor of the VSD loss beside that of the objective; 0 for none. The paper's is 1.
        vsd_weighting: ``learned`` is the paper's, whose pull does not fade near the teacher; ``error`` divides by the
            teacher's error on each sample (``vsd``).
        vsd_steps: Sampler steps whose samples VSD looks at, in turn; the paper's is 1.
        vsd_p_mean: Mean of ln(sigma) of the comparison; the paper's is 0.4.
        vsd_p_std: Its standard deviation; the paper's is 2.
        vsd_learning_rate: Peak learning rate of the fake score; 0 for the student's own, as in the paper. A fake
            score that lags behind lets the student drop modes.
        vsd_warmup: Iterations in which only the fake score and the weighting learn: where it starts from the teacher,
            the first differences tell nothing of the student.
        label_dropout: Share of samples trained without their label; guidance needs a teacher that had some.
        guidance: Scales of classifier-free guidance of the teacher, drawn evenly between the two for each sample and
            told to the network; two equal ones are baked into a network that has no such input. 1 is no guidance.
        dropout: Dropout of the network, replaces the network's own.
        tangent_mode: How dF/dt is found (``tangent``): ``jvp2`` and ``jvp`` by forward differentiation apart from the
            pass that is trained or in it, ``fd`` by central differences.
        tangent_step: Step of the central differences, a share of cos(t) sin(t) dx/dt.
        discrete_points: Times of a grid between whose neighbors the tangent is a difference quotient, as in the
            paper's discrete-time ablation; 0 for continuous time.
        tangent_norm: Norm of the tangent over one sample; ``l2`` is the paper's, ``rms`` suits
            samples of few elements; ``clamp`` cuts each element to [-1, 1] instead.
        tangent_c: Constant c of the tangent normalization ``g / (||g|| + c)``.
        tangent_warmup: Iterations H over which the JVP part of the tangent is faded in.
        normalize_tangent: False switches the normalization off, for ablations.
        adaptive_weighting: False switches the learned weighting off, for ablations.
        precision: Of the networks' trunks: ``fp32``, or ``bf16`` or ``fp16`` in mixed precision. Weights, time and
            loss stay float32.
        seed: Names the run: batches, times, noise and initial weights follow from it.
        max_bad_steps: Consecutive non-finite steps that are skipped before the run stops.
        compile: Use ``torch.compile`` for the loss.
    """

    objective: Objective
    data: DataConfig = DataConfig()
    network: NetworkConfig | None = None
    init_from: str = ""
    teacher: str = ""
    sigma_data: float = 0.5
    batch_size: int = 64
    num_iterations: int = 10_000
    optimizer: Literal["adam", "radam"] = "adam"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    epsilon: float = 1e-8
    warmup_iterations: int = 200
    schedule: Literal["linear", "inverse_sqrt"] = "linear"
    decay_fraction: float = 0.3
    decay_reference: int = 35_000
    grad_clip: float = 10.0
    ema_halflife: int = 50_000
    ema_ramp: float = 0.05
    ema_sigma_rel: float = 0.0
    ema_profiles: tuple[float, ...] = ()
    ema_snapshot_every: int = 1_000
    p_mean: float = -0.8
    p_std: float = 1.4
    stable_targets: bool = False
    discrete_step: float = 0.4
    anchor_weight: float = 0.0
    anchor_p_mean: float = -1.5
    anchor_p_std: float = 1.0
    trajectory_steps: int = 12
    huber: float = 0.0
    mid_time: float = DEFAULT_MID_TIME
    vsd_weight: float = 0.0
    vsd_weighting: Literal["learned", "error"] = "learned"
    vsd_steps: int = 1
    vsd_p_mean: float = 0.4
    vsd_p_std: float = 2.0
    vsd_learning_rate: float = 0.0
    vsd_warmup: int = 0
    label_dropout: float = 0.0
    guidance: tuple[float, float] = (1.0, 1.0)
    dropout: float = 0.0
    tangent_mode: Literal["jvp", "jvp2", "fd"] = "jvp2"
    tangent_step: float = 3e-3
    discrete_points: int = 0
    tangent_norm: Literal["l2", "rms", "clamp"] = "l2"
    tangent_c: float = 0.1
    tangent_warmup: int = 10_000
    normalize_tangent: bool = True
    adaptive_weighting: bool = True
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = 0
    max_bad_steps: int = 10
    compile: bool = False

    def __post_init__(self) -> None:
        counts = ("batch_size", "num_iterations", "max_bad_steps", "ema_halflife", "vsd_steps", "trajectory_steps")
        for name in (*counts, "ema_snapshot_every", "decay_reference"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 1 or more.")
        positive = ("learning_rate", "sigma_data", "p_std", "epsilon", "tangent_c", "ema_ramp", "vsd_p_std")
        for name in (*positive, "discrete_step", "anchor_p_std", "tangent_step"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected more than 0.")
        for name in ("label_dropout", "dropout", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected a share in [0, 1].")
        not_negative = ("warmup_iterations", "tangent_warmup", "vsd_warmup", "vsd_weight", "vsd_learning_rate")
        for name in (*not_negative, "anchor_weight", "huber", "grad_clip", "discrete_points", "ema_sigma_rel"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 or more.")
        if self.objective != "vsd" and (self.objective in DISTILLING) != bool(self.teacher):
            raise ConfigError(
                f"objective is {self.objective!r} and teacher {self.teacher!r}: {', '.join(DISTILLING)} distill a "
                "teacher, a checkpoint folder; 'diffusion' and 'sct' have none."
            )
        if self.anchor_weight and self.objective != "cd":
            raise ConfigError(
                f"anchor_weight is {self.anchor_weight} with objective {self.objective!r}, expected 0: "
                "it goes with 'cd'."
            )
        if self.objective == "diffusion" and self.vsd_weight:
            raise ConfigError(f"vsd_weight is {self.vsd_weight} for a diffusion model, expected 0: VSD distills one.")
        if self.uses_vsd and bool(self.teacher) == self.stable_targets:
            raise ConfigError(
                "VSD follows one score: expected a teacher, or stable_targets for the data's exact one, not both and "
                "not neither."
            )
        if self.stable_targets and self.objective in ("scd", "trajectory"):
            raise ConfigError(
                f"stable_targets replace the data's velocity; {self.objective!r} follows its teacher's. Leave them out."
            )
        if self.discrete_points == 1 or (self.discrete_points and self.objective not in ("sct", "scd")):
            raise ConfigError(
                f"discrete_points is {self.discrete_points} with objective {self.objective!r}, expected 0, or 2 or "
                "more with 'scd' or 'sct', whose tangent it replaces."
            )
        if not 0 < self.guidance[0] <= self.guidance[1]:
            raise ConfigError(f"guidance is {self.guidance}, expected two rising scales above 0, for example (1, 2).")
        if self.guided and not self.teacher:
            raise ConfigError(
                f"guidance is {self.guidance} without a teacher, expected (1, 1): it is the teacher that is guided."
            )
        for sigma_rel in (*self.ema_profiles, *([self.ema_sigma_rel] if self.ema_sigma_rel else [])):
            power_exponent(sigma_rel)
        if len(set(self.ema_profiles)) < len(self.ema_profiles):
            raise ConfigError(f"ema_profiles are {self.ema_profiles}, expected each width once.")
        if self.network is None and not self.first_weights:
            raise ConfigError("a run needs a network or init_from, a checkpoint folder; both are absent.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}, expected 0 <= seed < 2**32.")

    @property
    def uses_vsd(self) -> bool:
        """Whether there is a fake score."""
        return self.objective == "vsd" or self.vsd_weight > 0

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
        """Return the learning rate of an iteration: warm-up, then what ``schedule`` says."""
        warmup = self.warmup_iterations
        if self.schedule == "inverse_sqrt":
            return self.learning_rate * inverse_sqrt_decay(iteration, warmup=warmup, reference=self.decay_reference)
        total, decay = self.num_iterations, self.decay_fraction * self.num_iterations
        return self.learning_rate * linear_decay(iteration, warmup=warmup, decay=decay, total=total)

    def ema_decay_at(self, iteration: int) -> float:
        """Return the weight average's decay of an iteration."""
        if self.ema_sigma_rel:
            return power_decay(self.ema_sigma_rel, iteration)
        seen = (iteration + 1) * self.batch_size
        halflife = min(float(self.ema_halflife), self.ema_ramp * seen)
        return float(0.5 ** (self.batch_size / max(halflife, 1e-8)))

    def to_json(self) -> str:
        """Return indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> TrainConfig:
        """Parse what ``to_json`` wrote.

        Raises:
            ConfigError: If it cannot be read or a value breaks the contract.
        """
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.MsgspecError as exc:
            raise ConfigError(f"training config cannot be read: {exc}.") from exc
