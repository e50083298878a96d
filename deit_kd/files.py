"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar

from pydantic import TypeAdapter, ValidationError

from deit_kd.interfaces import InputError

Kind = TypeVar("Kind")

CURES = {
    errno.ENOSPC: "free space, or name another folder",
    errno.EDQUOT: "free some of your quota, or name another folder",
    errno.EFBIG: "raise the file size limit (ulimit -f), or name another folder",
    errno.EROFS: "name a folder that can be written",
    errno.EACCES: "change its permissions, or name another folder",
    errno.EPERM: "change its permissions, or name another folder",
}


def refusal(error: OSError) -> InputError | None:
    """Return the InputError for an error of the user's disk or system; None if it may be a bug of ours."""
    if error.errno not in CURES:
        return None
    return InputError(
        f"{error.filename or 'a file'}: {error.strerror}; {CURES[error.errno]}; what was finished is kept"
    )


def check_file_to_be(key: str, file: Path) -> None:
    """Raise an InputError unless `file` can be written."""
    if file.is_dir():
        raise InputError(f"{key}: {file} is a folder; name a file")
    if not file.absolute().parent.is_dir():
        raise InputError(f"{key}: {file.parent} is not a folder; create it, or name a file other than {file}")
    check_writable(key, file.parent)


def check_writable(key: str, folder: Path) -> None:
    """Raise an InputError unless `folder`, which may not exist yet, can be written to."""
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not place.is_dir():
        raise InputError(f"{key}: {folder} cannot be made ({place} is a file); name a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{key}: {folder} cannot be written ({place} is read-only here); name another folder")


class InUse(InputError):
    """Another process writes to a folder."""


LOCK = ".lock"
_held: set[Path] = set()


@contextmanager
def held(folder: Path, said: str, shared: bool = False) -> Iterator[None]:
    """Lock `folder` for writing; create it if necessary, and remove it again if nothing was written to it.

    A process that dies releases the lock, even if its children survive. On a system without locks there is no
    exclusion.

    Args:
        folder: of a run or a store.
        said: the message of the error.
        shared: whether others may hold it at the same time, if they share it, too.

    Raises:
        InUse: another process holds it.
        InputError: this one does.
    """
    made = _make(folder)
    place = folder.resolve()
    if place in _held:  # opening the file again and closing it would release the lock
        raise InputError(said)
    with _opened_lock(place, said) as file:
        if not _locked(file, shared):
            raise InUse(said)
        _held.add(place)
        try:
            yield
        finally:
            _held.remove(place)
            if made and os.listdir(place) == [LOCK] and _locked(file):
                (place / LOCK).unlink()
                _remove_empty(made)


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Create `folder` if necessary, and remove it again if the context fails before anything is in it."""
    made = _make(folder)
    try:
        yield
    except BaseException:
        _remove_empty(made)
        raise


def _make(folder: Path) -> list[Path]:
    """Create a folder; return what had to be created, the innermost first."""
    made = [place for place in (folder.absolute(), *folder.absolute().parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _remove_empty(made: list[Path]) -> None:
    for empty in made:
        if os.listdir(empty):
            break
        empty.rmdir()


def _opened_lock(folder: Path, said: str) -> IO[str]:
    try:
        return open(folder / LOCK, "a+")
    except FileNotFoundError as error:  # who held it has just removed the folder
        raise InUse(said) from error


def _locked(file: IO[str], shared: bool = False) -> bool:
    """Lock an open file, or return False if another process holds it, or has deleted it with its folder."""
    try:
        import fcntl  # not on Windows

        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except (BlockingIOError, PermissionError, FileNotFoundError):
        return False
    except (ImportError, OSError):  # a file system without locks
        return True


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, and survives a power cut; a failure leaves nothing behind."""
    with whole_or_not(path) as file:
        file.write(content)


@contextmanager
def whole_or_not(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write to that appears as `path` once all is written; see `write_atomically`."""
    with _named_when_whole(path, path.with_name(f".{path.name}.partial"), os.replace) as file:
        yield file


@contextmanager
def _named_when_whole(path: Path, aside: Path, name: Callable[[Path, Path], None]) -> Iterator[BinaryIO]:
    try:
        aside.unlink(missing_ok=True)
        with open(aside, "xb") as file:  # never through an existing link
            yield file
            file.flush()
            os.fsync(file.fileno())
        name(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as a file that appears whole or not at all."""
    write_atomically(path, _as_json(value))


def write_unless_there(path: Path, value: Any) -> None:
    """Write `value` as JSON, as `write_json` does, unless the file is there; of several writers, the first wins."""

    def link(aside: Path, to: Path) -> None:
        try:
            os.link(aside, to)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(aside, to)
        aside.unlink(missing_ok=True)

    if not path.is_file():
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")  # the writers may be at it at once
        with _named_when_whole(path, aside, link) as file:
            file.write(_as_json(value))


def _as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def read_json(path: Path, kind: type[Kind]) -> Kind:
    """Return the JSON of a file, if it is of the type `kind`, such as a TypedDict.

    Raises:
        InputError: it is missing, is not JSON, or is of another type.
    """
    try:
        return checked(json.loads(path.read_text()), kind)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); name the folder of a run") from error


def checked(value: Any, kind: type[Kind]) -> Kind:
    """Return `value` as the type `kind`.

    Raises:
        ValueError: it is of another type; one line says where.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from error
