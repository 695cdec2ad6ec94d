"""Named training runs: functions that return a complete :class:`~training.config.TrainConfig`. Torch-free.

``*_small`` make the shipped lung-ultrasound checkpoint; ``*_base`` train the paper's network as it was trained;
``*_tiny`` run in seconds on a CPU, for tests. What differs in a single part is no recipe of its own, but ``--set``
(docs/training.md).
"""

from collections.abc import Callable
from dataclasses import replace

from medsora.config import ModelConfig
from medsora.presets import preset
from training.config import (
    AlignmentConfig,
    AutoencoderLossConfig,
    DataConfig,
    DenoiserLossConfig,
    DistillationConfig,
    LoopConfig,
    OptimizerConfig,
    TrainConfig,
)

__all__ = [
    "RECIPES",
    "autoencoder_base",
    "autoencoder_small",
    "autoencoder_tiny",
    "denoiser_base",
    "denoiser_small",
    "denoiser_small_ddpm",
    "denoiser_small_shortcut",
    "denoiser_tiny",
    "denoiser_tiny_shortcut",
    "recipe",
]

LUNG_CONDITIONS = {
    "finding": ("regular", "covid", "viral", "pneumonia"),
    "probe": ("convex", "linear"),
}
LUNG_DATA = DataConfig(
    dataset="lung_ultrasound",
    excluded_labels=("uncertain",),
    condition_columns={"finding": "label", "probe": "probe"},
)


def _model(name: str) -> ModelConfig:
    return preset(name, LUNG_CONDITIONS)


def autoencoder_small() -> TrainConfig:
    """Lung-ultrasound autoencoder of the ``small`` preset: eight minutes on one H100.

    Little divergence, so that latents keep the speckle; a discriminator late, so that it comes out again.
    """
    return TrainConfig(
        recipe="autoencoder_small",
        part="autoencoder",
        model=_model("small"),
        # the codec should know every clip equally well, whatever its label
        data=replace(LUNG_DATA, sampling_exponent=0.75),
        optimizer=OptimizerConfig(learning_rate=6e-4, betas=(0.9, 0.99), warmup_steps=300),
        loop=LoopConfig(
            steps=6000,
            batch_size=32,
            ema_half_lives=(250, 80),
            compile=True,
            evaluate_every=1500,
            checkpoint_every=3000,
        ),
        autoencoder_loss=AutoencoderLossConfig(
            kl=1e-4, perceptual=0.1, adversarial=0.05, adversarial_start_step=2500, adversarial_ramp_steps=500
        ),
    )


def denoiser_small() -> TrainConfig:
    """Lung-ultrasound denoiser of the ``small`` preset, aligned with RAFT for the first part of the run.

    A third of the clips begin with frames that are given, so that it learns to go on from an image or a clip too.
    """
    return TrainConfig(
        recipe="denoiser_small",
        part="denoiser",
        model=_model("small"),
        data=LUNG_DATA,
        optimizer=OptimizerConfig(learning_rate=1e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=300),
        loop=LoopConfig(
            steps=5000,
            batch_size=256,
            ema_half_lives=(400, 130, 1300),
            compile=True,
            evaluate_every=2000,
            checkpoint_every=5000,
        ),
        denoiser_loss=DenoiserLossConfig(time_mean=0.4, clean_prefixes=0.3),
        alignment=AlignmentConfig(kind="raft", stop_step=2500),
    )


def denoiser_small_ddpm() -> TrainConfig:
    """``denoiser_small`` with the paper's objective in the place of rectified flow, and nothing else changed but that
    every clip is made from noise alone."""
    flow = denoiser_small()
    network = replace(flow.model.denoiser, prediction="noise", out_channels=2 * flow.model.denoiser.in_channels)
    return replace(
        flow,
        recipe="denoiser_small_ddpm",
        model=replace(flow.model, denoiser=network),
        denoiser_loss=DenoiserLossConfig(),
    )


def denoiser_small_shortcut() -> TrainConfig:
    """``denoiser_small`` made to sample in few steps; starts from a run of it: ``medsora-train distill``."""
    teacher = denoiser_small()
    return replace(
        teacher,
        recipe="denoiser_small_shortcut",
        model=replace(teacher.model, denoiser=replace(teacher.model.denoiser, has_step_sizes=True)),
        optimizer=replace(teacher.optimizer, learning_rate=3e-4, warmup_steps=100),
        loop=replace(teacher.loop, steps=3000, batch_size=64, ema_half_lives=(200, 60), evaluate_every=1000),
        alignment=AlignmentConfig(),
        distillation=DistillationConfig(),
    )


