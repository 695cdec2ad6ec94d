"""Archives whose every byte can be computed: ZIP without compression, or TAR, from files that stay where they are.

An archive is made of groups of members. When it is made, all groups are listed once, and of each only its size and
place is kept: the index. To send bytes from the middle, the stretches that hold them are listed again, and nothing in
front of them. Nothing else is held but the piece at hand.
"""

import struct
import tarfile
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

__all__ = ["CONTAINERS", "Archive", "FilePiece", "Group", "Member", "Piece", "Run", "combined_crc32", "tar_member"]

CONTAINERS = {"zip": "application/zip", "tar": "application/x-tar"}
_CHUNK = 256 * 1024
_EARLIEST = (1980, 1, 1, 0, 0, 0)
_MODE = 0o100644
_LIMIT_32, _LIMIT_16 = 0xFFFFFFFF, 0xFFFF
_ZIP64_VERSION = 45


@dataclass(frozen=True)
class FilePiece:
    """Bytes of a file that is kept elsewhere."""

    open: Callable[[], BinaryIO]
    offset: int
    size: int
    crc32: int


Piece = bytes | FilePiece
Pieces = Callable[[], Iterable[Piece]]
Group = Callable[[], Iterable["Member"]]
_Wrapping = Callable[["Member"], bytes]


@dataclass(frozen=True)
class Run:
    """A stretch of bytes that is measured, and listed only when it is to be sent."""

    size: int
    crc32: int
    pieces: Pieces
    """The same bytes whenever it is called."""

    @classmethod
    def of(cls, pieces: Pieces, *, now: Iterable[Piece] | None = None) -> "Run":
        """A run of these pieces, which are listed once to be measured.

        Args:
            now: What ``pieces`` would list, where that is at hand.
        """
        size = checksum = 0
        for piece in pieces() if now is None else now:
            length, its_checksum = _measures(piece)
            checksum = combined_crc32(checksum, its_checksum, length)
            size += length
        return cls(size, checksum, pieces)


@dataclass(frozen=True)
class Member:
    """A file of an archive."""

    name: str
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, name: str, *pieces: Piece) -> "Member":
        """A member of a few pieces that are at hand."""
        return cls(name, (Run.of(lambda: pieces),))

    @property
    def size(self) -> int:
        """Bytes in it."""
        return sum(run.size for run in self.runs)

    @property
    def crc32(self) -> int:
        """Checksum of all of it."""
        checksum = 0
        for run in self.runs:
            checksum = combined_crc32(checksum, run.crc32, run.size)
        return checksum

    def pieces(self) -> Iterator[Piece]:
        """All of its bytes."""
        for run in self.runs:
            yield from run.pieces()


