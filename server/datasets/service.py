"""The rules of datasets: what is accepted, what a client may see, what cancelling and deleting mean."""

import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from medsora.manifest import Manifest
from server.checkpoints import Catalogue
from server.datasets.archive import Archive
from server.datasets.card import training_sources
from server.datasets.files import DatasetFiles
from server.datasets.layout import groups_of
from server.datasets.model import FORMATS, MAX_CLIPS, DatasetStatus, is_dataset_id
from server.datasets.repository import ClipRecord, DatasetRecord, DatasetRepository, TooManyDatasetsError
from server.errors import NotFoundError, NotReadyError, OverloadedError, RequestRefusedError, UnavailableError
from server.jobs.service import JobService, VideoOrder
from server.storage import ArtifactStore

__all__ = ["DatasetOrder", "DatasetPage", "DatasetService"]

MAX_SPLITS = 10
_RETRY_MS = 10_000
_KEPT_ARCHIVES = 16
"""Indices of archives that a process keeps; one of 100,000 clips has some megabytes."""
_FOLDER = re.compile(r"[a-z][a-z0-9_]{0,31}")
_OWN = ("model", "prompt", "label", "seed", "tenant")
"""Columns of a job that differ between clips, or are the dataset's own."""


@dataclass(frozen=True, kw_only=True)
class DatasetOrder:
    """What a client asks for; types are right, values are not checked yet."""

    name: str
    labels: Mapping[str, int]
    splits: Mapping[str, float]
    format: str
    seed: int
    video: VideoOrder
    """What all clips have in common; its prompt and seed are of no account."""
    filters: Mapping[str, float | bool | None]
    max_tries: int


@dataclass(frozen=True)
class DatasetPage:
    """A part of the list of datasets."""

    datasets: list[DatasetRecord]
    has_more: bool