def autoencoder_base() -> TrainConfig:
    """The autoencoder that ``denoiser_base`` needs, with the weights of the paper's loss terms.

    Trained from the start, where the paper fine-tunes a frozen one: hence the higher rate and the divergence.
    """
    return TrainConfig(
        recipe="autoencoder_base",
        part="autoencoder",
        model=_model("base"),
        data=replace(LUNG_DATA, sampling_exponent=0.75),
        optimizer=OptimizerConfig(learning_rate=1e-4, betas=(0.5, 0.9), warmup_steps=1000),
        loop=LoopConfig(
            steps=100_000,
            batch_size=8,
            ema_half_lives=(7000, 700),
            compile=True,
            evaluate_every=5000,
            checkpoint_every=5000,
        ),
        autoencoder_loss=AutoencoderLossConfig(mse=0.0, focal_frequency=0.01, perceptual=0.01, kl=1e-5),
    )


def denoiser_base() -> TrainConfig:
    """MedSora-B as it was published: noise prediction with learned variance, constant rate, the paper's alignment.

    Ours are the class conditions with their dropout, and batches of 16 in place of one or two. An average of half-life
    6931 steps is one that keeps 0.9999 of itself at each.
    """
    return TrainConfig(
        recipe="denoiser_base",
        part="denoiser",
        model=_model("base"),
        data=replace(LUNG_DATA, sampling_exponent=1.0),
        optimizer=OptimizerConfig(learning_rate=1e-4, betas=(0.9, 0.999), warmup_steps=0, schedule="constant"),
        loop=LoopConfig(
            steps=200_000,
            batch_size=16,
            ema_half_lives=(6931, 2000),
            compile=True,
            evaluate_every=10_000,
            checkpoint_every=10_000,
        ),
        alignment=AlignmentConfig(kind="paper", weight=0.1),
    )


TINY_LOOP = LoopConfig(
    steps=30,
    batch_size=2,
    precision="fp32",
    ema_half_lives=(6.5,),
    log_every=10,
    checkpoint_every=10,
    evaluate_every=30,
)
TINY_DATA = replace(LUNG_DATA, height=32, width=32, window_step=4, test_window_step=16)


def autoencoder_tiny() -> TrainConfig:
    """The same at 32x32 pixels with the ``tiny`` preset without perceptual and adversarial terms: seconds on a CPU."""
    small = autoencoder_small()
    return replace(
        small,
        recipe="autoencoder_tiny",
        model=_model("tiny"),
        data=TINY_DATA,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=5),
        loop=TINY_LOOP,
        autoencoder_loss=replace(small.autoencoder_loss, perceptual=0.0, adversarial=0.0),
    )


def denoiser_tiny() -> TrainConfig:
    """The same at 32x32 pixels with the ``tiny`` preset: seconds on a CPU."""
    return replace(
        denoiser_small(),
        recipe="denoiser_tiny",
        model=_model("tiny"),
        data=TINY_DATA,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=5),
        loop=replace(TINY_LOOP, batch_size=4),
        alignment=AlignmentConfig(),
    )


def denoiser_tiny_shortcut() -> TrainConfig:
    """The same at 32x32 pixels with the ``tiny`` preset: seconds on a CPU, given a run of ``denoiser_tiny``."""
    tiny = denoiser_tiny()
    return replace(
        tiny,
        recipe="denoiser_tiny_shortcut",
        model=replace(tiny.model, denoiser=replace(tiny.model.denoiser, has_step_sizes=True)),
        distillation=DistillationConfig(trajectories=24, held_out=8, batch_size=8, teacher_steps=8),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    function.__name__: function
    for function in (
        autoencoder_small,
        denoiser_small,
        denoiser_small_ddpm,
        denoiser_small_shortcut,
        autoencoder_base,
        denoiser_base,
        autoencoder_tiny,
        denoiser_tiny,
        denoiser_tiny_shortcut,
    )
}


def recipe(name: str) -> TrainConfig:
    """The recipe called ``name``.

    Raises:
        ValueError: No recipe is called so; the message lists them.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]()
