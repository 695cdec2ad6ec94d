"""The artifact store: whole files only, nothing left behind, nothing outside of its folder."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from server.jobs.model import new_job_id
from server.storage import ArtifactStore, StorageFullError, Variant, job_id_of


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


def accept(path: Path) -> None:
    assert path.is_file()


def write_bytes(content: bytes):  # type: ignore[no-untyped-def]
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_written_file_is_described_by_size_and_hash(store: ArtifactStore) -> None:
    job_id = new_job_id()
    info = store.write(job_id, 2, write_bytes(b"abc"), accept)
    assert (info.size_bytes, info.sha256) == (3, hashlib.sha256(b"abc").hexdigest())
    assert store.path(info.name).read_bytes() == b"abc"
    assert job_id_of(info.name) == job_id
    assert files_below(store.root) == [store.path(info.name)]


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
    assert files_below(store.root) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_leaves_nothing_and_has_its_own_error(store: ArtifactStore, number: int) -> None:
    def write(path: Path) -> None:
        path.write_bytes(b"half a file")
        raise OSError(number, os.strerror(number))

    with pytest.raises(StorageFullError, match="no room"):
        store.write(new_job_id(), 1, write, accept)
    assert files_below(store.root) == []
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
        store.path(name)
    with pytest.raises(ValueError, match="not the name of an artifact"):
        store.remove(name)


def test_job_ids_from_elsewhere_are_refused(store: ArtifactStore) -> None:
    with pytest.raises(ValueError, match="not a job id"):
        store.write("../x", 1, write_bytes(b"abc"), accept)


def test_removal_is_for_good_and_may_be_repeated(store: ArtifactStore) -> None:
    info = store.write(new_job_id(), 1, write_bytes(b"abc"), accept)
    store.remove(info.name)
    store.remove(info.name)
    assert files_below(store.root) == []


def test_attempts_of_one_job_are_removed_together(store: ArtifactStore) -> None:
    job_id, other = new_job_id(), new_job_id()
    names = [store.write(job_id, attempt, write_bytes(b"abc"), accept).name for attempt in (1, 2, 10)]
    kept = store.write(other, 1, write_bytes(b"abc"), accept).name
    store.path(names[0]).with_suffix(".part.mp4").write_bytes(b"x")
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
        assert store.path(video, variant) == store.path(name)
    assert seen == [
        f"{job_id}.1.thumbnail.part.webp",
        f"{job_id}.1.spritesheet.part.jpg",
        f"{job_id}.1.lossless.part.mkv",
    ]
    assert store.partial_path(job_id, 1, Variant.LOSSLESS).name == seen[2]
    store.path(video, Variant.THUMBNAIL).with_name(seen[0]).write_bytes(b"half")
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


def test_files_tell_job_attempt_and_age(store: ArtifactStore) -> None:
    job_id = new_job_id()
    info = store.write(job_id, 3, write_bytes(b"abc"), accept)
    path = store.path(info.name)
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 100))
    (path.parent / "foreign.txt").write_text("x")
    (file,) = store.files()
    assert (file.name, file.job_id, file.attempt, file.is_partial) == (info.name, job_id, 3, False)
    assert file.age_s == pytest.approx(100, abs=5)


def test_store_that_does_not_exist_yet(store: ArtifactStore) -> None:
    assert list(store.files()) == []
    assert store.free_bytes() > 0
