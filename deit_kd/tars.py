"""Tar files, member by member: where the bytes of each are, without unpacking, and the blocks of a new one.

Formats: POSIX.1-2001 (pax), ustar, and GNU's long names. `tarfile` reads the headers, but not the file: it takes a
damaged header for the end, follows sizes below 0, and keeps every member.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from tarfile import BLOCKSIZE
from typing import BinaryIO, NamedTuple

from deit_kd.interfaces import InputError

LONGEST_EXTRA = 2**16  # bytes of an extended header; names are shorter
END = bytes(2 * BLOCKSIZE)
SKIPPED = (tarfile.DIRTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)
PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
KINDS = {
    tarfile.LNKTYPE: "a link",
    tarfile.SYMTYPE: "a link",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}


class Member(NamedTuple):
    """One file in a tar."""

    name: str
    offset: int  # of its first byte
    size: int  # bytes


def members(file: BinaryIO, where: str) -> Iterator[Member]:
    """Yield the files in a tar, in order; folders are passed over.

    Args:
        file: the tar. It may be read between two members.
        where: its path, for messages.

    Raises:
        InputError: it is no tar, is cut off, or holds anything but plain files below its top.
    """
    length = file.seek(0, os.SEEK_END)
    position, extra = 0, _Extra()
    while True:
        file.seek(position)
        block = file.read(BLOCKSIZE)
        if len(block) < BLOCKSIZE:
            raise InputError(f"{where}: is cut off at byte {length}; copy it again")
        if not any(block):
            return
        header = _header(block, position, where)
        size = header.size if extra.size is None else extra.size
        has_content = header.type != tarfile.DIRTYPE
        content = position + BLOCKSIZE
        position = content + (padded(size) if has_content else 0)
        if size < 0 or position > length:
            raise InputError(f"{where}: is cut off in {header.name!r}; copy it again")
        if header.type in (*PAX, tarfile.GNUTYPE_LONGNAME):
            if size > LONGEST_EXTRA:
                raise InputError(f"{where}: the header of a file takes {size} bytes; pack the photos again")
            extra = _extra(file.read(size), header.type, extra, where)
            continue
        if header.type in PLAIN:
            yield Member(checked_name(extra.name or header.name, where), content, size)
        elif header.type not in SKIPPED:
            kind = KINDS.get(header.type, "of an unknown type")
            raise InputError(f"{where}: {header.name!r} is {kind}; shards hold plain files only, pack the photos again")
        extra = _Extra()


def checked_name(name: str, where: str) -> str:
    """Return the name of a file in a tar without a leading ``./``.

    Raises:
        InputError: it leads out of the tar, or is no text.
    """
    parts = [part for part in name.split("/") if part != "."]
    try:
        name.encode()
        is_text = "\0" not in name
    except UnicodeEncodeError:
        is_text = False
    if not is_text or not all(parts) or ".." in parts:
        raise InputError(f"{where}: {name!r} is not a name below its folder; pack the photos again")
    return "/".join(parts)


def member(name: str, content: bytes) -> bytes:
    """Return one file as it stands in a tar: header, content and padding; the same for the same file."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
    return header + content + bytes(padded(len(content)) - len(content))


def padded(size: int) -> int:
    """Return how many bytes a content of `size` bytes takes in a tar."""
    return -(-size // BLOCKSIZE) * BLOCKSIZE


class _Extra(NamedTuple):
    """What a header says about the member after it."""

    name: str | None = None
    size: int | None = None


def _header(block: bytes, position: int, where: str) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        what = f"is damaged at byte {position}" if position else "is not a tar, or is a compressed one"
        raise InputError(f"{where}: {what} ({error}); copy it again, or unpack it and pack the photos") from error


def _extra(content: bytes, kind: bytes, before: _Extra, where: str) -> _Extra:
    if kind == tarfile.GNUTYPE_LONGNAME:
        return before._replace(name=content.rstrip(b"\0").decode(errors="surrogateescape"))
    try:
        records = dict(_pax_records(content))
        size = int(records["size"]) if "size" in records else None
    except ValueError as error:
        raise InputError(f"{where}: has a damaged header ({error}); copy it again") from error
    if any(key.startswith("GNU.sparse") for key in records):
        raise InputError(f"{where}: holds a sparse file; shards hold plain files only, pack the photos again")
    return _Extra(records.get("path", before.name), size)


def _pax_records(content: bytes) -> Iterator[tuple[str, str]]:
    """Yield the records of an extended header, each ``length key=value`` and a line feed."""
    while content.strip(b"\0"):
        digits, _, _ = content[:20].partition(b" ")
        length = int(digits)
        record = content[len(digits) + 1 : length]
        if length <= len(digits) + 1 or not record.endswith(b"\n") or b"=" not in record:
            raise ValueError(f"a record of {length} bytes")
        key, _, value = record[:-1].decode(errors="surrogateescape").partition("=")
        yield key, value
        content = content[length:]
