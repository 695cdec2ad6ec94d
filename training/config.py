"""Everything that defines a training run: frozen dataclasses, saved with the run as ``train.json``. Torch-free.

A run is a recipe (:mod:`training.recipes`) with a few values replaced (:func:`override`).
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from medsora.config import ModelConfig
from medsora.geometry import CHUNK_FRAMES, SPATIAL_STRIDE, is_valid_video_shape
from medsora.jsonconfig import from_json, to_json

__all__ = [
    "AlignmentConfig",
    "AutoencoderLossConfig",
    "DataConfig",
    "DenoiserLossConfig",
    "DistillationConfig",
    "LoopConfig",
    "OptimizerConfig",
    "TrainConfig",
    "config_hash",
    "differences",
    "override",
]

PARTS = ("autoencoder", "denoiser")
SCHEDULES = ("constant", "cosine")
CLOCKS = ("steps", "seconds")
PRECISIONS = ("fp32", "bf16")
ALIGNMENTS = ("none", "raft", "paper")
BESTS = ("least", "most")
STRATEGIES = ("auto", "ddp", "fsdp")

RESUMABLE = frozenset(
    f"loop.{name}"
    for name in (
        "steps", "total_seconds", "log_every", "checkpoint_every", "evaluate_every", "keep_checkpoints", "compile",
        "distributed", "best_metric", "best",
    )
)  # fmt: skip
"""Fields that may change between the legs of one run: they do not change what a step computes, except that
``steps`` and ``total_seconds`` stretch a learning-rate schedule that depends on them."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which clips are used, and how windows are cut from them."""

    dataset: str
    excluded_labels: tuple[str, ...] = ()
    """Labels that are no class."""
    condition_columns: dict[str, str]
    """Column of the clip table that holds each condition, by the condition's name."""
    num_frames: int = 16
    height: int = 128
    width: int = 128
    target_fps: float = 8.0
    """Each clip is taken at the whole stride that comes nearest to this rate."""
    window_step: int = 1
    """Distance in frames between the starts of training windows."""
    test_window_step: int = 8
    """The same for the test split: windows of one clip overlap, so all of them would add time, no evidence."""
    has_flips: bool = True
    """Mirror half of the windows left to right."""
    sampling_exponent: float = 0.5
    """A condition with n windows is drawn in proportion to n to this power; 1 is as they come, 0 all alike."""
    modality: str = ""
    """DICOM's word for what the clips are, e.g. ES; for the checkpoint's manifest."""

    def step_of(self, split: str) -> int:
        """Distance in frames between the starts of a split's windows."""
        return self.window_step if split == "train" else self.test_window_step

    def __post_init__(self) -> None:
        counts = (self.num_frames, self.height, self.width, self.window_step, self.test_window_step)
        _require(all(count >= 1 for count in counts), f"data counts must be at least 1, got {counts}")
        _require(self.target_fps > 0, f"data.target_fps must be above 0, got {self.target_fps}")
        _require(
            0 <= self.sampling_exponent <= 1,
            f"data.sampling_exponent must be 0 to 1, got {self.sampling_exponent}",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning rate over the run."""

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    """Of matrices and kernels; biases, gains and Mamba's ``A_log``, ``D`` and ``dt_bias`` are left alone."""
    gradient_clip: float = 1.0
    """Largest norm of all gradients together."""
    warmup_steps: int = 200
    schedule: str = "cosine"
    """``constant``, or ``cosine``: falls to ``final_fraction`` of the rate at the end of the run."""
    final_fraction: float = 0.01

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, f"optimizer.learning_rate must be above 0, got {self.learning_rate}")
        _require(self.gradient_clip > 0, f"optimizer.gradient_clip must be above 0, got {self.gradient_clip}")
        _require(self.schedule in SCHEDULES, f"optimizer.schedule must be one of {SCHEDULES}, got {self.schedule!r}")
        _require(0 <= self.final_fraction <= 1, f"optimizer.final_fraction must be 0 to 1, got {self.final_fraction}")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length, speed and bookkeeping of the run."""

    steps: int
    """The run ends after so many optimizer steps."""
    total_seconds: float | None = None
    """The run also ends after so many seconds of training, all its legs together; loading is none, evaluation is."""
    clock: str = "steps"
    """What the learning rate follows: ``steps``, or ``seconds`` (of ``total_seconds``; then a resumed run is
    not bit-exact, since no two machines take the same time)."""
    batch_size: int = 16
    """Clips a step."""
    seed: int = 0
    ema_half_lives: tuple[float, ...] = (700.0,)
    """Averages of the weights that are kept, by their half-life in steps. The first is the one that is shown,
    compared and, unless another is chosen at export, shipped."""
    precision: str = "bf16"
    """``bf16`` autocast, or ``fp32``."""
    compile: bool = False
    """torch.compile the network: minutes to start, then about twice as fast on a GPU."""
    log_every: int = 50
    checkpoint_every: int = 1000
    evaluate_every: int = 1000
    keep_checkpoints: int = 2
    """Newest checkpoints that stay; the best one stays besides."""
    best_metric: str | None = None
    """Figure of the evaluation by which the best checkpoint is kept, e.g. ``test_velocity_mse``; None keeps none."""
    best: str = "least"
    """Whether the ``least`` or the ``most`` of it is best."""
    distributed: str = "auto"
    """``ddp``, ``fsdp``, or ``auto``: ddp where torchrun started several processes."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "evaluate_every"):
            _require(getattr(self, name) >= 1, f"loop.{name} must be at least 1, got {getattr(self, name)}")
        _require(
            self.keep_checkpoints >= 2,
            f"loop.keep_checkpoints must be at least 2, so that a damaged one can be skipped; "
            f"got {self.keep_checkpoints}",
        )
        _require(self.clock in CLOCKS, f"loop.clock must be one of {CLOCKS}, got {self.clock!r}")
        _require(
            self.clock == "steps" or self.total_seconds is not None,
            "loop.clock=seconds needs loop.total_seconds",
        )
        _require(
            self.total_seconds is None or self.total_seconds > 0,
            f"loop.total_seconds must be above 0, got {self.total_seconds}",
        )
        _require(
            len(self.ema_half_lives) > 0
            and all(half_life > 0 for half_life in self.ema_half_lives)
            and len({f"{half_life:g}" for half_life in self.ema_half_lives}) == len(self.ema_half_lives),
            f"loop.ema_half_lives must be different numbers of steps above 0, at least one; got {self.ema_half_lives}",
        )
        _require(self.best in BESTS, f"loop.best must be one of {BESTS}, got {self.best!r}")
        _require(
            self.distributed in STRATEGIES, f"loop.distributed must be one of {STRATEGIES}, got {self.distributed!r}"
        )
        _require(self.precision in PRECISIONS, f"loop.precision must be one of {PRECISIONS}, got {self.precision!r}")