class DatasetService:
    """Everything that the API does with datasets. Nobody but its tenant sees a dataset.

    Args:
        max_active: Most datasets of a tenant that may be unfinished.
        min_free_bytes: Free disk space below which no dataset is accepted.
    """

    def __init__(
        self,
        repository: DatasetRepository,
        files: DatasetFiles,
        *,
        jobs: JobService,
        catalogue: Catalogue,
        store: ArtifactStore,
        max_active: int,
        min_free_bytes: int,
    ) -> None:
        self._repository, self._files = repository, files
        self._jobs, self._catalogue, self._store = jobs, catalogue, store
        self._max_active, self._min_free_bytes = max_active, min_free_bytes
        self._archives: OrderedDict[tuple[object, ...], Archive] = OrderedDict()
        self._archives_lock = threading.Lock()

    def create(self, tenant: str, order: DatasetOrder) -> DatasetRecord:
        """Accept a dataset: when this returns, it is on disk and will come to an end.

        Raises:
            RequestRefusedError: Names the field and what is allowed.
            OverloadedError: Too many datasets of the tenant are unfinished.
            UnavailableError: Too little room on the disk.
        """
        if order.format not in FORMATS:
            raise _refused("format", f"there is no {order.format[:80]!r}; allowed: {', '.join(FORMATS)}")
        splits = _check_splits(order.splits)
        labels, settings = self._check_labels(tenant, order)
        model = str(settings["model"])
        checkpoint = self._catalogue.get(model)
        assert checkpoint is not None  # the settings were resolved against it
        manifest = checkpoint.manifest
        if settings["num_frames"] > manifest.limits.window:
            message = f"{settings['num_frames']} frames are made in windows, which datasets do not take"
            raise _refused("num_frames", f"{message}; allowed: up to {manifest.limits.window}")
        max_resemblance = _max_resemblance(order.filters, manifest)
        if self._store.free_bytes() < self._min_free_bytes:
            message = "There is too little free disk space to take more datasets."
            raise UnavailableError(message, code="storage_full", retry_after_ms=10_000)
        values = {
            "tenant": tenant,
            "name": order.name,
            "model": model,
            "model_sha256": checkpoint.sha256,
            "format": order.format,
            "seed": order.seed,
            "total": sum(label["count"] for label in labels),
            "labels": labels,
            "splits": splits,
            "settings": {name: value for name, value in settings.items() if name not in _OWN},
            "filters": {
                **order.filters,
                "max_training_resemblance": max_resemblance,
                "max_tries": order.max_tries,
            },
            "about": _about(manifest),
        }
        try:
            return self._repository.add(values, max_active=self._max_active)
        except TooManyDatasetsError:
            message = f"{self._max_active} datasets are unfinished, no more can be taken now. Try again later."
            raise OverloadedError(message, code="too_many_datasets", retry_after_ms=_RETRY_MS) from None

    def unfinished_clips(self) -> int:
        """Number of clips that all datasets together are still to give."""
        return self._repository.unfinished_clips()

    def get(self, tenant: str, dataset_id: str) -> DatasetRecord:
        """The dataset of that id.

        Raises:
            NotFoundError: The tenant has none.
        """
        dataset = self._repository.get(tenant, dataset_id) if is_dataset_id(dataset_id) else None
        if dataset is None:
            raise _not_found(dataset_id)
        return dataset

    def counts(self, dataset: DatasetRecord) -> list[dict[str, int]]:
        """Of each label, how many clips are in which state; see :meth:`DatasetRepository.counts`."""
        return self._repository.counts(dataset)

    def drop_counts(self, dataset: DatasetRecord) -> dict[str, int]:
        """Number of tries that came to nothing, by reason."""
        return self._repository.drop_counts(dataset)

    def page(self, tenant: str, *, limit: int, after: str | None) -> DatasetPage:
        """A page of datasets behind the dataset ``after``, newest first.

        Raises:
            RequestRefusedError: ``after`` is no dataset of the tenant.
        """
        page = None
        if after is None or is_dataset_id(after):
            page = self._repository.page(tenant, limit=limit, after=after)
        if page is None:
            message = f"there is no dataset with the id {(after or '')[:80]!r}."
            raise _refused("after", message, code="invalid_cursor")
        return DatasetPage(*page)

    def clips(self, dataset: DatasetRecord, *, limit: int, after: int) -> tuple[list[ClipRecord], bool]:
        """Clips with numbers above ``after``, and whether there are more."""
        clips = self._repository.clips(dataset, after=after, limit=limit + 1)
        return clips[:limit], len(clips) > limit

    def cancel(self, tenant: str, dataset_id: str) -> DatasetRecord:
        """Let a dataset end: what is done stays, what waits or runs is stopped. Asking again changes nothing.

        Raises:
            NotFoundError: The tenant has none.
            NotReadyError: It is finished.
        """
        dataset = self._repository.request_cancel(tenant, dataset_id) if is_dataset_id(dataset_id) else None
        if dataset is None:
            raise _not_found(dataset_id)
        if dataset.status is DatasetStatus.COMPLETED:
            message = f"The dataset {dataset_id} cannot be cancelled any more: it is completed."
            raise NotReadyError(message, code="dataset_not_cancellable", param="dataset_id")
        return dataset

    def delete(self, tenant: str, dataset_id: str) -> None:
        """Remove a dataset with its videos; what waits or runs is cancelled first. It is gone at once.

        Raises:
            NotFoundError: The tenant has none.
        """
        if not (is_dataset_id(dataset_id) and self._repository.request_removal(tenant, dataset_id)):
            raise _not_found(dataset_id)

    def archive(self, dataset: DatasetRecord, container: str) -> Archive:
        """The archive of what was done when ``dataset`` was read.

        Raises:
            NotReadyError: Nothing was.
        """
        if dataset.done == 0:
            message = f"The dataset {dataset.id} has no clip yet that is done: it is {dataset.status.value}."
            raise NotReadyError(message, code="dataset_not_ready", param="dataset_id")
        # What is in it is told by what was done and dropped at one moment. Its rows are walked for the first request,
        # and never again while the index is kept.
        state = (dataset.id, dataset.done, dataset.dropped, dataset.missing, dataset.status, container)
        with self._archives_lock:
            archive = self._archives.get(state)
            if archive is not None:
                self._archives.move_to_end(state)
                return archive
        archive = Archive(container, groups_of(dataset, self._repository, self._files))
        with self._archives_lock:
            self._archives[state] = archive
            while len(self._archives) > _KEPT_ARCHIVES:
                self._archives.popitem(last=False)
        return archive

    def _check_labels(self, tenant: str, order: DatasetOrder) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The labels by their names, and the columns that their jobs have in common."""
        labels: list[dict[str, Any]] = []
        settings: dict[str, Any] = {}
        for asked, count in order.labels.items():
            video = VideoOrder(**{**vars(order.video), "prompt": asked, "seed": order.seed})
            try:
                settings = self._jobs.resolve(tenant, video)
            except RequestRefusedError as error:
                if error.param != "prompt":
                    raise
                message = error.message.removeprefix("prompt: ")
                raise _refused("labels", message) from None
            name = str(settings["label"])
            if name in [label["name"] for label in labels]:
                raise _refused("labels", f"{asked[:80]!r} means {name!r}, which is asked for already")
            labels.append({"name": name, "count": count, "folder": name})
        if not labels:
            raise _refused("labels", "must name at least one label, with its number of clips")
        total = sum(order.labels.values())
        if total > MAX_CLIPS:
            raise _refused("labels", f"ask for {total} clips; allowed: up to {MAX_CLIPS} in all")
        for place, folder in enumerate(_folders([label["name"] for label in labels])):
            labels[place]["folder"] = folder
        return labels, settings


def _folders(names: list[str]) -> Iterator[str]:
    """A folder for each label: its name, as far as that is safe in paths; different for different labels."""
    taken: set[str] = set()
    for name in names:
        folder = base = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:80] or "label"
        number = 1
        while folder.lower() in taken:
            number += 1
            folder = f"{base}-{number}"
        taken.add(folder.lower())
        yield folder


def _check_splits(splits: Mapping[str, float]) -> list[dict[str, Any]]:
    if not 1 <= len(splits) <= MAX_SPLITS:
        raise _refused("splits", f"has {len(splits)} splits; allowed: 1 to {MAX_SPLITS}")
    for name, ratio in splits.items():
        if _FOLDER.fullmatch(name) is None:
            message = f"{name[:80]!r} must be up to 32 of a-z, 0-9 and _, a letter first, such as train"
            raise _refused("splits", message)
        if name in ("shards", "all"):
            raise _refused("splits", f"{name!r} means something else to readers; allowed: another name")
        if not 0 < ratio <= 1e9:
            raise _refused("splits", f"{name!r} has the ratio {ratio:g}; allowed: above 0")
    return [{"name": name, "ratio": ratio} for name, ratio in splits.items()]


def _max_resemblance(filters: Mapping[str, float | bool | None], manifest: Manifest) -> float | None:
    """From which resemblance to a training clip on clips are dropped; None: they are not."""
    asked, name = filters["max_training_resemblance"], "filters.drop_memorised"
    if not filters["drop_memorised"]:
        if asked is not None:
            message = "goes with filters.drop_memorised, which is false"
            raise _refused("filters.max_training_resemblance", message, code="invalid_filters")
        return None
    if manifest.fingerprints is None:
        message = f"the model {manifest.name} has no fingerprints of its training clips to compare with"
        raise _refused(name, message, code="filter_not_available")
    if asked is None and manifest.fingerprints.max_resemblance is None:
        message = f"the model {manifest.name} was not calibrated for it: name filters.max_training_resemblance"
        raise _refused(name, message, code="filter_not_available")
    return manifest.fingerprints.max_resemblance if asked is None else asked


def _about(manifest: Manifest) -> dict[str, Any]:
    return {
        "modality": manifest.modality,
        "description": manifest.description,
        "licence": manifest.licence,
        "intended_use": manifest.intended_use,
        "training_data": training_sources(manifest.training_data),
    }


def _refused(param: str, message: str, *, code: str | None = None) -> RequestRefusedError:
    return RequestRefusedError(f"{param}: {message}", param=param, code=code or f"invalid_{param}")


def _not_found(dataset_id: str) -> NotFoundError:
    message = f"There is no dataset with the id {dataset_id[:80]!r}."
    return NotFoundError(message, code="dataset_not_found", param="dataset_id")
