"""Where data lie: from the patterns of a config to files, on a disk or in object storage."""

import glob
import os
import posixpath
import re
import tempfile
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Self
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import pyarrow as pa
from fsspec.utils import glob_translate
from pyarrow import fs

from recsys.errors import UserError

S3_ATTEMPTS = 5
"""Requests until S3 counts as failing; the pauses between them grow, to some ten seconds in all."""

GCS_RETRY_SECONDS = 20

THREADS = 32
"""Files looked up, opened or copied at a time; most of that is waiting."""

SHOWN = 5
"""Names that are left out, in a message; the rest are counted."""

_HIDDEN = re.compile(r"(^|/)[_.]")
"""Of a path below what a pattern wrote out: what Spark and Hive leave out."""

_REMEDIES = {
    "NO_SUCH_BUCKET": "there is no such bucket; correct its name, or AWS_ENDPOINT_URL or AWS_REGION",
    "ACCESS_DENIED|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE|status 403|PERMISSION_DENIED|UNAUTHENTICATED": (
        "access is denied; S3 takes AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY ({credentials} here) or a role, "
        "GCS takes GOOGLE_APPLICATION_CREDENTIALS, and they must allow this"
    ),
    "status 301|PERMANENT_REDIRECT": "the bucket is in another region; set AWS_REGION, or region=... in the URL",
    "NETWORK_CONNECTION|REQUEST_TIMEOUT|Retry policy exhausted": (
        "the storage does not answer; check the network, and AWS_ENDPOINT_URL or endpoint_override=... in the URL"
    ),
    "INTERNAL_FAILURE|SERVICE_UNAVAILABLE|SLOW_DOWN|status 5": (
        f"the storage failed {S3_ATTEMPTS} times in a row; try again later, or with fewer ranks or reader_threads"
    ),
}


class DataError(UserError):
    """Data cannot be used as they are; the message names file, row group and column, or URL, and the way out."""


class Place(NamedTuple):
    """A path on a file system; written out, without credentials, it is `prefix` and `path`.

    Attributes:
        filesystem: where the path leads.
        path: there.
        prefix: what stands before the path in a URL.
        begun: how much of the path was written out in the pattern that found it, up to its first wildcard.
    """

    filesystem: fs.FileSystem
    path: str
    prefix: str = ""
    begun: int = 0

    def __str__(self) -> str:
        return self.prefix + self.path

    def __truediv__(self, name: str) -> Self:
        return self._replace(path=f"{self.path.rstrip('/')}/{name}")

    @property
    def is_local(self) -> bool:
        """Whether the operating system knows it as a path."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @property
    def partitions(self) -> dict[str, str | None]:
        """What directories `key=value` on the path say; None is Hive's null.

        Those that the pattern wrote out count if no other directory stands below them there: in `user=a/log/*`, `user`
        is no column.
        """
        return dict(self._pairs()[0])

    @property
    def written_out(self) -> frozenset[str]:
        """Keys of the partitions that the pattern itself wrote out."""
        pairs, number = self._pairs()
        return frozenset(key for key, _ in pairs[:number]) - {key for key, _ in pairs[number:]}

    def _pairs(self) -> tuple[list[tuple[str, str | None]], int]:
        """The partitions, and how many of them the pattern wrote out."""
        directory = self.path.rpartition("/")[0]
        pairs: list[tuple[str, str | None]] = []
        number = 0
        for part in re.finditer(r"[^/]+", directory):
            key, equals, value = part[0].partition("=")
            if key and equals:
                pairs.append((unquote(key), None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value)))
                number += part.end() <= self.begun
            elif part.end() <= self.begun:
                pairs, number = [], 0
        return pairs, number

    def open(self) -> tuple[pa.NativeFile, str]:
        """The file, opened for reading, and its version, which differs once another has taken its place.

        That is the ETag on S3; elsewhere size and modification time.

        Raises:
            OSError: it cannot be opened.
        """
        if self.filesystem.type_name == "s3":
            file = self.filesystem.open_input_file(self.path)
            return file, file.metadata()["ETag"].decode()
        # Looked at before it is opened: one that is replaced in between is then seen to differ, if only later.
        info = self.filesystem.get_file_info(self.path)
        return self.filesystem.open_input_file(self.path), f"{info.size} {info.mtime_ns}"

    def checked(self, source: str) -> Self:
        """The place itself, if the storage answers and, on S3, the bucket is there.

        Raises:
            DataError: it does not; the message begins with `source`.
        """
        with naming(f"{source}: {self}"):
            self.exists()
            _check_bucket(self)
        return self

    def exists(self) -> bool:
        """Whether a file or directory is there.

        Raises:
            OSError: the storage refuses or does not answer.
        """
        return bool(self.filesystem.get_file_info(self.path).type != fs.FileType.NotFound)

    def files(self) -> list[str]:
        """Names of the files below, sorted; none where nothing is.

        Raises:
            OSError: they cannot be listed.
        """
        return sorted(self.prefix + info.path for info in _below(self.filesystem, self.path) if info.is_file)

    def put(self, source: Path) -> None:
        """Copy a file of this machine here.

        Raises:
            OSError: it cannot be written.
        """
        if self.filesystem.type_name not in ("s3", "gcs"):  # which have no directories
            self.filesystem.create_dir(str(PurePosixPath(self.path).parent))
        fs.copy_files(str(source), self.path, fs.LocalFileSystem(), self.filesystem)

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Give a path of this machine to write to; the file appears here, whole, when the block ends without error.

        Raises:
            DataError: it cannot be written.
        """
        parent = Path(self.path).parent if self.is_local else None
        with naming(str(self)):
            if parent:
                parent.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(prefix=".", dir=parent)
        with folder as name:
            file = Path(name) / PurePosixPath(self.path).name
            yield file
            with naming(str(self)):
                if parent:
                    file.replace(self.path)
                else:
                    self.put(file)


