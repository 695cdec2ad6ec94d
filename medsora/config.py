"""The shape of the networks: frozen dataclasses that travel with the weights as ``config.json``.

Torch-free. Relations between fields are checked on construction with a ``ValueError`` that shows the values.
"""

from dataclasses import dataclass

from medsora.jsonconfig import from_json, to_json

__all__ = [
    "SAMPLERS_OF",
    "SHORTCUT",
    "AutoencoderConfig",
    "DenoiserConfig",
    "ModelConfig",
    "config_from_json",
    "config_to_json",
]

SCAN_ORDERS = ("spiral", "released")
LOCAL_POSITIONS = ("relative", "released")
SAMPLERS_OF = {"velocity": ("euler", "heun"), "noise": ("ddim", "ddpm")}
"""The samplers that can use each kind of prediction."""
SHORTCUT = "shortcut"
"""The sampler of a network that was trained for few long steps."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Shape of :class:`medsora.models.autoencoder.VideoAutoencoder`.

    The strides are fixed by the design: 8x in space and 4x in time, of which the Haar stem does 2x and 2x.
    """

    in_channels: int = 3
    latent_channels: int = 16
    channels: tuple[int, int, int] = (48, 96, 96)
    """Widths at 1/2, 1/4 and 1/8 of the video's height."""
    encoder_blocks: int = 1
    """Residual blocks a stage of the encoder."""
    decoder_blocks: int = 2
    """Residual blocks a stage of the decoder."""
    has_frequency_compensation: bool = True
    dropout: float = 0.2
    """In the frequency-compensation modules of type B, while training; 0.2 is the paper's."""

    def __post_init__(self) -> None:
        sizes = (self.in_channels, self.latent_channels, *self.channels)
        _require(all(1 <= size <= 4096 for size in sizes), f"channels must be 1 to 4096, got {sizes}")
        blocks = (self.encoder_blocks, self.decoder_blocks)
        _require(all(1 <= count <= 16 for count in blocks), f"blocks a stage must be 1 to 16, got {blocks}")
        _require(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """Shape of :class:`medsora.models.denoiser.Denoiser`."""

    in_channels: int = 16
    """Channels of the latents."""
    out_channels: int = 16
    """``in_channels`` for a velocity; twice that for noise with its variance."""
    prediction: str = "velocity"
    """``velocity`` (noise - data), or ``noise`` with its learned variance: the paper's DDPM."""
    patch_size: int = 2
    hidden_size: int = 512
    depth: int = 12
    local_window: int = 8
    """Tokens of local attention's window; a token sees raster neighbours up to this far away."""
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    temporal_directions: int = 1
    """1: forward only, as the released code; 2: both ways with shared weights, as the paper's later figure."""
    scan_order: str = "spiral"
    """``spiral``, or ``released`` for the released code's inverted gather."""
    local_positions: str = "relative"
    """Of local attention: ``relative``, or ``released`` for the released code's queries, turned one window too far."""
    position_grid: tuple[int, int] | None = None
    """Rows and columns of patches for which the fixed position embedding is stored; None computes it, for any grid."""
    modulation_rank: int | None = None
    """Rank of adaLN's projection; None is the paper's full matrix."""
    condition_sizes: tuple[int, ...] = ()
    """Number of classes of each condition; index ``size`` is the null class."""
    has_step_sizes: bool = False
    """Whether the network can be told how far the sampler goes at once: what the sampler ``shortcut`` needs."""

    def __post_init__(self) -> None:
        # bounds that no real network comes near, so that a hostile file cannot ask for one that never ends building
        widths = (self.in_channels, self.hidden_size, self.local_window, self.d_state, self.headdim)
        _require(all(1 <= size <= 8192 for size in widths), f"widths must be 1 to 8192, got {widths}")
        small = (self.patch_size, self.d_conv, self.expand)
        _require(all(1 <= size <= 16 for size in small), f"patch_size, d_conv, expand must be 1 to 16, got {small}")
        _require(1 <= self.depth <= 256, f"depth must be 1 to 256, got {self.depth}")
        _require(
            len(self.condition_sizes) <= 16 and all(1 <= size <= 65536 for size in self.condition_sizes),
            f"condition_sizes must be at most 16 of 1 to 65536, got {self.condition_sizes}",
        )
        _require(
            self.prediction in SAMPLERS_OF,
            f"prediction must be one of {tuple(SAMPLERS_OF)}, got {self.prediction!r}",
        )
        wanted = self.in_channels * (2 if self.prediction == "noise" else 1)
        _require(
            self.out_channels == wanted,
            f"out_channels must be {wanted} to predict {self.prediction} of {self.in_channels} channels, "
            f"got {self.out_channels}",
        )
        _require(
            self.d_inner % self.headdim == 0,
            f"expand * hidden_size ({self.d_inner}) must be a multiple of headdim ({self.headdim})",
        )
        _require(
            not self.has_step_sizes or self.prediction == "velocity",
            f"has_step_sizes is for a predicted velocity, the network predicts {self.prediction}",
        )
        _require(self.hidden_size % 4 == 0, f"hidden_size must be a multiple of 4, got {self.hidden_size}")
        _require(
            self.temporal_directions in (1, 2),
            f"temporal_directions must be 1 or 2, got {self.temporal_directions}",
        )
        _require(
            self.scan_order in SCAN_ORDERS,
            f"scan_order must be one of {SCAN_ORDERS}, got {self.scan_order!r}",
        )
        _require(
            self.local_positions in LOCAL_POSITIONS,
            f"local_positions must be one of {LOCAL_POSITIONS}, got {self.local_positions!r}",
        )
        _require(
            self.position_grid is None or all(1 <= size <= 256 for size in self.position_grid),
            f"position_grid must be None or two of 1 to 256, got {self.position_grid}",
        )
        _require(
            self.modulation_rank is None or 1 <= self.modulation_rank <= 8192,
            f"modulation_rank must be None or 1 to 8192, got {self.modulation_rank}",
        )

    @property
    def d_inner(self) -> int:
        """Width inside the Mamba mixers."""
        return self.expand * self.hidden_size

    @property
    def num_heads(self) -> int:
        """Heads of the state-space operator."""
        return self.d_inner // self.headdim

    @property
    def samplers(self) -> tuple[str, ...]:
        """The samplers that can use this network, the one that it is best used by first."""
        return (*([SHORTCUT] if self.has_step_sizes else []), *SAMPLERS_OF[self.prediction])

    @property
    def null_condition(self) -> tuple[int, ...]:
        """The null class of every condition: what an unconditional sample is asked with."""
        return self.condition_sizes


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Both networks and the words of their conditions."""

    autoencoder: AutoencoderConfig | None
    """None: the denoiser alone, which makes latents and no video."""
    denoiser: DenoiserConfig
    condition_names: dict[str, tuple[str, ...]]
    """Values of each condition by name, in the order of ``denoiser.condition_sizes``."""

    def __post_init__(self) -> None:
        if self.autoencoder is not None:
            _require(
                self.autoencoder.latent_channels == self.denoiser.in_channels,
                f"the autoencoder has {self.autoencoder.latent_channels} latent channels, "
                f"the denoiser takes {self.denoiser.in_channels}",
            )
        for name, values in self.condition_names.items():
            _require(len(set(values)) == len(values), f"condition_names.{name} has a value twice: {values}")
        sizes = tuple(len(values) for values in self.condition_names.values())
        _require(
            sizes == self.denoiser.condition_sizes,
            f"condition_names have {sizes} values, condition_sizes are {self.denoiser.condition_sizes}",
        )

    def require_autoencoder(self) -> AutoencoderConfig:
        """The autoencoder's shape, where there must be one.

        Raises:
            ValueError: The model is a denoiser alone.
        """
        if self.autoencoder is None:
            raise ValueError("the model has no autoencoder, and makes latents, not video")
        return self.autoencoder

    def condition_indices(self, condition: dict[str, str]) -> tuple[int, ...]:
        """Class indices of a condition given in words, e.g. ``{"finding": "covid", "probe": "convex"}``.

        Raises:
            ValueError: A name or value that this model does not know, or a condition left out.
        """
        if set(condition) != set(self.condition_names):
            raise ValueError(f"condition must name {sorted(self.condition_names)}, got {sorted(condition)}")
        indices = []
        for name, values in self.condition_names.items():
            if condition[name] not in values:
                raise ValueError(f"{name} must be one of {values}, got {condition[name]!r}")
            indices.append(values.index(condition[name]))
        return tuple(indices)


def config_from_json(value: object, *, where: str = "config.json") -> ModelConfig:
    """Read a :class:`ModelConfig` from plain JSON types; ``ValueError`` names what is wrong."""
    return from_json(ModelConfig, value, where=where)


def config_to_json(config: ModelConfig) -> dict[str, object]:
    """The same as plain JSON types."""
    return dict(to_json(config))
