"""Objects in a bucket of S3, or of a store that speaks its protocol. Loaded only where ``storage_url`` names one.

A PUT, and the completion of a multipart upload, makes an object visible at once and whole. Every part is sent with its
SHA-256, which the store compares with what has arrived. Ages are told by the store's own clock.
"""

import base64
import hashlib
import io
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from server.objects import FoundObject, GrowingObject, Objects, StorageFullError, StorageUnavailableError
from server.settings import Settings, SettingsError

__all__ = ["S3Objects", "s3_objects"]

PART_BYTES = 64 * 2**20
"""Larger objects are sent in parts of this size."""
_BUFFER_BYTES = 2**20
_SCRATCH_KEPT_S = 86_400.0
_FULL = {"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "507"}
_REFUSED = {"AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "Forbidden"}
_MISSING = {"NoSuchKey", "404", "NotFound"}


def s3_objects(settings: Settings, kind: str) -> "S3Objects":
    """Objects of a kind in the bucket of the settings.

    Raises:
        SettingsError: boto3 is not installed, or there are no credentials.
    """
    assert settings.storage_url is not None
    bucket, _, prefix = settings.storage_url.removeprefix("s3://").partition("/")
    root = "/".join(part for part in (prefix.strip("/"), kind) if part)
    secret = settings.s3_secret_access_key
    options = {
        "region": settings.s3_region,
        "key_id": settings.s3_access_key_id,
        "secret": None if secret is None else secret.get_secret_value(),
        "timeout_s": settings.s3_timeout_s,
    }
    client = _client(endpoint=settings.s3_endpoint_url, **options)
    public = settings.s3_public_endpoint_url
    is_linked = settings.s3_downloads == "redirect"
    scratch = settings.data_dir / "scratch" / kind
    _sweep(scratch)
    return S3Objects(
        client,
        bucket,
        root,
        scratch=scratch,
        link_client=None if not is_linked else client if public is None else _client(endpoint=public, **options),
        link_s=settings.s3_link_s,
    )


@lru_cache(maxsize=4)
def _client(
    *, endpoint: str | None, region: str | None, key_id: str | None, secret: str | None, timeout_s: float
) -> Any:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise SettingsError("MEDSORA_STORAGE_URL needs boto3: pip install 'medsora[s3]'") from None
    config = Config(
        connect_timeout=min(5.0, timeout_s),
        read_timeout=timeout_s,
        retries={"mode": "standard", "total_max_attempts": 3},
        # A bucket's name cannot be part of the host name of a store on one's own machines.
        s3={"addressing_style": "auto" if endpoint is None else "path"},
        signature_version="s3v4",
        # The SHA-256 of what is sent is computed here; stores other than Amazon's do not know the newer defaults.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        max_pool_connections=32,
    )
    try:
        session = boto3.session.Session(aws_access_key_id=key_id, aws_secret_access_key=secret, region_name=region)
        return session.client("s3", endpoint_url=endpoint, config=config)
    except (BotoCoreError, ValueError) as error:
        raise SettingsError(f"MEDSORA_STORAGE_URL: {error}") from None


def _sweep(scratch: Path) -> None:
    """Remove what a process that was killed has left of an upload long ago."""
    for path in scratch.rglob("*"):
        try:
            if path.is_file() and time.time() - path.stat().st_mtime > _SCRATCH_KEPT_S:
                path.unlink()
        except OSError:
            continue  # another process was faster


class S3Objects(Objects):
    """Objects whose keys begin with ``root`` in a bucket.

    Args:
        client: Of boto3.
        link_client: By which links are signed, with the address that clients know the store by; None: no links.
        link_s: Seconds for which a link is good.
    """

    def __init__(
        self, client: Any, bucket: str, root: str, *, scratch: Path, link_client: Any = None, link_s: int = 300
    ) -> None:
        super().__init__(scratch)
        self._client, self._bucket, self._root = client, bucket, root
        self._link_client, self._link_s = link_client, link_s

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": f"{self._root}/{key}"}

    def publish(self, staged: Mapping[Path, str]) -> None:
        for path, key in staged.items():
            with path.open("rb") as file, self._translated(key):
                if path.stat().st_size <= PART_BYTES:
                    self._put(key, file.read())
                else:
                    self._put_in_parts(key, file)
        for path in staged:
            path.unlink(missing_ok=True)

    def _put(self, key: str, content: bytes) -> None:
        checksum = _checksum(content)
        answer = self._client.put_object(**self._at(key), Body=content, ChecksumSHA256=checksum)
        if answer.get("ChecksumSHA256", checksum) != checksum:
            self._client.delete_object(**self._at(key))
            raise StorageUnavailableError(f"{key} arrived damaged in the bucket {self._bucket}")

    def _put_in_parts(self, key: str, file: BinaryIO) -> None:
        upload = self._client.create_multipart_upload(**self._at(key), ChecksumAlgorithm="SHA256")["UploadId"]
        try:
            parts: list[dict[str, Any]] = []
            while content := file.read(PART_BYTES):
                checksum = _checksum(content)
                number = len(parts) + 1
                answer = self._client.upload_part(
                    **self._at(key), UploadId=upload, PartNumber=number, Body=content, ChecksumSHA256=checksum
                )
                parts.append({"ETag": answer["ETag"], "PartNumber": number, "ChecksumSHA256": checksum})
            self._client.complete_multipart_upload(**self._at(key), UploadId=upload, MultipartUpload={"Parts": parts})
        except BaseException:
            self._client.abort_multipart_upload(**self._at(key), UploadId=upload)
            raise

    def size(self, key: str) -> int:
        with self._translated(key):
            return int(self._client.head_object(**self._at(key))["ContentLength"])

    def open(self, key: str) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(_Ranges(self, key, self.size(key)), _BUFFER_BYTES))

    def read(self, key: str, begin: int, end: int) -> bytes:
        """The bytes from ``begin`` up to but not ``end``, all of which must be there."""
        if begin >= end:
            return b""
        with self._translated(key):
            answer = self._client.get_object(**self._at(key), Range=f"bytes={begin}-{end - 1}")
            content = bytes(answer["Body"].read())
        if len(content) != end - begin:
            raise OSError(f"{key} is shorter than it was")
        return content

    @contextmanager
    def local(self, key: str) -> Iterator[Path]:
        size = self.size(key)
        with tempfile.NamedTemporaryFile(dir=self.stage("read").parent, prefix="read-") as copy:
            with self._translated(key):
                body = self._client.get_object(**self._at(key))["Body"]
                shutil.copyfileobj(body, copy, _BUFFER_BYTES)
            copy.flush()
            if copy.tell() != size:
                raise OSError(f"{key} has {copy.tell()} bytes, not {size}")
            yield Path(copy.name)

    def copy(self, origin: Objects, origin_key: str, key: str) -> None:
        if not isinstance(origin, S3Objects):
            raise TypeError(f"objects in a bucket are copied from a bucket, not from {type(origin).__name__}")
        with origin._translated(origin_key):
            self._client.copy_object(**self._at(key), CopySource=origin._at(origin_key))

    def remove(self, key: str) -> None:
        with self._translated(key):
            self._client.delete_object(**self._at(key))

    def remove_below(self, folder: str) -> None:
        for found in self.list(f"{folder}/"):
            self.remove(found.key)

    def list(self, prefix: str = "") -> Iterator[FoundObject]:
        token: dict[str, str] = {}
        while True:
            with self._translated(prefix):
                answer = self._client.list_objects_v2(Bucket=self._bucket, Prefix=f"{self._root}/{prefix}", **token)
            now = _now(answer)
            for entry in answer.get("Contents", ()):
                age_s = (now - entry["LastModified"]).total_seconds()
                key = entry["Key"].removeprefix(f"{self._root}/")
                yield FoundObject(key=key, size_bytes=entry["Size"], age_s=age_s)
            if not answer.get("IsTruncated"):
                return
            token = {"ContinuationToken": answer["NextContinuationToken"]}

    def grow(self, key: str) -> GrowingObject:
        return _Parts(self, key)

    def append(self, key: str, number: int, content: bytes) -> None:
        """Write a part of an object that grows."""
        with self._translated(key):
            self._put(f"{key}/{number:06d}", content)

    def follow(self, key: str) -> BinaryIO:
        reader = _Followed(self, key)
        if not reader.refresh():
            raise FileNotFoundError(key)
        return cast(BinaryIO, reader)

    def probe(self) -> None:
        key = f".probe-{time.time_ns():x}"
        with self._translated(key):
            self._put(key, b"probe")
            self._client.delete_object(**self._at(key))

    def sweep_unfinished(self, *, older_than_s: float) -> int:
        with self._translated(""):
            answer = self._client.list_multipart_uploads(Bucket=self._bucket, Prefix=f"{self._root}/")
            now = _now(answer)
            old = [
                upload
                for upload in answer.get("Uploads", ())
                if (now - upload["Initiated"]).total_seconds() > older_than_s
            ]
            for upload in old:
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        return len(old)

    def link(self, key: str, *, disposition: str | None, media_type: str) -> str | None:
        if self._link_client is None:
            return None
        parameters = {**self._at(key), "ResponseContentType": media_type, "ResponseCacheControl": "private, no-cache"}
        if disposition is not None:
            parameters["ResponseContentDisposition"] = disposition
        return str(self._link_client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=self._link_s))

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        """boto3's errors as those that :class:`Objects` promises."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in _MISSING and self._has_bucket():
                raise FileNotFoundError(key) from None
            if code in _FULL:
                raise StorageFullError(f"no room for {key} in the bucket {self._bucket}") from error
            raise StorageUnavailableError(self._explained(code, error)) from error
        except NoCredentialsError:
            raise StorageUnavailableError(
                "there are no credentials for the bucket: set MEDSORA_S3_ACCESS_KEY_ID and "
                "MEDSORA_S3_SECRET_ACCESS_KEY, or what boto3 reads (AWS_*, ~/.aws, the role of the machine)"
            ) from None
        except (BotoCoreError, HTTPError) as error:
            raise StorageUnavailableError(f"the bucket {self._bucket} does not answer: {error}") from error

    def _has_bucket(self) -> bool:
        """Whether what is missing is the object; a HEAD has no body that could tell."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._client.head_bucket(Bucket=self._bucket)
        except ClientError as error:
            return str(error.response.get("Error", {}).get("Code", "")) not in (*_MISSING, "NoSuchBucket")
        except BotoCoreError as error:
            raise StorageUnavailableError(f"the bucket {self._bucket} does not answer: {error}") from error
        return True

    def _explained(self, code: str, error: Exception) -> str:
        if code in _MISSING or code == "NoSuchBucket":
            return f"there is no bucket {self._bucket}: make it, or correct MEDSORA_STORAGE_URL"
        if code in _REFUSED:
            return (
                f"the bucket {self._bucket} refuses ({code}): check the credentials, and that they may list, read, "
                "write and delete objects"
            )
        return f"the bucket {self._bucket} failed: {error}"


