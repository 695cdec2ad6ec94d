"""Archives: read by the standard library and by the system's tools, and the same from whatever byte they are read."""

import io
import random
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest

from server.datasets.archive import Archive, FilePiece, Member, Run, combined_crc32


@pytest.fixture
def members(tmp_path: Path) -> list[Member]:
    """A file of two parts, a literal of two pieces, one with a long name, and an empty one."""
    content = random.Random(0).randbytes(700_000)
    (tmp_path / "file").write_bytes(content)
    first, second = content[:1234], content[1234:]
    pieces = [
        FilePiece(partial((tmp_path / "file").open, "rb"), 0, len(first), zlib.crc32(first)),
        FilePiece(partial((tmp_path / "file").open, "rb"), len(first), len(second), zlib.crc32(second)),
    ]
    return [
        Member.of("a/first.bin", *pieces[:1]),
        Member.of("a/second.bin", *pieces[1:]),
        Member.of("both.bin", b"head", *pieces, b"tail"),
        Member("runs.bin", (Run.of(lambda: [b"head", pieces[0]]), Run.of(list), Run.of(lambda: [pieces[1], b"tail"]))),
        Member.of("x" * 150 + "/é.txt", b"one", b"two"),
        Member.of("empty"),
    ]


def _read(piece: FilePiece) -> bytes:
    with piece.open() as file:
        return file.read()[piece.offset :][: piece.size]


def _contents(members: Iterable[Member]) -> dict[str, bytes]:
    found = {}
    for member in members:
        found[member.name] = b"".join(piece if isinstance(piece, bytes) else _read(piece) for piece in member.pieces())
    return found


def _groups(members: list[Member]) -> list[Callable[[], list[Member]]]:
    """Several at once, and one by itself."""
    return [lambda: members[:2], lambda: members[2:5], list[Member], lambda: members[5:]]


def test_zip(members: list[Member]) -> None:
    archive = Archive("zip", _groups(members))
    content = b"".join(archive.read(0, archive.size()))
    assert len(content) == archive.size()
    with zipfile.ZipFile(io.BytesIO(content)) as read:
        assert read.testzip() is None
        assert {name: read.read(name) for name in read.namelist()} == _contents(members)


def test_tar(members: list[Member]) -> None:
    archive = Archive("tar", _groups(members))
    content = b"".join(archive.read(0, archive.size()))
    assert len(content) == archive.size()
    assert len(content) % tarfile.RECORDSIZE == 0
    with tarfile.open(fileobj=io.BytesIO(content)) as read:
        found = {info.name: read.extractfile(info).read() for info in read}  # type: ignore[union-attr]
    assert found == _contents(members)


@pytest.mark.parametrize("container", ["zip", "tar"])
def test_any_range_is_that_part_of_the_whole(members: list[Member], container: str) -> None:
    archive = Archive(container, _groups(members))
    size = archive.size()
    whole = b"".join(archive.read(0, size))
    drawn = random.Random(1)
    for _ in range(200):
        begin, end = sorted((drawn.randrange(size + 1), drawn.randrange(size + 1)))
        assert b"".join(archive.read(begin, end)) == whole[begin:end]
    for begin in range(600):
        assert b"".join(archive.read(begin, begin + 1)) == whole[begin : begin + 1]


def test_many_members_need_the_records_for_large_archives() -> None:
    archive = Archive("zip", [lambda: (Member.of(f"{number}") for number in range(65_600))])
    content = b"".join(archive.read(0, archive.size()))
    with zipfile.ZipFile(io.BytesIO(content)) as read:
        assert len(read.namelist()) == 65_600


def test_members_of_more_than_four_gigabytes(tmp_path: Path) -> None:
    """Nothing of them is read: the file is a hole, and only what is around it is looked at."""
    path, size = tmp_path / "hole", 2**32 + 5
    with path.open("wb") as file:
        file.truncate(size)
    pieces = [FilePiece(partial(path.open, "rb"), 0, size, 0)]
    members = [Member.of("large", *pieces), Member.of("behind", b"it")]
    archive = Archive("zip", [lambda: members])
    total = archive.size()
    tail = b"".join(archive.read(size, total))

    class Sparse(io.RawIOBase):
        """The archive, of which only what is asked for is made."""

        position = 0

        def seekable(self) -> bool:
            return True

        def readable(self) -> bool:
            return True

        def tell(self) -> int:
            return self.position

        def seek(self, offset: int, whence: int = 0) -> int:
            self.position = offset + (0, self.position, total)[whence]
            return self.position

        def read(self, count: int = -1) -> bytes:
            end = total if count < 0 else min(total, self.position + count)
            begin, self.position = self.position, end
            return tail[begin - size : end - size] if begin >= size else b"".join(archive.read(begin, end))

    with zipfile.ZipFile(Sparse()) as read:  # type: ignore[call-overload]
        assert [info.file_size for info in read.infolist()] == [size, 2]
        assert read.read("behind") == b"it"
        with read.open("large") as large:
            assert large.read(100) == bytes(100)


@pytest.mark.parametrize("container", ["zip", "tar"])
def test_a_range_lists_only_the_groups_that_it_covers(container: str) -> None:
    """Whatever lies in front of it, and however much: the cost of a range is that of what is in it."""
    listed: list[int] = []

    def group(number: int) -> list[Member]:
        listed.append(number)
        return [Member.of(f"{number}-{one}", bytes([one]) * 5000) for one in range(4)]

    archive = Archive(container, [partial(group, number) for number in range(100)])
    assert listed == list(range(100))
    whole = b"".join(archive.read(0, archive.size()))
    place = whole.index(b"50-0")
    listed.clear()
    assert b"".join(archive.read(place, place + 6000)) == whole[place : place + 6000]
    assert listed == [50]
    listed.clear()
    long = Member("long", tuple(Run.of(partial(lambda n: [listed.append(n) or b"x" * 1000], n)) for n in range(100)))
    archive = Archive(container, [lambda: [long]])
    listed.clear()
    assert b"".join(archive.read(60_000, 62_000)) == b"x" * 2000
    assert len(listed) in (2, 3)  # its header stands in front, so its runs begin anywhere


def test_what_has_gone_meanwhile_is_noticed() -> None:
    there = [Member.of("a", b"1"), Member.of("b", b"2")]
    archive = Archive("zip", [lambda: list(there)])
    there.pop()
    with pytest.raises(OSError, match="gone"):
        list(archive.read(0, archive.size()))


def test_a_file_that_was_cut_off_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"short")
    pieces = [FilePiece(partial((tmp_path / "file").open, "rb"), 0, 10, 0)]
    archive = Archive("tar", [lambda: [Member.of("a", *pieces)]])
    with pytest.raises(OSError, match="shorter"):
        list(archive.read(0, archive.size()))


def test_checksums_of_stretches_add_up() -> None:
    drawn = random.Random(2)
    for size in (0, 1, 2, 3, 255, 4096, 100_003):
        first, second = drawn.randbytes(77), drawn.randbytes(size)
        assert combined_crc32(zlib.crc32(first), zlib.crc32(second), size) == zlib.crc32(first + second)
