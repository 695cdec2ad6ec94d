"""Archives whose every byte can be computed: ZIP without compression, or TAR, from files that stay where they are.

An archive is a sequence of pieces of known size. To send bytes from the middle, pieces in front are skipped without
being read; nothing is held but the piece at hand. Members are listed anew for each pass, so the memory that is needed
does not grow with their number.
"""

import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CONTAINERS", "Archive", "FilePiece", "Member", "Piece", "combined_crc32", "tar_member"]

CONTAINERS = {"zip": "application/zip", "tar": "application/x-tar"}
_CHUNK = 256 * 1024
_EARLIEST = (1980, 1, 1, 0, 0, 0)
_MODE = 0o100644
_LIMIT_32, _LIMIT_16 = 0xFFFFFFFF, 0xFFFF
_ZIP64_VERSION = 45


@dataclass(frozen=True)
class FilePiece:
    """Bytes of a file on disk."""

    path: Path
    offset: int
    size: int
    crc32: int


Piece = bytes | FilePiece


@dataclass(frozen=True)
class Member:
    """A file of an archive."""

    name: str
    size: int
    crc32: int
    pieces: Callable[[], Iterable[Piece]]
    """Its bytes; asked for only when they are to be sent, possibly more than once."""

    @classmethod
    def of(cls, name: str, pieces: Callable[[], Iterable[Piece]]) -> "Member":
        """A member whose size and checksum are those of its pieces, which are listed once for that."""
        size = checksum = 0
        for piece in pieces():
            length, its_checksum = _measures(piece)
            checksum = combined_crc32(checksum, its_checksum, length)
            size += length
        return cls(name, size, checksum, pieces)


class Archive:
    """A ZIP or TAR of these members.

    Args:
        container: Of :data:`CONTAINERS`.
        members: Lists the members; the same ones in the same order whenever it is called.
    """

    def __init__(self, container: str, members: Callable[[], Iterable[Member]]) -> None:
        self._members = members
        self._pieces = {"zip": self._zip, "tar": self._tar}[container]

    def size(self) -> int:
        """Bytes of the whole archive."""
        return sum(_measures(piece)[0] for piece in self._pieces(is_read=False))

    def read(self, begin: int, end: int) -> Iterator[bytes]:
        """The bytes from ``begin`` up to but not ``end``.

        Raises:
            OSError: A file is gone, or shorter than it was.
        """
        position = 0
        for piece in self._pieces(is_read=True):
            if position >= end:
                return
            size = _measures(piece)[0]
            first, last = max(begin - position, 0), min(end - position, size)
            position += size
            if first >= last:
                continue
            if isinstance(piece, bytes):
                yield piece[first:last]
            elif isinstance(piece, FilePiece):
                yield from _read_file(piece, first, last)
            else:
                raise AssertionError("only a measured pass has gaps")

    def _tar(self, *, is_read: bool) -> Iterator["Piece | _Gap"]:
        total = 0
        for member in self._members():
            for piece in tar_member(member) if is_read else _measured_tar_member(member):
                total += _measures(piece)[0]
                yield piece
        # two blocks of zeros, and then up to a whole record, as tar itself writes
        yield b"\0" * (2 * tarfile.BLOCKSIZE + -(total + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE)

    def _zip(self, *, is_read: bool) -> Iterator["Piece | _Gap"]:
        position = count = 0
        for member in self._members():
            header = _local_header(member)
            yield header
            if is_read:
                yield from member.pieces()
            else:
                yield _Gap(member.size)
            position += len(header) + member.size
            count += 1
        directory_begin, offset, directory_size = position, 0, 0
        for member in self._members():
            entry = _directory_entry(member, offset)
            yield entry
            directory_size += len(entry)
            offset += len(_local_header(member)) + member.size
        yield _directory_end(count, directory_size, directory_begin)


@dataclass(frozen=True)
class _Gap:
    """Bytes that nobody wants to read."""

    size: int


def tar_member(member: Member) -> Iterator[Piece]:
    """A member as it stands in a TAR: header, content, padding."""
    yield _tar_header(member)
    yield from member.pieces()
    yield b"\0" * (-member.size % tarfile.BLOCKSIZE)


def _measured_tar_member(member: Member) -> Iterator["Piece | _Gap"]:
    yield _tar_header(member)
    yield _Gap(member.size + -member.size % tarfile.BLOCKSIZE)


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
    if second_size == 0:
        return first
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


def _measures(piece: "Piece | _Gap") -> tuple[int, int]:
    """Size and checksum of a piece."""
    if isinstance(piece, bytes):
        return len(piece), zlib.crc32(piece)
    if isinstance(piece, FilePiece):
        return piece.size, piece.crc32
    return piece.size, 0


def _read_file(piece: FilePiece, first: int, last: int) -> Iterator[bytes]:
    with piece.path.open("rb") as file:
        file.seek(piece.offset + first)
        left = last - first
        while left:
            chunk = file.read(min(left, _CHUNK))
            if not chunk:
                raise OSError(f"{piece.path} is shorter than it was")
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