class _Ranges(io.RawIOBase):
    """Reads an object by ranges."""

    def __init__(self, objects: S3Objects, key: str, size: int) -> None:
        self._objects, self._key, self._size = objects, key, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        content = self._objects.read(self._key, self._position, min(self._position + len(view), self._size))
        view[: len(content)] = content
        self._position += len(content)
        return len(content)

    def readall(self) -> bytes:  # else it would be asked for in pieces of 8 KiB
        content = self._objects.read(self._key, self._position, self._size)
        self._position += len(content)
        return content


class _Parts(GrowingObject):
    """Objects ``<key>/000001`` and so on: one cannot append to an object."""

    def __init__(self, objects: S3Objects, key: str) -> None:
        self._objects, self._key = objects, key
        self._number = 0
        self._pending = bytearray()

    def write(self, content: bytes) -> None:
        self._pending += content

    def flush(self) -> None:
        if self._pending:
            self._number += 1
            self._objects.append(self._key, self._number, bytes(self._pending))
            self._pending.clear()


class _Followed(io.RawIOBase):
    """All parts of a growing object in a row."""

    def __init__(self, objects: S3Objects, key: str) -> None:
        self._objects, self._key = objects, key
        self._parts: list[tuple[str, int]] = []
        self._size = self._position = 0

    def refresh(self) -> bool:
        """Look for more; returns whether there is anything at all."""
        known = len(self._parts)
        for found in list(self._objects.list(f"{self._key}/"))[known:]:
            if found.key != f"{self._key}/{len(self._parts) + 1:06d}":
                break
            self._parts.append((found.key, found.size_bytes))
            self._size += found.size_bytes
        return bool(self._parts)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 2:
            self.refresh()
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size:
            self.refresh()
        begin = 0
        for key, size in self._parts:
            if begin <= self._position < begin + size:
                view = memoryview(buffer).cast("B")
                first = self._position - begin
                content = self._objects.read(key, first, min(size, first + len(view)))
                view[: len(content)] = content
                self._position += len(content)
                return len(content)
            begin += size
        return 0


def _checksum(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


def _now(answer: dict[str, Any]) -> datetime:
    """The store's clock, as it was when it answered."""
    return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