class Archive:
    """A ZIP or TAR of these members, which are all listed once now.

    Args:
        container: Of :data:`CONTAINERS`.
        groups: Each lists some members, the same ones whenever it is called. Whoever asks for a byte of a group has it
            listed up to that byte; of a member of several runs, only the run.
    """

    def __init__(self, container: str, groups: Iterable[Group]) -> None:
        self._begins: list[int] = []
        """Where each stretch begins."""
        self._stretches: list[Pieces] = []
        self._size = 0
        {"zip": self._lay_zip, "tar": self._lay_tar}[container](groups)

    def size(self) -> int:
        """Bytes of the whole archive."""
        return self._size

    def read(self, begin: int, end: int) -> Iterator[bytes]:
        """The bytes from ``begin`` up to but not ``end``, which lie within the archive.

        Raises:
            OSError: A file is gone, or shorter than it was; or rows are.
        """
        number = bisect_right(self._begins, begin) - 1
        while number < len(self._begins) and self._begins[number] < end:
            position = self._begins[number]
            number += 1
            until = self._begins[number] if number < len(self._begins) else self._size
            for piece in self._stretches[number - 1]():
                if position >= min(until, end):
                    break
                size = len(piece) if isinstance(piece, bytes) else piece.size
                first, last = max(begin - position, 0), min(end - position, size)
                position += size
                if first >= last:
                    continue
                if isinstance(piece, bytes):
                    yield piece[first:last]
                else:
                    yield from _read_file(piece, first, last)
            if position < min(until, end):
                raise OSError("what the archive was made of has gone")

    def _lay(self, size: int, pieces: Pieces) -> None:
        if size:
            self._begins.append(self._size)
            self._stretches.append(pieces)
            self._size += size

    def _lay_members(self, group: Group, members: list[Member], before: _Wrapping, after: _Wrapping) -> None:
        """Members as they stand in the archive: those of several runs one by one, else all as one stretch."""
        if all(len(member.runs) == 1 for member in members):
            size = sum(len(before(member)) + member.size + len(after(member)) for member in members)
            self._lay(size, lambda: _wrapped(group(), before, after))
            return
        for member in members:
            first, last = before(member), after(member)
            self._lay(len(first), partial(list, [first]))
            for run in member.runs:
                self._lay(run.size, run.pieces)
            self._lay(len(last), partial(list, [last]))

    def _lay_tar(self, groups: Iterable[Group]) -> None:
        for group in groups:
            self._lay_members(group, list(group()), _tar_header, _tar_padding)
        # two blocks of zeros, and then up to a whole record, as tar itself writes
        end = b"\0" * (2 * tarfile.BLOCKSIZE + -(self._size + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE)
        self._lay(len(end), lambda: [end])

    def _lay_zip(self, groups: Iterable[Group]) -> None:
        directory: list[tuple[int, Pieces]] = []
        count = 0
        for group in groups:
            members, offset = list(group()), self._size
            size = sum(len(entry) for entry in _directory(members, offset))
            directory.append((size, partial(_directory_of, group, offset)))
            self._lay_members(group, members, _local_header, _nothing)
            count += len(members)
        begin = self._size
        for size, entries in directory:
            self._lay(size, entries)
        end = _directory_end(count, self._size - begin, begin)
        self._lay(len(end), lambda: [end])


def tar_member(member: Member) -> Iterator[Piece]:
    """A member as it stands in a TAR: header, content, padding."""
    return _wrapped([member], _tar_header, _tar_padding)


def _wrapped(members: Iterable[Member], before: _Wrapping, after: _Wrapping) -> Iterator[Piece]:
    for member in members:
        yield before(member)
        yield from member.pieces()
        yield after(member)


def _tar_padding(member: Member) -> bytes:
    return b"\0" * (-member.size % tarfile.BLOCKSIZE)


def _nothing(member: Member) -> bytes:
    return b""


def _directory(members: Iterable[Member], offset: int) -> Iterator[bytes]:
    """Entries of the central directory for members that lie in the archive from ``offset`` on."""
    for member in members:
        yield _directory_entry(member, offset)
        offset += len(_local_header(member)) + member.size


def _directory_of(group: Group, offset: int) -> Iterator[bytes]:
    return _directory(group(), offset)


def _tar_header(member: Member) -> bytes:
    info = tarfile.TarInfo(member.name)
    info.size, info.mode = member.size, 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def combined_crc32(first: int, second: int, second_size: int) -> int:
    """CRC-32 of two stretches of bytes behind one another, from theirs and the size of the second.

    Bytes of zero turn a checksum linearly, bit by bit: so their effect is a matrix, which is squared for twice as many.

    >>> combined_crc32(zlib.crc32(b"ab"), zlib.crc32(b"cde"), 3) == zlib.crc32(b"abcde")
    True
    """
    if second_size == 0 or first == 0:
        return second if second_size else first
    checksum = first
    for power in range(second_size.bit_length()):
        if second_size >> power & 1:
            checksum = _times(_zeros_matrix(power), checksum)
    return checksum ^ second


_MATRICES: list[tuple[int, ...]] = []


def _zeros_matrix(power: int) -> tuple[int, ...]:
    """What 2**power bytes of zero make of a checksum, by its bits."""
    if not _MATRICES:
        one_bit = (0xEDB88320, *(1 << bit for bit in range(31)))
        two_bits = _squared(one_bit)
        _MATRICES.append(_squared(_squared(two_bits)))
    while len(_MATRICES) <= power:
        _MATRICES.append(_squared(_MATRICES[-1]))
    return _MATRICES[power]


def _squared(matrix: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(_times(matrix, column) for column in matrix)


def _times(matrix: tuple[int, ...], vector: int) -> int:
    result = place = 0
    while vector:
        if vector & 1:
            result ^= matrix[place]
        vector >>= 1
        place += 1
    return result


def _measures(piece: Piece) -> tuple[int, int]:
    """Size and checksum of a piece."""
    if isinstance(piece, bytes):
        return len(piece), zlib.crc32(piece)
    return piece.size, piece.crc32


def _read_file(piece: FilePiece, first: int, last: int) -> Iterator[bytes]:
    with piece.open() as file:
        file.seek(piece.offset + first)
        left = last - first
        while left:
            chunk = file.read(min(left, _CHUNK))
            if not chunk:
                raise OSError("a file of the archive is shorter than it was")
            left -= len(chunk)
            yield chunk


def _local_header(member: Member) -> bytes:
    info = zipfile.ZipInfo(member.name, _EARLIEST)
    info.compress_type = zipfile.ZIP_STORED
    info.file_size = info.compress_size = member.size
    info.CRC = member.crc32
    return info.FileHeader(zip64=member.size >= _LIMIT_32)


def _directory_entry(member: Member, offset: int) -> bytes:
    """An entry of the central directory, as section 4.3.12 of the ZIP specification has it."""
    name = member.name.encode()
    large = [value for value in (member.size, member.size, offset) if value >= _LIMIT_32]
    extra = struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""
    version = _ZIP64_VERSION if large else 20
    flags = 0 if member.name.isascii() else 0x800
    size = min(member.size, _LIMIT_32)
    header = struct.pack(
        "<4sHHHHHHIIIHHHHHII",
        b"PK\x01\x02",
        3 << 8 | version,  # made on Unix: so the mode counts
        version,
        flags,
        0,  # stored
        0,  # time, and date: 1 January 1980
        (1 << 5) | 1,
        member.crc32,
        size,
        size,
        len(name),
        len(extra),
        0,
        0,
        0,
        _MODE << 16,
        min(offset, _LIMIT_32),
    )
    return header + name + extra


def _directory_end(count: int, size: int, begin: int) -> bytes:
    """What ends a ZIP; with the records for large ones where the plain one cannot say it."""
    end = b""
    if count >= _LIMIT_16 or size >= _LIMIT_32 or begin >= _LIMIT_32:
        version = _ZIP64_VERSION
        end += struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, version, version, 0, 0, count, count, size, begin)
        end += struct.pack("<4sIQI", b"PK\x06\x07", 0, begin + size, 1)
    count = min(count, _LIMIT_16)
    size, begin = min(size, _LIMIT_32), min(begin, _LIMIT_32)
    return end + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, size, begin, 0)