def locate(url: str, *, source: str) -> Place:
    """What a path or URL names.

    Args:
        url: a path, `~` being the home directory; `s3://`, `gs://` or `file://`; or that of any file system that fsspec
            knows, after `fsspec+`. S3's may carry `key:secret@` before the bucket and
            `?endpoint_override=...&region=...&scheme=...`; what it does not say is taken from the environment and
            wherever else the AWS SDK looks.
        source: config path or option that it comes from, for messages.

    Raises:
        DataError: it is not such a URL.
    """
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url):
        return Place(fs.LocalFileSystem(), os.path.expanduser(url))
    parts = urlsplit(url, allow_fragments=False)
    bucket = parts.netloc.rpartition("@")[2]
    with naming(f"{source}: {parts.scheme}://{bucket}{parts.path}"):
        if parts.scheme not in ("s3", "gs"):
            filesystem, path = fs.FileSystem.from_uri(url)
            return Place(filesystem, path, "" if isinstance(filesystem, fs.LocalFileSystem) else f"{parts.scheme}://")
        if not bucket:
            raise ValueError("the URL names no bucket")
        options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        if parts.scheme == "gs":
            query = urlencode({"retry_limit_seconds": GCS_RETRY_SECONDS, **options})
            filesystem, _ = fs.FileSystem.from_uri(f"gs://{parts.netloc}?{query}")
        else:
            if unknown := set(options) - {"endpoint_override", "region", "scheme"}:
                raise ValueError(f"{min(unknown)} is not understood; S3 takes endpoint_override, region and scheme")
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            keys = {"access_key": parts.username, "secret_key": parts.password}
            filesystem = _s3(
                **{"endpoint_override": endpoint, **options},
                **{name: unquote(key) for name, key in keys.items() if key},
            )
        return Place(filesystem, f"{bucket}{parts.path}".rstrip("/"), f"{parts.scheme}://")


