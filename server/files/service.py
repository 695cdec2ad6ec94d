"""The rules of files: what is taken, what a client may see, what deleting means."""

from dataclasses import dataclass

from server.errors import NotFoundError, RequestRefusedError, UnavailableError
from server.files.model import PURPOSES, UPLOAD_PURPOSES, is_file_id, new_file_id
from server.files.repository import FileRecord, FileRepository
from server.files.store import FileStore, FileWriter
from server.objects import Objects

__all__ = ["FilePage", "FileService", "Upload"]


@dataclass(frozen=True)
class FilePage:
    """A part of the list of files."""

    files: list[FileRecord]
    has_more: bool


class Upload:
    """A file that is being received: give it bytes, then :meth:`FileService.accept` it. A context manager."""

    def __init__(self, store: FileStore) -> None:
        self.file_id = new_file_id()
        self.writer: FileWriter = store.writer(self.file_id)

    def __enter__(self) -> "Upload":
        self.writer.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.__exit__(None, None, None)


class FileService:
    """Everything that the API does with files.

    Args:
        min_free_bytes: Free disk space below which no file is taken.
    """

    def __init__(self, repository: FileRepository, store: FileStore, *, min_free_bytes: int) -> None:
        self._repository = repository
        self._store = store
        self._min_free_bytes = min_free_bytes

    def begin(self) -> Upload:
        """Begin to receive a file.

        Raises:
            UnavailableError: Too little room on the disk.
        """
        if self._store.free_bytes() < self._min_free_bytes:
            raise UnavailableError(
                "There is too little free disk space to take files.", code="storage_full", retry_after_ms=10_000
            )
        return Upload(self._store)

    def accept(
        self, upload: Upload, *, tenant: str, purpose: str, filename: str, expires_after_s: int | None
    ) -> FileRecord:
        """Take a file that was received; when this returns, it is on disk.

        Raises:
            RequestRefusedError: Files are not uploaded for this purpose.
            StorageFullError: No room on the disk.
        """
        if purpose not in UPLOAD_PURPOSES:
            message = f"purpose: files are not taken for {purpose[:80]!r}; allowed: {', '.join(UPLOAD_PURPOSES)}"
            raise RequestRefusedError(message, param="purpose", code="invalid_purpose")
        written = upload.writer.publish()
        # After a crash between these lines nobody has the id; the sweeper removes the bytes.
        return self._repository.add(
            file_id=upload.file_id,
            tenant=tenant,
            purpose=purpose,
            filename=filename,
            written=written,
            expires_after_s=expires_after_s,
        )

    def get(self, tenant: str, file_id: str) -> FileRecord:
        """The file of that id.

        Raises:
            NotFoundError: The tenant has none (any more).
        """
        file = self._repository.get(tenant, file_id) if is_file_id(file_id) else None
        if file is None:
            raise _not_found(file_id)
        return file

    def origin(self, file: FileRecord) -> tuple[Objects, str]:
        """Root and key of the object that holds the bytes of a file."""
        return self._store.objects, self._store.key(file.id)

    def list(self, tenant: str, *, purpose: str | None, limit: int, after: str | None, newest_first: bool) -> FilePage:
        """A page of files behind the file ``after``.

        Raises:
            RequestRefusedError: ``after`` is no file of the tenant, or there is no such purpose.
        """
        if purpose is not None and purpose not in PURPOSES:
            message = f"purpose: there is no {purpose[:80]!r}; allowed: {', '.join(PURPOSES)}"
            raise RequestRefusedError(message, param="purpose", code="invalid_purpose")
        page = None
        if after is None or is_file_id(after):
            page = self._repository.page(tenant, purpose=purpose, limit=limit, after=after, newest_first=newest_first)
        if page is None:
            message = f"after: there is no file with the id {(after or '')[:80]!r}."
            raise RequestRefusedError(message, param="after", code="invalid_cursor")
        return FilePage(*page)

    def delete(self, tenant: str, file_id: str) -> None:
        """Remove a file. It is gone at once; a batch that still reads it is not disturbed.

        Raises:
            NotFoundError: The tenant has none (any more).
        """
        if not (is_file_id(file_id) and self._repository.delete(tenant, file_id)):
            raise _not_found(file_id)


def _not_found(file_id: str) -> NotFoundError:
    return NotFoundError(f"There is no file with the id {file_id[:80]!r}.", code="file_not_found", param="file_id")
