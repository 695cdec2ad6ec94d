"""Objects keep the same promises in a folder and in a bucket; and what a bucket does when it is ill."""

import base64
import hashlib
import http.client
import io
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from s3_server import S3Server

from medsora.files import sync
from server import s3
from server.objects import LocalObjects, Objects, StorageFullError, StorageUnavailableError, objects_of
from server.s3 import S3Objects
from server.settings import Settings, SettingsError

MakeObjects = Callable[..., Objects]


@pytest.fixture(params=["folder", "bucket"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> MakeObjects:
    """Make objects of a kind, all in one data folder and one bucket."""
    if request.param == "folder":
        return lambda kind="artifacts": objects_of(Settings(data_dir=tmp_path), kind)
    server: S3Server = request.getfixturevalue("s3_server")
    bucket = server.make_bucket()
    return lambda kind="artifacts": objects_of(Settings(data_dir=tmp_path, **server.settings(bucket)), kind)


@pytest.fixture
def bucket(s3_server: S3Server, tmp_path: Path) -> Callable[..., S3Objects]:
    """Make objects in a new bucket, with settings of a test's own."""
    name = s3_server.make_bucket()

    def make_one(**changes: Any) -> S3Objects:
        settings = Settings(data_dir=tmp_path, **{**s3_server.settings(name), **changes})
        made = objects_of(settings, "files")
        assert isinstance(made, S3Objects)
        return made

    return make_one


def put(objects: Objects, key: str, content: bytes) -> None:
    path = objects.stage(f"{key}.part")
    path.write_bytes(content)
    sync(path)
    objects.publish({path: key})
    assert not path.exists()


def test_an_object_is_there_when_it_is_published(make: MakeObjects) -> None:
    objects = make()
    path = objects.stage("ab/one.part")
    path.write_bytes(b"0123456789")
    with pytest.raises(FileNotFoundError):
        objects.size("ab/one")
    objects.publish({path: "ab/one"})
    assert objects.size("ab/one") == 10
    with objects.open("ab/one") as file:
        assert file.read() == b"0123456789"
        file.seek(4)
        assert file.read(3) == b"456"
        assert file.seek(0, 2) == 10
        assert file.read() == b""
    with objects.local("ab/one") as local:
        assert local.read_bytes() == b"0123456789"


def test_an_empty_object(make: MakeObjects) -> None:
    objects = make()
    put(objects, "empty", b"")
    with objects.open("empty") as file:
        assert file.read() == b""
    with objects.local("empty") as local:
        assert local.read_bytes() == b""


def test_what_is_not_there_says_so(make: MakeObjects) -> None:
    objects = make()
    with pytest.raises(FileNotFoundError):
        objects.size("ab/none")
    with pytest.raises(FileNotFoundError):
        objects.open("ab/none")
    with pytest.raises(FileNotFoundError), objects.local("ab/none"):
        pytest.fail("there is none")
    with pytest.raises(FileNotFoundError):
        objects.follow("ab/none")
    with pytest.raises(FileNotFoundError):
        objects.copy(objects, "ab/none", "ab/other")
    objects.remove("ab/none")
    objects.remove_below("ab")
    assert list(objects.list()) == []


def test_lists_and_removes_by_prefix(make: MakeObjects) -> None:
    objects = make()
    for key in ("ab/x.1", "ab/x.10", "ab/y.1", "cd/e/x.1"):
        put(objects, key, b"abc")
    assert [found.key for found in objects.list()] == ["ab/x.1", "ab/x.10", "ab/y.1", "cd/e/x.1"]
    assert [found.key for found in objects.list("ab/x.")] == ["ab/x.1", "ab/x.10"]
    assert {(found.size_bytes, -2 < found.age_s < 60) for found in objects.list()} == {(3, True)}
    objects.remove("ab/x.10")
    objects.remove_below("cd")
    assert [found.key for found in objects.list()] == ["ab/x.1", "ab/y.1"]


def test_a_copy_outlives_its_origin(make: MakeObjects) -> None:
    files, sources = make("files"), make("sources")
    put(files, "ab/one", b"bytes")
    sources.copy(files, "ab/one", "cd/two")
    files.remove("ab/one")
    with sources.open("cd/two") as file:
        assert file.read() == b"bytes"
    assert list(files.list()) == []


def test_what_grows_can_be_followed(make: MakeObjects) -> None:
    objects = make()
    with objects.grow("ab/live") as growing:
        growing.write(b"abc")
        growing.write(b"def")
        growing.flush()
        with objects.follow("ab/live") as follower:
            assert follower.seek(0, 2) == 6
            follower.seek(1)
            assert follower.read(100) == b"bcdef"
            growing.write(b"ghi")
            growing.flush()
            assert follower.read(2) == b"gh"
            assert follower.read(100) == b"i"
            assert follower.read(100) == b""


def test_a_probe_leaves_nothing(make: MakeObjects) -> None:
    objects = make()
    objects.probe()
    assert list(objects.list()) == []
    assert objects.free_bytes() > 0


def test_large_objects_go_in_parts(bucket: Callable[..., S3Objects], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)  # the least that S3 allows
    objects = bucket()
    content = bytes(range(256)) * (7 * 4096)
    put(objects, "ab/large", content)
    assert objects.size("ab/large") == len(content) == 7 * 2**20
    with objects.open("ab/large") as file:
        assert file.read() == content


def test_an_upload_that_breaks_off_leaves_nothing(
    bucket: Callable[..., S3Objects], s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    objects = bucket()
    monkeypatch.setattr(s3, "_checksum", lambda content: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        put(objects, "ab/large", bytes(6 * 2**20))
    assert list(objects.list()) == []
    name = objects._bucket
    assert "Uploads" not in s3_server.client().list_multipart_uploads(Bucket=name)
    # and one whose process was killed is swept away when it is old
    s3_server.client().create_multipart_upload(Bucket=name, Key="medsora/files/ab/left")
    assert objects.sweep_unfinished(older_than_s=1e12) == 0  # this server says that all began in 2010
    assert objects.sweep_unfinished(older_than_s=3600) == 1
    assert "Uploads" not in s3_server.client().list_multipart_uploads(Bucket=name)


def test_every_upload_carries_its_checksum(bucket: Callable[..., S3Objects], monkeypatch: pytest.MonkeyPatch) -> None:
    objects = bucket()
    sums = []

    def watch(request: Any, **_: Any) -> None:
        sums.append(request.headers["x-amz-checksum-sha256"])

    objects._client.meta.events.register("before-send.s3.PutObject", watch)
    try:
        put(objects, "ab/one", b"abc")
    finally:
        objects._client.meta.events.unregister("before-send.s3.PutObject", watch)
    (sent,) = sums
    assert base64.b64decode(sent) == hashlib.sha256(b"abc").digest()
    # a store that keeps other bytes than it was sent says so by their checksum
    monkeypatch.setattr(objects._client, "put_object", lambda **_: {"ChecksumSHA256": "A" * 43 + "="})
    with pytest.raises(StorageUnavailableError, match="arrived damaged"):
        put(objects, "ab/two", b"abc")


def test_links_are_signed_for_a_while_and_name_the_file(bucket: Callable[..., S3Objects], s3_server: S3Server) -> None:
    assert bucket().link("x", disposition=None, media_type="video/mp4") is None, "clients go through the API"
    objects = bucket(s3_downloads="redirect", s3_link_s=60)
    put(objects, "ab/one", b"0123456789")
    link = objects.link("ab/one", disposition='attachment; filename="a b.mp4"', media_type="video/mp4")
    assert link is not None
    assert urllib.parse.parse_qs(urllib.parse.urlsplit(link).query)["X-Amz-Expires"] == ["60"]
    answer = get(link, {"Range": "bytes=2-4"})
    assert (answer.status, answer.read()) == (206, b"234")
    assert answer.headers["content-type"] == "video/mp4"
    assert answer.headers["content-disposition"] == 'attachment; filename="a b.mp4"'
    elsewhere = bucket(s3_downloads="redirect", s3_public_endpoint_url="http://files.example.org")
    link = elsewhere.link("ab/one", disposition=None, media_type="video/mp4")
    assert link is not None
    assert link.startswith("http://files.example.org/")


def get(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=30)
    connection.request("GET", f"{parts.path}?{parts.query}", headers=headers)
    return connection.getresponse()


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port where one is connected and never answered."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        taken: list[socket.socket] = []

        def take() -> None:
            while True:
                try:
                    taken.append(listener.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)
    for connection in taken:
        connection.close()


def fails_everywhere(objects: Objects, match: str) -> None:
    """Every use tells of the store, and none takes its failure for a missing object."""
    path = objects.stage("x.part")
    path.write_bytes(b"x")
    for use in (
        lambda: objects.publish({path: "ab/one"}),
        lambda: objects.size("ab/one"),
        lambda: objects.open("ab/one"),
        lambda: list(objects.list()),
        lambda: objects.remove("ab/one"),
        objects.probe,
    ):
        with pytest.raises(StorageUnavailableError, match=match):
            use()
    assert path.exists(), "what was made is not lost by that"


def test_a_store_that_is_down(bucket: Callable[..., S3Objects]) -> None:
    fails_everywhere(bucket(s3_endpoint_url="http://127.0.0.1:1"), "does not answer")


def test_a_store_that_is_silent(bucket: Callable[..., S3Objects], silent_port: int) -> None:
    objects = bucket(s3_endpoint_url=f"http://127.0.0.1:{silent_port}", s3_timeout_s=0.5)
    with pytest.raises(StorageUnavailableError, match="does not answer"):
        objects.size("ab/one")


class _Body(io.BytesIO):
    """What boto3 reads an answer from."""

    def stream(self, **_: Any) -> Iterator[bytes]:
        yield self.read()


@pytest.mark.parametrize("code", ["QuotaExceeded", "XMinioStorageFull"])
def test_a_bucket_that_is_full(bucket: Callable[..., S3Objects], code: str) -> None:
    objects = bucket()

    def refuse(request: Any, **_: Any) -> AWSResponse:
        body = f"<Error><Code>{code}</Code><Message>no room</Message></Error>".encode()
        return AWSResponse(request.url, 507, {"content-type": "application/xml"}, _Body(body))

    objects._client.meta.events.register("before-send.s3.PutObject", refuse)
    try:
        with pytest.raises(StorageFullError, match="no room for ab/one"):
            put(objects, "ab/one", b"abc")
    finally:
        objects._client.meta.events.unregister("before-send.s3.PutObject", refuse)
    assert list(objects.list()) == []


def test_a_bucket_that_does_not_exist(bucket: Callable[..., S3Objects]) -> None:
    fails_everywhere(bucket(storage_url="s3://not-there"), "there is no bucket not-there: make it, or correct")


def test_a_bucket_that_refuses(bucket: Callable[..., S3Objects], s3_server: S3Server) -> None:
    objects = bucket()
    s3_server.refuse(everything=True)
    try:
        fails_everywhere(objects, "refuses .*check the credentials")
    finally:
        s3_server.refuse(everything=False)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"storage_url": "gs://bucket"}, "storage_url"),
        ({"storage_url": "s3://Not_A_Bucket"}, "storage_url"),
        ({"storage_url": "s3://bucket", "s3_access_key_id": "x"}, "must be set together"),
        ({"storage_url": "s3://bucket", "s3_downloads": "link"}, "s3_downloads"),
    ],
)
def test_settings_that_do_not_do(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Settings(**fields)


def test_without_boto3_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "boto3", None)
    s3._client.cache_clear()
    with pytest.raises(SettingsError, match=r"medsora\[s3\]"):
        objects_of(Settings(data_dir=tmp_path, storage_url="s3://bucket"), "files")


def test_folders_and_buckets_do_not_mix(bucket: Callable[..., S3Objects], tmp_path: Path) -> None:
    folder = LocalObjects(tmp_path / "x")
    with pytest.raises(TypeError, match="from a folder"):
        folder.copy(bucket(), "a", "b")
    with pytest.raises(TypeError, match="from a bucket"):
        bucket().copy(folder, "a", "b")