@cache  # so that all files of a bucket share its connections
def _s3(**options: str | None) -> fs.FileSystem:
    return fs.S3FileSystem(retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS), **options)


def find_files(
    patterns: Sequence[str], *, source: str, on_repeated: Callable[[str], None] = lambda message: None
) -> list[Place]:
    """The files that any of the patterns names, sorted, once each.

    A pattern is a path or URL (see `locate`) of a file, or of a directory for every `*.parquet` below it; a glob of
    such paths, `**` standing for any directories; or `@list.txt`, a file with a pattern on each line, `#` beginning a
    comment. Names that begin with `_` or `.` are left out below a directory and from where a glob begins, as Spark and
    Hive do. A path that is there just as it is written is no glob, whatever characters are in it.

    Args:
        patterns: relative to the working directory.
        source: config path of the patterns, for messages.
        on_repeated: told, if some names are of files that others name as well, by links or other ways to them, which
            names were left out.

    Raises:
        DataError: a pattern names no file, or the storage refuses or does not answer.
    """
    listed = [line for pattern in patterns for line in _listed(pattern, source)]
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda pattern: _matches(pattern, source), listed)
        files: dict[str, Place] = {}
        for file in (file for files in found for file in files):
            known = files.setdefault(str(file), file)
            if file.begun < known.begun:  # the pattern that leaves more of the path to be partitions
                files[str(file)] = file
        same: dict[Hashable, list[Place]] = {}
        for file, identity in zip(files.values(), pool.map(_identity, files.values()), strict=True):
            same.setdefault(identity, []).append(file)
    for names in same.values():
        names.sort(key=_plainness)
    repeated = sorted(f"{name} (as {names[0]})" for names in same.values() for name in names[1:])
    if repeated:
        more = f" and {len(repeated) - SHOWN} more" if len(repeated) > SHOWN else ""
        on_repeated(
            f"{source}: files that have several names are read once; left out: {', '.join(repeated[:SHOWN])}{more}"
        )
    return sorted((names[0] for names in same.values()), key=str)


def would_find(patterns: Sequence[str], files: Sequence[Place], *, source: str) -> list[Place]:
    """Those of some files that `find_files` would name, if they were there."""
    by_path = {os.path.abspath(file.path) if file.is_local else file.path: file for file in files}
    infos = [fs.FileInfo(path, fs.FileType.File) for path in by_path]
    found = []
    for line in (line for pattern in patterns for line in _listed(pattern, source)):
        place = locate(line, source=source)
        if place.is_local:
            place = place._replace(path=os.path.abspath(place.path))
        globbed, begun = _glob(place)
        written = len(place.path if globbed is None else begun)
        for info in _matching(infos, globbed or glob.escape(place.path)):
            if by_path[info.path].filesystem.equals(place.filesystem) and not _HIDDEN.search(info.path[written:]):
                found.append(by_path[info.path])
    return found


def _identity(file: Place) -> Hashable:
    """What two names of one file have in common."""
    if not file.is_local:
        # In object storage, each sequence of characters is a key of its own.
        in_objects = file.filesystem.type_name in ("s3", "gcs")
        return str(file) if in_objects else file.prefix + posixpath.normpath(file.path)
    path = os.path.realpath(file.path)
    try:
        info = os.stat(path)
    except OSError:  # which is told where it is opened
        return path
    # Numbers alone are not believed: some network file systems give several files one.
    return (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns) if info.st_nlink > 1 and info.st_ino else path


def _plainness(file: Place) -> tuple[bool, bool, int, str]:
    """The plainest of the names of a file comes first: no link, no detour."""
    path = file.path
    by_link = file.is_local and os.path.realpath(path) != os.path.abspath(path)
    return by_link, posixpath.normpath(path) != path, len(path), path


def _listed(pattern: str, source: str) -> list[str]:
    if not pattern.startswith("@"):
        return [pattern]
    place = locate(pattern[1:], source=source)
    with naming(f"{source}: list of files {place}"), place.open()[0] as file:
        lines = (line.partition("#")[0].strip() for line in file.read().decode().splitlines())
        return [line for line in lines if line]


