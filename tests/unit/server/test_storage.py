"""The artifact store: whole files only, nothing left behind, nothing outside of its folder."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
from s3_server import S3Server

from server.jobs.model import new_job_id
from server.objects import LocalObjects, objects_of
from server.settings import Settings
from server.storage import ArtifactStore, StorageFullError, Variant, job_id_of


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    """A store of either kind: both must keep every promise."""
    if request.param == "folder":
        return ArtifactStore(tmp_path / "artifacts")
    server: S3Server = request.getfixturevalue("s3_server")
    return ArtifactStore(objects_of(Settings(data_dir=tmp_path, **server.settings(server.make_bucket())), "artifacts"))


def accept(path: Path) -> None:
    assert path.is_file()


def write_bytes(content: bytes):  # type: ignore[no-untyped-def]
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def keys(store: ArtifactStore) -> list[str]:
    """Of all objects; and nothing may be left of what was written first."""
    found = [one.key for one in store.objects.list()]
    if not isinstance(store.objects, LocalObjects):
        scratch = store.objects.stage("x").parent
        assert [path for path in scratch.rglob("*") if path.is_file()] == []
    return found


def content(store: ArtifactStore, name: str) -> bytes:
    with store.objects.open(store.key(name)) as file:
        return file.read()


def test_written_file_is_described_by_size_and_hash(store: ArtifactStore) -> None:
    job_id = new_job_id()
    info = store.write(job_id, 2, write_bytes(b"abc"), accept)
    assert (info.size_bytes, info.sha256) == (3, hashlib.sha256(b"abc").hexdigest())
    assert content(store, info.name) == b"abc"
    assert job_id_of(info.name) == job_id
    assert keys(store) == [info.name]


def test_file_is_checked_under_its_temporary_name(store: ArtifactStore) -> None:
    job_id = new_job_id()
    seen: list[str] = []
    store.write(job_id, 1, write_bytes(b"abc"), lambda path: seen.append(path.name))
    assert seen == [f"{job_id}.1.part.mp4"]


def test_refused_file_leaves_nothing(store: ArtifactStore) -> None:
    def refuse(path: Path) -> None:
        raise ValueError("too few frames")

    with pytest.raises(ValueError, match="too few frames"):
        store.write(new_job_id(), 1, write_bytes(b"abc"), refuse)
    assert keys(store) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_leaves_nothing_and_has_its_own_error(store: ArtifactStore, number: int) -> None:
    def write(path: Path) -> None:
        path.write_bytes(b"half a file")
        raise OSError(number, os.strerror(number))

    with pytest.raises(StorageFullError, match="no room"):
        store.write(new_job_id(), 1, write, accept)
    assert keys(store) == []
    assert store.write(new_job_id(), 1, write_bytes(b"next"), accept).size_bytes == 4


def test_full_disk_is_recognised_as_the_cause_of_another_error(store: ArtifactStore) -> None:
    def write(path: Path) -> None:
        try:
            raise OSError(errno.ENOSPC, "full")
        except OSError as error:
            raise RuntimeError("encoder failed") from error

    with pytest.raises(StorageFullError):
        store.write(new_job_id(), 1, write, accept)


def test_other_errors_go_through(store: ArtifactStore) -> None:
    def write(path: Path) -> None:
        raise PermissionError(errno.EACCES, "no")

    with pytest.raises(PermissionError):
        store.write(new_job_id(), 1, write, accept)


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "ab/../cd", "ab/video_x.1.mp4", "", "ab/video_" + "0" * 32 + ".1.mp4\n"],
)
def test_names_from_elsewhere_are_refused(store: ArtifactStore, name: str) -> None:
    with pytest.raises(ValueError, match="not the name of an artifact"):
        store.key(name)
    with pytest.raises(ValueError, match="not the name of an artifact"):
        store.remove(name)


def test_job_ids_from_elsewhere_are_refused(store: ArtifactStore) -> None:
    with pytest.raises(ValueError, match="not a job id"):
        store.write("../x", 1, write_bytes(b"abc"), accept)


def put(store: ArtifactStore, key: str) -> None:
    """An object that the store did not write."""
    path = store.objects.stage("foreign")
    path.write_bytes(b"x")
    store.objects.publish({path: key})


def test_removal_is_for_good_and_may_be_repeated(store: ArtifactStore) -> None:
    info = store.write(new_job_id(), 1, write_bytes(b"abc"), accept)
    store.remove(info.name)
    store.remove(info.name)
    assert keys(store) == []


def test_attempts_of_one_job_are_removed_together(store: ArtifactStore) -> None:
    job_id, other = new_job_id(), new_job_id()
    names = [store.write(job_id, attempt, write_bytes(b"abc"), accept).name for attempt in (1, 2, 10)]
    kept = store.write(other, 1, write_bytes(b"abc"), accept).name
    put(store, names[0].replace(".mp4", ".part.mp4"))
    store.remove_attempts(job_id, before=2)
    assert {file.name for file in store.files()} == {names[1], names[2], kept}
    store.remove_attempts(job_id)
    assert {file.name for file in store.files()} == {kept}


def test_stills_lie_beside_their_video_and_go_with_it(store: ArtifactStore) -> None:
    job_id, other = new_job_id(), new_job_id()
    seen: list[str] = []
    video = store.write(job_id, 1, write_bytes(b"v"), accept).name
    for variant in (Variant.THUMBNAIL, Variant.SPRITESHEET, Variant.LOSSLESS):
        name = store.write(
            job_id, 1, write_bytes(b"x"), lambda path: seen.append(path.name) or accept(path), variant=variant
        ).name
        assert store.key(video, variant) == name
    assert seen == [
        f"{job_id}.1.thumbnail.part.webp",
        f"{job_id}.1.spritesheet.part.jpg",
        f"{job_id}.1.lossless.part.mkv",
    ]
    assert store.partial_path(job_id, 1, Variant.LOSSLESS).name == seen[2]
    put(store, f"{video[:2]}/{seen[0]}")
    assert {file.video for file in store.files()} == {video}
    assert [file.is_partial for file in store.files()].count(True) == 1
    kept = [
        store.write(job_id, 11, write_bytes(b"v"), accept).name,
        store.write(other, 1, write_bytes(b"v"), accept).name,
    ]
    store.remove_attempt(job_id, 1)
    assert {file.name for file in store.files()} == set(kept)
    store.write(job_id, 11, write_bytes(b"x"), accept, variant=Variant.THUMBNAIL)
    store.remove_attempts(job_id)
    assert {file.name for file in store.files()} == {kept[1]}


def test_files_tell_job_and_attempt(store: ArtifactStore) -> None:
    job_id = new_job_id()
    info = store.write(job_id, 3, write_bytes(b"abc"), accept)
    put(store, f"{info.name[:2]}/foreign.txt")
    (file,) = store.files()
    assert (file.name, file.job_id, file.attempt, file.is_partial) == (info.name, job_id, 3, False)
    assert -2 < file.age_s < 60


def test_files_tell_their_age(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    path = store.path(store.write(new_job_id(), 3, write_bytes(b"abc"), accept).name)
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 100))
    (file,) = store.files()
    assert file.age_s == pytest.approx(100, abs=5)


def test_store_that_does_not_exist_yet(store: ArtifactStore) -> None:
    assert list(store.files()) == []
    assert store.free_bytes() > 0
