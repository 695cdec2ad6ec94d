"""The checkpoints that this server offers, as far as their manifests tell: loads no weights, no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medsora.errors import CheckpointError
from medsora.files import sha256_of
from medsora.manifest import Manifest, find_checkpoint, read_manifest

__all__ = ["Catalogue", "ServedCheckpoint"]


@dataclass(frozen=True, kw_only=True)
class ServedCheckpoint:
    """A checkpoint on disk, and what it says of itself."""

    directory: Path
    manifest: Manifest
    sha256: str
    """SHA-256 of ``manifest.json``; that file holds the hash of every weight file, so it names all of it."""
    created: int
    """Unix seconds at which the manifest was written to this disk."""

    @property
    def name(self) -> str:
        """Name of the model in the API."""
        return self.manifest.name


class Catalogue:
    """Served checkpoints by name; the first is the default.

    Args:
        checkpoints: At least one, with different names.
    """

    def __init__(self, checkpoints: Sequence[ServedCheckpoint]) -> None:
        self._by_name = {checkpoint.name: checkpoint for checkpoint in checkpoints}
        if len(self._by_name) != len(checkpoints) or not checkpoints:
            names = [checkpoint.name for checkpoint in checkpoints]
            raise CheckpointError(f"served checkpoints must be there and have different names, got {names}")
        self.default = checkpoints[0]

    @classmethod
    def load(cls, names_or_paths: Sequence[str]) -> "Catalogue":
        """Read the manifests of the given checkpoints (shipped names, or directories).

        Raises:
            CheckpointError: One is missing or damaged, has no autoencoder, or two have the same name.
        """
        checkpoints = []
        for name in names_or_paths:
            directory = find_checkpoint(name)
            manifest = read_manifest(directory)
            if not manifest.has_autoencoder:
                raise CheckpointError(f"{directory} has no autoencoder: it makes latents, and no video to serve")
            path = directory / "manifest.json"
            checkpoints.append(
                ServedCheckpoint(
                    directory=directory,
                    manifest=manifest,
                    sha256=sha256_of(path),
                    created=int(path.stat().st_mtime),
                )
            )
        return cls(checkpoints)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all models, the default first."""
        return tuple(self._by_name)

    def get(self, name: str) -> ServedCheckpoint | None:
        """The checkpoint of that name, or None."""
        return self._by_name.get(name)

    def __iter__(self) -> Iterator[ServedCheckpoint]:
        return iter(self._by_name.values())