def _matches(pattern: str, source: str) -> list[Place]:
    place = locate(pattern, source=source)
    filesystem, prefix = place.filesystem, place.prefix
    with naming(f"{source}: {place}"):
        path, base = _glob(place)
        is_glob = path is not None
        if path is None:
            path = place.path
            found = [filesystem.get_file_info(path)]
        elif place.is_local:
            found = filesystem.get_file_info(glob.glob(path, recursive=True))
        else:
            found = _matching(_below(filesystem, base.rstrip("/")), path)
        if not is_glob or "**" not in path:
            found += [
                file
                for directory in found
                if directory.type == fs.FileType.Directory
                for file in _below(filesystem, directory.path)
                if file.path.endswith(".parquet")
            ]
        # A link to nowhere is matched as well, and must fail where it is opened.
        missing = fs.FileType.NotFound if is_glob else None
        files = [info.path for info in found if info.is_file or info.type == missing]
        if not files:
            _check_bucket(place)
    files = [file for file in files if file == path or not _HIDDEN.search(file[len(base) :])]
    if not files:
        hint = "" if prefix else " (paths are relative to the working directory)"
        if "[" in place.path:
            hint += "; a [ that is part of a name beside wildcards is written [[]"
        raise DataError(f"{source}: no file matches {str(place)!r}{hint}")
    return [place._replace(path=file, begun=len(base)) for file in files]


def _glob(place: Place) -> tuple[str | None, str]:
    """A path as a glob, if it is one, and what stands before its wildcards.

    A name that is there just as it is written has no wildcards: it is escaped in the glob.
    """
    written = ""
    parts = re.findall(r"[^/]*/|[^/]+$", place.path)
    for number, part in enumerate(parts):
        # Far away, each look is a request, and nobody names a directory *.
        marks = r"[*?[]" if place.is_local else r"\["
        whole = written + part.rstrip("/")
        if re.search(r"[*?[]", part) and not (re.search(marks, part) and place._replace(path=whole).exists()):
            return glob.escape(written) + "".join(parts[number:]), written
        written += part
    return None, written


def _below(filesystem: fs.FileSystem, directory: str) -> list[fs.FileInfo]:
    found: list[fs.FileInfo] = filesystem.get_file_info(
        fs.FileSelector(directory, recursive=True, allow_not_found=True)
    )
    return found


def _check_bucket(place: Place) -> None:
    # A path in a bucket that is not there is merely not found.
    if place.prefix == "s3://" and not place._replace(path=place.path.partition("/")[0]).exists():
        raise OSError("NO_SUCH_BUCKET")


def _matching(infos: list[fs.FileInfo], pattern: str) -> list[fs.FileInfo]:
    """Files that a glob names, or that are Parquet below a directory that it names; no storage globs by itself."""
    matches = re.compile(glob_translate(pattern)).match
    return [
        info
        for info in infos
        if info.is_file
        and (
            matches(info.path)
            or (info.path.endswith(".parquet") and any(matches(str(up)) for up in PurePosixPath(info.path).parents))
        )
    ]


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Make of a failure of storage, or of what was read from it, a `DataError` that begins with `where`."""
    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, ImportError) as error:
        raise DataError(f"{where}: {explain(error)}") from None


def explain(error: BaseException) -> str:
    """A failure in one line, with the way out where it is the storage's."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    for marks, remedy in _REMEDIES.items():
        if re.search(marks, text):
            return remedy.format(credentials="set" if os.environ.get("AWS_ACCESS_KEY_ID") else "not set")
    return text


def is_of_storage(error: BaseException) -> bool:
    """Whether a failure is the storage's, which asking again would only repeat, and not of what was read from it."""
    return (isinstance(error, OSError) and error.errno is not None) or any(
        re.search(marks, str(error)) for marks in _REMEDIES
    )