@dataclass(frozen=True, kw_only=True)
class AutoencoderLossConfig:
    """Weights of the autoencoder's loss terms; videos are in [-1, 1]."""

    l1: float = 1.0
    mse: float = 2.0
    """Squared error: what PSNR counts, L1 alone is content with blurred speckle."""
    focal_frequency: float = 1.0
    perceptual: float = 0.02
    """LPIPS, or distance in SqueezeNet features; needs ``--lpips`` or ``--squeezenet`` unless 0."""
    perceptual_frames: int = 4
    """Frames of each clip, drawn at random, that the perceptual term looks at."""
    kl: float = 1e-3
    """Mean over latent elements of the divergence from a standard normal."""
    adversarial: float = 0.0
    """What a discriminator, trained beside the autoencoder, says of reconstructions; 0 trains none."""
    adversarial_start_step: int = 0
    """The discriminator starts at this step: late, when what is left to repair is what the other terms cannot see."""
    adversarial_ramp_steps: int = 500
    """The weight rises over so many steps from there, since the discriminator has to learn first."""
    discriminator_channels: int = 32
    """Width of its first layer."""
    discriminator_frames: int = 4
    """Consecutive frames of each clip, from a random one on, that it sees together."""

    def __post_init__(self) -> None:
        weights = (self.l1, self.mse, self.focal_frequency, self.perceptual, self.kl, self.adversarial)
        _require(all(weight >= 0 for weight in weights), f"autoencoder_loss weights are below 0: {weights}")
        counts = (self.perceptual_frames, self.discriminator_channels, self.discriminator_frames)
        _require(
            all(count >= 1 for count in counts),
            "autoencoder_loss.perceptual_frames, discriminator_channels and discriminator_frames must be at least 1, "
            f"got {counts}",
        )
        steps = (self.adversarial_start_step, self.adversarial_ramp_steps)
        _require(
            all(step >= 0 for step in steps),
            f"autoencoder_loss.adversarial_start_step and adversarial_ramp_steps must be at least 0, got {steps}",
        )


