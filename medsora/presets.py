"""The named network shapes, in one table. ``base`` is the paper's MedSora-B. Torch-free."""

from dataclasses import replace

from medsora.config import AutoencoderConfig, DenoiserConfig, ModelConfig

__all__ = ["AUTOENCODERS", "DENOISERS", "preset"]

# fmt: off
AUTOENCODERS: dict[str, AutoencoderConfig] = {
    #                            channels at 1/2, 1/4, 1/8          blocks a stage
    "tiny":  AutoencoderConfig(channels=(8, 16, 16),     latent_channels=4,  encoder_blocks=1, decoder_blocks=1),
    "small": AutoencoderConfig(channels=(48, 96, 88),    latent_channels=16, encoder_blocks=1, decoder_blocks=1,
                               dropout=0.0),
    "base":  AutoencoderConfig(channels=(128, 256, 512), latent_channels=16, encoder_blocks=3, decoder_blocks=3),
    "large": AutoencoderConfig(channels=(128, 256, 512), latent_channels=16, encoder_blocks=3, decoder_blocks=4),
}

DENOISERS: dict[str, DenoiserConfig] = {
    #                        width             depth     state        heads       adaLN               conditions
    "tiny":  DenoiserConfig(hidden_size=32,  depth=2,  d_state=16,  headdim=16, modulation_rank=None,
                            in_channels=4,   out_channels=4,  temporal_directions=2, local_window=2),
    "small": DenoiserConfig(hidden_size=256, depth=6,  d_state=64,  headdim=64, modulation_rank=32,
                            in_channels=16,  out_channels=16, temporal_directions=2),
    "base":  DenoiserConfig(hidden_size=512, depth=12, d_state=128, headdim=64, modulation_rank=None,
                            in_channels=16,  out_channels=32, prediction="noise"),
    "large": DenoiserConfig(hidden_size=512, depth=24, d_state=128, headdim=64, modulation_rank=None,
                            in_channels=16,  out_channels=16, temporal_directions=2),
}
# fmt: on


def preset(name: str, condition_names: dict[str, tuple[str, ...]]) -> ModelConfig:
    """Shape of both networks by name: ``tiny`` (tests), ``small`` (shipped), ``base`` (paper), ``large``.

    Raises:
        ValueError: No preset is called so.
    """
    if name not in DENOISERS:
        raise ValueError(f"preset must be one of {', '.join(DENOISERS)}, got {name!r}")
    sizes = tuple(len(values) for values in condition_names.values())
    return ModelConfig(
        autoencoder=AUTOENCODERS[name],
        denoiser=replace(DENOISERS[name], condition_sizes=sizes),
        condition_names=condition_names,
    )
