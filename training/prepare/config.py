"""Everything that decides what a prepared cache holds: one frozen dataclass, stored in its index. Torch-free."""

from dataclasses import dataclass

__all__ = ["CHOICES", "Box", "PrepareConfig"]

CHOICES: dict[str, tuple[str, ...]] = {
    "layout": (
        "auto", "folder", "manifest", "videofolder", "colonoscopic", "cholectriplet", "kvasir-capsule", "dicom",
    ),
    "fit": ("crop", "pad", "stretch"),
    "splits": ("auto", "given", "draw"),
    "validation": ("auto", "train", "test", "skip"),
    "cuts": ("both", "detect", "given", "none"),
    "black_frames": ("drop", "keep"),
    "overlay": ("warn", "mask", "skip"),
    "duplicates": ("move", "drop", "keep", "fail"),
    "burned_in": ("refuse", "accept"),
}  # fmt: skip
"""Allowed values of the fields that are a choice."""

MAX_SIDE = 1024


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangle in pixels of the source's frames."""

    left: int
    top: int
    width: int
    height: int

    def __post_init__(self) -> None:
        if min(self.left, self.top) < 0 or min(self.width, self.height) < 1:
            raise ValueError(f"a box is LEFT,TOP,WIDTH,HEIGHT with a size of at least 1x1, got {self}")

    def __str__(self) -> str:
        return f"{self.left},{self.top},{self.width},{self.height}"

    @property
    def right(self) -> int:
        """First column that is not inside."""
        return self.left + self.width

    @property
    def bottom(self) -> int:
        """First row that is not inside."""
        return self.top + self.height


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Settings of ``medsora-train prepare``. The same source and settings give the same cache, to the bit."""

    dataset: str = ""
    """Name of the data set; empty takes the layout's, or the source folder's."""
    layout: str = "auto"
    height: int = 128
    width: int = 128
    fit: str = "crop"
    """``crop``: the shorter side is scaled to fit, the middle is kept; ``pad``: black bars; ``stretch``."""
    fps: float | None = None
    """Frames a second of sources that do not say it (frame folders, some DICOM files)."""
    max_fps: float | None = None
    """Of faster sources only every second, third, ... frame is kept, to come nearest to this rate."""
    min_frames: int = 16
    """Shorter clips are left out, and counted."""
    label_columns: tuple[str, ...] | None = None
    """Columns (CholecTriplet: triplet, instrument, verb, target, phase) that become conditions; None takes the
    layout's usual ones, an empty tuple none."""
    excluded_labels: tuple[str, ...] = ()
    """Clips with one of these values in a condition are left out."""
    bridge_frames: int = 0
    """Runs of frame labels shorter than this take over the label before them."""
    group_pattern: str | None = None
    """Regular expression on a clip's name whose first bracket is the patient or source; None: the layout's rule."""
    splits: str = "auto"
    """``given`` needs a split of the source's own, ``draw`` draws one by group, ``auto`` takes what there is."""
    validation: str = "auto"
    """Where a source's validation split goes; ``auto``: to train where the source has a test split, else to test."""
    test_fraction: float = 0.2
    """Share of frames that a drawn test split aims at, for every label."""
    seed: int = 0
    """Of the drawn split."""
    fold: int | None = None
    """CholecTriplet: published fold (1 to 5) that is the test split; Kvasir-Capsule: split CSV (0 or 1)."""
    cuts: str = "both"
    """Where scenes begin: as the source says (``given``), as found (``detect``), ``both``, or never (``none``)."""
    black_frames: str = "drop"
    crop: Box | None = None
    """Part of every frame that is used."""
    crop_borders: bool = False
    """Cut off black borders; of each source file by itself."""
    masks: tuple[Box, ...] = ()
    """Painted black in every frame, before anything else."""
    overlay: str = "warn"
    """What happens with clips that seem to have text or symbols burned in: kept with a ``warn``-ing, the places
    painted black (``mask``), or left out (``skip``)."""
    duplicates: str = "move"
    """Near-duplicates on both sides: ``move`` puts their groups on one side, ``drop`` leaves the training clip out,
    ``keep`` only reports them, ``fail`` stops."""
    deidentify: bool = False
    """DICOM: allow files that name a patient; nothing of that goes into the cache, and what was left is listed."""
    burned_in: str = "refuse"
    """DICOM files that do not say that nothing is burned into their pixels; ``accept`` takes them."""
    group_salt: str | None = None
    """Key of the hash that stands for a DICOM PatientID; None derives one from the source."""
    modality: str = ""
    """DICOM's word, e.g. US or ES; empty takes the layout's."""
    licence: str = ""
    """Of sources that do not say theirs."""
    source: str = ""
    attribution: str = ""
    shard_mib: int = 64
    """Size at which a shard is full."""

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            _require(value in allowed, f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        sides = (self.height, self.width)
        _require(
            all(8 <= side <= MAX_SIDE and side % 8 == 0 for side in sides),
            f"height and width must be multiples of 8 from 8 to {MAX_SIDE}, got {self.width}x{self.height}",
        )
        for name in ("fps", "max_fps"):
            rate = getattr(self, name)
            _require(rate is None or 0 < rate < 1000, f"{name} must be above 0 and below 1000, got {rate}")
        _require(self.min_frames >= 1, f"min_frames must be at least 1, got {self.min_frames}")
        _require(self.bridge_frames >= 0, f"bridge_frames must be at least 0, got {self.bridge_frames}")
        _require(0 < self.test_fraction < 1, f"test_fraction must be between 0 and 1, got {self.test_fraction}")
        _require(1 <= self.shard_mib <= 1024, f"shard_mib must be 1 to 1024, got {self.shard_mib}")
        _require(self.burned_in == "refuse" or self.deidentify, "burned_in=accept is of use with deidentify only")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