@dataclass(frozen=True, kw_only=True)
class DenoiserLossConfig:
    """How diffusion time, clean prefix and condition are drawn."""

    time_mean: float = 0.0
    """Mean of logit(t); above 0 draws noisier times more often. For velocities; steps of noise are uniform."""
    time_std: float = 1.0
    """Standard deviation of logit(t)."""
    clean_prefixes: float = 0.0
    """Share of clips of which the first latent frames are given clean, so that the network learns to go on from them.
    For velocities alone."""
    label_dropout: float = 0.1
    """Share of clips trained without condition, for guidance."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.clean_prefixes < 1,
            f"denoiser_loss.clean_prefixes must be in [0, 1), got {self.clean_prefixes}",
        )
        _require(self.time_std > 0, f"denoiser_loss.time_std must be above 0, got {self.time_std}")
        _require(
            0 <= self.label_dropout < 1,
            f"denoiser_loss.label_dropout must be in [0, 1), got {self.label_dropout}",
        )


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """What the denoiser's tokens after spatial Mamba are drawn towards while it trains."""

    kind: str = "none"
    """``raft``: motion features of RAFT, through a convolutional projector. ``paper``: image features of flow drawn
    as colour, in every block, without a projector. ``none``."""
    weight: float = 0.5
    """The paper's is 0.1."""
    stop_step: int | None = None
    """From this step on the weight is 0; None is never."""
    block: int = 2
    """The block, counted from 0, that ``raft`` aligns; those after it are free."""
    projector_channels: int = 256
    """Width of ``raft``'s projector."""
    margin: float = 0.01
    """Of ``paper``: what may be left of the loss of a clip, weighted by its time."""

    def __post_init__(self) -> None:
        _require(self.kind in ALIGNMENTS, f"alignment.kind must be one of {ALIGNMENTS}, got {self.kind!r}")
        _require(
            self.weight > 0 or self.kind == "none",
            f"alignment.weight must be above 0, got {self.weight}: switch alignment off with alignment.kind=none",
        )
        _require(
            self.stop_step is None or self.stop_step >= 1,
            f"alignment.stop_step must be at least 1, got {self.stop_step}",
        )
        _require(self.block >= 0, f"alignment.block must be at least 0, got {self.block}")
        _require(
            self.projector_channels >= 1,
            f"alignment.projector_channels must be at least 1, got {self.projector_channels}",
        )
        _require(self.margin >= 0, f"alignment.margin must be at least 0, got {self.margin}")


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """How a denoiser that is trained already learns to take few long steps.

    The teacher samples clips in many short steps, with guidance; where it was on its way is kept at even times, and the
    network learns the mean velocity between any two of them that one of its own steps joins.
    """

    steps: tuple[int, ...] = (4, 1, 2, 8)
    """Numbers of steps that it learns to sample in; the first is the default, and trained as often as all others."""
    guidance_scale: float = 1.5
    """Of the teacher; it is built in from then on."""
    teacher_steps: int = 32
    """Euler steps of the teacher, a multiple of all of ``steps``."""
    trajectories: int = 16_384
    """Clips that the teacher samples. Of 16x4x16x16 latents each takes 0.3 MB, on the training device."""
    held_out: int = 256
    """Of those, the last ones are kept for the evaluation."""
    batch_size: int = 192
    """Clips a step that learn from the teacher, beside ``loop.batch_size`` that learn from data: so it can be sampled
    in many steps too."""
    weight: float = 1.0
    """Of their loss."""

    def __post_init__(self) -> None:
        _require(
            len(self.steps) > 0 and all(count >= 1 for count in self.steps) and len(set(self.steps)) == len(self.steps),
            f"distillation.steps must be different numbers from 1 on, got {self.steps}",
        )
        _require(
            all(self.teacher_steps % count == 0 for count in self.steps) and self.teacher_steps >= 1,
            f"distillation.teacher_steps must be a multiple of all of {self.steps}, got {self.teacher_steps}",
        )
        _require(
            all(max(self.steps) % count == 0 for count in self.steps),
            f"distillation.steps must all divide the most of them, got {self.steps}",
        )
        _require(self.guidance_scale >= 1, f"distillation.guidance_scale must be at least 1, got {self.guidance_scale}")
        _require(
            1 <= self.held_out < self.trajectories,
            f"distillation.held_out must be from 1 to below trajectories ({self.trajectories}), got {self.held_out}",
        )
        _require(self.batch_size >= 1, f"distillation.batch_size must be at least 1, got {self.batch_size}")
        _require(self.weight > 0, f"distillation.weight must be above 0, got {self.weight}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run: trains one part of a model."""

    recipe: str
    """Name of the recipe this came from."""
    part: str
    """``autoencoder`` or ``denoiser``."""
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    loop: LoopConfig
    autoencoder_loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    denoiser_loss: DenoiserLossConfig = field(default_factory=DenoiserLossConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    distillation: DistillationConfig | None = None
    """Of a denoiser that has step sizes."""

    def __post_init__(self) -> None:
        _require(self.part in PARTS, f"part must be one of {PARTS}, got {self.part!r}")
        _require(
            tuple(self.data.condition_columns) == tuple(self.model.condition_names),
            f"data.condition_columns name {tuple(self.data.condition_columns)}, "
            f"the model's conditions are {tuple(self.model.condition_names)}",
        )
        denoiser = self.model.denoiser
        shape = (self.data.num_frames, self.data.height, self.data.width)
        _require(
            is_valid_video_shape(*shape, patch_size=denoiser.patch_size),
            f"data.num_frames must be a multiple of {CHUNK_FRAMES}, data.height and data.width of "
            f"{SPATIAL_STRIDE * denoiser.patch_size} for patches of {denoiser.patch_size}; got {shape}",
        )
        _require(
            denoiser.prediction == "velocity" or self.denoiser_loss.clean_prefixes == 0,
            "denoiser_loss.clean_prefixes is for model.denoiser.prediction=velocity: where noise is predicted no time "
            f"is without any; got {self.denoiser_loss.clean_prefixes}",
        )
        _require(
            self.part != "denoiser" or (self.distillation is not None) == denoiser.has_step_sizes,
            "distillation is what model.denoiser.has_step_sizes is trained with; "
            f"got {self.distillation} and {denoiser.has_step_sizes}",
        )
        _require(
            self.alignment.kind != "raft" or self.alignment.block < denoiser.depth,
            f"alignment.block must be below the denoiser's depth, {denoiser.depth}, got {self.alignment.block}",
        )


def override(config: TrainConfig, assignments: Sequence[str]) -> TrainConfig:
    """Replace values by their dotted names.

    Args:
        assignments: ``"loop.batch_size=32"``; the value is JSON, or plain text where it is no JSON.

    Raises:
        ValueError: No ``=``, an unknown name, or a value that the field does not take.
    """
    tree = to_json(config)
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"{assignment!r} must look like loop.batch_size=32")
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            known = ", ".join(sorted(node)) if isinstance(node, dict) else ", ".join(sorted(tree))
            raise ValueError(f"{name!r} is no field of the recipe; here there are: {known}")
        try:
            node[last] = json.loads(text)
        except json.JSONDecodeError:
            node[last] = text
    return from_json(TrainConfig, tree, where="recipe")


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Fields that differ and may not differ between two legs of one run, as ``name: old -> new``."""

    def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix: tree}
        found: dict[str, Any] = {}
        for key, value in tree.items():
            found |= leaves(value, f"{prefix}.{key}" if prefix else key)
        return found

    before, after = leaves(to_json(old)), leaves(to_json(new))
    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and name not in RESUMABLE
    ]


def config_hash(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a dataclass's canonical JSON."""
    tree = to_json(value) if dataclasses.is_dataclass(value) else value
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]
