"""The rules of clips that are made from something: begin with given frames, edit a clip, go on from one.

What they are made from is kept as a source of the job's own, whatever becomes of the upload or of
the earlier video: the source goes when no job refers to it any more.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from medsora.config import SAMPLERS_OF
from medsora.geometry import CHUNK_FRAMES
from medsora.manifest import Manifest
from medsora.request import no_clean_prefixes
from medsora.windows import context_frames
from server.errors import NotFoundError, RequestRefusedError, TooLargeError
from server.files.model import new_file_id
from server.files.repository import FileRecord
from server.files.service import FileService
from server.files.store import FileStore, WrittenFile
from server.jobs.repository import JobRecord
from server.jobs.service import JobService, VideoOrder
from server.objects import Objects
from server.sources.media import MEDIA_TYPES, Media, MediaError, inspect, kind_of_media
from server.sources.model import SourceKind
from server.sources.repository import SourceRepository
from server.storage import ArtifactStore

__all__ = ["DEFAULT_STRENGTH", "SourceOrder", "SourceService"]

DEFAULT_STRENGTH = 0.6
"""Of an edit: enough for another finding to show, while layout and motion stay."""


@dataclass(frozen=True, kw_only=True)
class SourceOrder:
    """What a client wants a clip to be made from: one of these."""

    field: str
    """Of the request, for messages."""
    content: bytes | None = None
    file_id: str | None = None
    video_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """A source that has no row yet."""

    source_id: str
    media: Media
    written: WrittenFile
    origin: tuple[Objects, str] | None = None
    """Root and key of the object whose bytes it is to have; None: it has its own already."""
    video: JobRecord | None = None
    """The job whose video it is."""


class SourceService:
    """Everything that the API does with sources.

    Args:
        store: Of the bytes of sources.
        artifacts: Of earlier videos.
        max_bytes: Of one upload.
    """

    def __init__(
        self,
        repository: SourceRepository,
        store: FileStore,
        *,
        jobs: JobService,
        files: FileService,
        artifacts: ArtifactStore,
        max_bytes: int,
    ) -> None:
        self._repository, self._store = repository, store
        self._jobs, self._files, self._artifacts = jobs, files, artifacts
        self._max_bytes = max_bytes

    def begin_with(self, tenant: str, order: VideoOrder, source: SourceOrder) -> JobRecord:
        """Accept a clip that begins with a picture, or with the frames of a video.

        Raises:
            ServiceError: As :meth:`JobService.submit`; or the source cannot be had, read or used.
        """
        return self._jobs.accept(self.resolve_beginning(tenant, order, source))

    def resolve_beginning(self, tenant: str, order: VideoOrder, source: SourceOrder) -> dict[str, Any]:
        """Keep the source, and return the columns of the job of :meth:`begin_with`, which is not accepted yet.

        A source that no job is made for is swept away.

        Raises:
            ServiceError: As :meth:`JobService.resolve`; or the source cannot be had, read or used.
        """
        order = replace(order, prefix_frames=1, source_field=source.field)
        values = self._jobs.resolve(tenant, order)  # what is wrong without the source is said before it is read
        with self._received(tenant, source, most_frames=values["num_frames"] - 1) as found:
            self._check_size(source.field, found.media, values)
            self._check_fps(source.field, found.media, values["fps"])
            values = self._jobs.resolve(tenant, replace(order, prefix_frames=found.media.num_frames))
            return self._columns(tenant, values, found, SourceKind.REFERENCE, source.field)

    def discard(self, source_id: str) -> None:
        """Remove a source that no job was made for after all; else the sweeper would, in a while."""
        if self._repository.forget(source_id):
            self._store.remove(source_id)

    def edit(self, tenant: str, order: VideoOrder, source: SourceOrder, *, strength: float | None) -> JobRecord:
        """Accept an edit of a video: of its length and size, with another label.

        Raises:
            ServiceError: As :meth:`begin_with`.
        """
        manifest = self._jobs.manifest(self._model(tenant, order, source))
        with self._received(tenant, source, most_frames=manifest.limits.longest) as found:
            order = self._completed(order, found, is_edit=True)
            order = replace(
                order,
                num_frames=found.media.num_frames,
                strength=DEFAULT_STRENGTH if strength is None else strength,
                source_field=source.field,
            )
            if not order.strength < 1:
                message = f"strength: {order.strength:g} is out of range; allowed: above 0, below 1"
                raise RequestRefusedError(message, param="strength", code="invalid_strength")
            self._check_video(source.field, found.media, manifest)
            return self._accept(tenant, self._jobs.resolve(tenant, order), found, SourceKind.EDIT, source.field)

    def extend(self, tenant: str, order: VideoOrder, source: SourceOrder) -> JobRecord:
        """Accept a video that goes on where another ends. ``order`` tells the length of what is new.

        Raises:
            ServiceError: As :meth:`begin_with`.
        """
        manifest = self._jobs.manifest(self._model(tenant, order, source))
        if not manifest.limits.clean_prefixes:
            message = f"{source.field}: {no_clean_prefixes(manifest)}"
            raise RequestRefusedError(message, param=source.field, code=f"{source.field}_not_supported")
        added = self._added_frames(manifest, order)
        longest = manifest.limits.longest - added
        with self._received(tenant, source, most_frames=longest) as found:
            self._check_video(source.field, found.media, manifest)
            frames = found.media.num_frames
            order = replace(
                self._completed(order, found, is_edit=False),
                seconds=None,
                num_frames=frames + added,
                prefix_frames=min(frames, context_frames(manifest.limits.window)),
                source_field=source.field,
            )
            return self._accept(tenant, self._jobs.resolve(tenant, order), found, SourceKind.EXTENSION, source.field)

    @staticmethod
    def _added_frames(manifest: Manifest, order: VideoOrder) -> int:
        """Frames of a new segment: whole chunks, from one on."""
        limits = manifest.limits
        most = limits.longest - CHUNK_FRAMES
        frames = order.num_frames
        if order.seconds is not None:
            try:
                wanted = float(order.seconds) * limits.fps
            except ValueError:
                wanted = -1.0
            frames = round(wanted) if 0 < wanted <= most and abs(wanted - round(wanted)) < 0.01 else -1
        elif frames is None:
            frames = limits.num_frames[0]
        if not (0 < frames <= most and frames % CHUNK_FRAMES == 0):
            step, end = manifest.seconds_for(CHUNK_FRAMES), manifest.seconds_for(most)
            name, given = ("seconds", order.seconds) if order.seconds is not None else ("num_frames", order.num_frames)
            allowed = f"multiples of {step} up to {end}" if name == "seconds" else f"multiples of {CHUNK_FRAMES}"
            message = f"{name}: the new segment cannot have {str(given)[:40]!r}; allowed: {allowed}"
            raise RequestRefusedError(message, param=name, code=f"invalid_{name}")
        return frames

    def _model(self, tenant: str, order: VideoOrder, source: SourceOrder) -> str | None:
        """The model that is asked for, or that of the video it is made from."""
        if order.model is not None or source.video_id is None:
            return order.model
        return self._video(tenant, source).model

    def _video(self, tenant: str, source: SourceOrder) -> JobRecord:
        assert source.video_id is not None
        try:
            return self._jobs.get_completed(tenant, source.video_id)
        except NotFoundError as error:
            raise NotFoundError(error.message, code=error.code, param=source.field) from None

    @staticmethod
    def _completed(order: VideoOrder, found: _Kept, *, is_edit: bool) -> VideoOrder:
        """The order, with what it leaves open taken from the earlier video where there is one."""
        media, video = found.media, found.video
        order = replace(order, size=(media.width, media.height))
        if video is None or order.model not in (None, video.model):
            return order
        if is_edit and video.sampler not in SAMPLERS_OF["velocity"]:
            return replace(order, model=video.model)  # it was made by a sampler that cannot begin midway
        return replace(
            order,
            model=video.model,
            num_inference_steps=order.num_inference_steps or video.num_inference_steps,
            guidance_scale=video.guidance_scale if order.guidance_scale is None else order.guidance_scale,
            sampler=order.sampler or video.sampler,
        )

    def _check_video(self, field: str, media: Media, manifest: Manifest) -> None:
        if media.fps is None:
            raise _refused(field, "is a picture; allowed: a video")
        self._check_fps(field, media, manifest.limits.fps)
        if (media.width, media.height) not in manifest.limits.sizes:
            allowed = ", ".join(f"{width}x{height}" for width, height in manifest.limits.sizes)
            raise _refused(
                field, f"is {media.width}x{media.height}, which {manifest.name} cannot make; allowed: {allowed}"
            )

    @staticmethod
    def _check_size(field: str, media: Media, values: dict[str, Any]) -> None:
        if (media.width, media.height) != (values["width"], values["height"]):
            wanted = f"{values['width']}x{values['height']}"
            raise _refused(field, f"is {media.width}x{media.height}; allowed: the size of the video, {wanted}")

    @staticmethod
    def _check_fps(field: str, media: Media, fps: float) -> None:
        if media.fps is not None and abs(media.fps - fps) > 0.01 * fps:
            raise _refused(field, f"has {media.fps:g} frames a second; allowed: {fps:g}, the rate of the model")

    @contextmanager
    def _received(self, tenant: str, source: SourceOrder, *, most_frames: int) -> Iterator[_Kept]:
        """The source on disk and looked at. After an error within the block nothing of it is left."""
        source_id = new_file_id()
        try:
            yield self._keep(tenant, source_id, source, most_frames)
        except BaseException:
            if self._repository.get(source_id) is None:  # else the sweeper knows of it
                self._store.remove(source_id)
            raise

    def _keep(self, tenant: str, source_id: str, source: SourceOrder, most_frames: int) -> _Kept:
        if source.content is not None:
            written = self._write(source_id, source)
            media = self._inspected(self._store.objects, self._store.key(source_id), source, most_frames)
            return _Kept(source_id=source_id, media=media, written=written)
        if source.file_id is not None:
            file = self._file(tenant, source)
            origin = self._files.origin(file)
            media = self._inspected(*origin, source, most_frames)
            written = WrittenFile(file.size_bytes, file.sha256)
            return _Kept(source_id=source_id, media=media, written=written, origin=origin)
        video = self._video(tenant, source)
        assert video.artifact is not None
        assert video.size_bytes is not None
        assert video.sha256 is not None
        if video.num_frames > most_frames:
            raise _refused(source.field, f"has {video.num_frames} frames; allowed: up to {most_frames}")
        # our own: its row says what it is
        size = {"width": video.width, "height": video.height}
        return _Kept(
            source_id=source_id,
            media=Media(kind="mp4", num_frames=video.num_frames, fps=video.fps, **size),
            written=WrittenFile(video.size_bytes, video.sha256),
            origin=(self._artifacts.objects, self._artifacts.key(video.artifact)),
            video=video,
        )

    @staticmethod
    def _inspected(objects: Objects, key: str, source: SourceOrder, most_frames: int) -> Media:
        try:
            with objects.local(key) as path:
                return inspect(path, max_frames=most_frames)
        except FileNotFoundError:
            raise _gone(source.field) from None
        except MediaError as error:
            raise _refused(source.field, str(error)) from None

    def _write(self, source_id: str, source: SourceOrder) -> WrittenFile:
        content = source.content or b""
        if not content:
            raise _refused(source.field, "is empty")
        if len(content) > self._max_bytes:
            message = f"{source.field}: has {len(content)} bytes; allowed: up to {self._max_bytes}"
            raise TooLargeError(message, code="file_too_large", param=source.field)
        if kind_of_media(content[:16]) is None:
            raise _refused(source.field, f"is no picture or video that is read here; allowed: {', '.join(MEDIA_TYPES)}")
        with self._store.writer(source_id) as writer:
            writer.write(content)
            return writer.publish()

    def _file(self, tenant: str, source: SourceOrder) -> FileRecord:
        assert source.file_id is not None
        try:
            file = self._files.get(tenant, source.file_id)
        except NotFoundError as error:
            raise NotFoundError(error.message, code=error.code, param=source.field) from None
        if file.size_bytes > self._max_bytes:
            message = f"{source.field}: has {file.size_bytes} bytes; allowed: up to {self._max_bytes}"
            raise TooLargeError(message, code="file_too_large", param=source.field)
        return file

    def _accept(self, tenant: str, values: dict[str, Any], kept: _Kept, kind: SourceKind, field: str) -> JobRecord:
        return self._jobs.accept(self._columns(tenant, values, kept, kind, field))

    def _columns(
        self, tenant: str, values: dict[str, Any], kept: _Kept, kind: SourceKind, field: str
    ) -> dict[str, Any]:
        # the row first: bytes that have none, and are as old as an earlier file, are swept away
        record = self._repository.add(kept.source_id, tenant=tenant, media=kept.media, written=kept.written)
        if kept.origin is not None:
            try:
                self._store.objects.copy(*kept.origin, self._store.key(kept.source_id))
            except FileNotFoundError:
                raise _gone(field) from None
        video = None if kept.video is None else kept.video.id
        return {**values, "source_kind": kind.value, "source_id": record.id, "source_video": video}


def _gone(field: str) -> NotFoundError:
    return NotFoundError(f"{field}: its file is missing on the server", code="content_missing", param=field)


def _refused(field: str, problem: str) -> RequestRefusedError:
    return RequestRefusedError(f"{field}: {problem}", param=field, code=f"invalid_{field}")
