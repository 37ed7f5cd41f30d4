"""Converters from the official files of public data sets to Parquet shards."""

import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from recsys.data import shards

GENDERS = ("F", "M")
AGES = (1, 18, 25, 35, 45, 50, 56)  # the lowest age of each bracket, as users.dat writes it
OCCUPATIONS = 21
GENRES = (
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
FIRST_YEAR, LAST_YEAR = 1919, 2000

_TRAIN_FILES, _HELD_OUT_FILES = 8, 2
_ROW_GROUP_ROWS = 16_384
_SPLIT_SEED = 2024
_POSITIVE_RATING = 4
_WHERE = "take ml-1m.zip from https://grouplens.org/datasets/movielens/1m/"

Ints = npt.NDArray[np.int64]


def convert_movielens_1m(source: Path, output: Path, *, overwrite: bool = False) -> None:
    """Converts MovieLens-1M to Parquet shards split at random into 80 % train, 10 % valid and 10 % test.

    The split is the permutation `numpy.random.default_rng(2024).permutation(rows)` of the rows in the order
    of the ratings file, and the shards keep the order of the permutation, so reading them in order is already
    shuffled.

    `user_id` and `movie_id` are the official ids; every other id is dense, from 0, by the vocabularies that
    `dataset.json` gives. The label is 1 for a rating of 4 or 5. Never feed `rating` to a model.

    Args:
        source: folder or zip file with `ratings.dat`, `users.dat` and `movies.dat`, at the top or under
            `ml-1m/`. Where `ratings.dat` is missing, a `ratings.csv` of user, movie and rating takes its
            place; the column `timestamp` is then missing.
        output: becomes the data set: `dataset.json` and a folder of Parquet files for each split.
        overwrite: replace the data set that is at `output`.

    Raises:
        FileNotFoundError: `source` or one of its files is missing.
        FileExistsError: `output` is not empty, and `overwrite` is not set or it holds no data set.
        ValueError: a file does not say what it should; the message names file and line.
    """
    _check_free(output, overwrite)
    files = _Files(source)
    users = _read_users(files)
    movies = _read_movies(files)
    ratings = _read_ratings(files)
    table = _join(ratings, users, movies)
    with shards.staged(output, keep=lambda: False, replace=lambda: overwrite and _is_replaceable(output)) as stage:
        shards.write_summary(
            stage,
            {
                "name": "movielens-1m",
                "columns": _columns(users, movies, table.column_names),
                "vocabularies": {
                    "gender": list(GENDERS),
                    "age": list(AGES),
                    "zip_prefix": users.zip_prefixes,
                    "genres": list(GENRES),
                    "year": list(range(FIRST_YEAR, LAST_YEAR + 1)),
                },
                "splits": _write_splits(stage, table),
            },
        )


def split_sizes(rows: int) -> dict[str, int]:
    """Returns the rows of each split: 80 % train, rounded down, and the rest halved, valid rounded down."""
    train = rows * 8 // 10
    valid = (rows - train) // 2
    return {"train": train, "valid": valid, "test": rows - train - valid}


def _write_splits(stage: Path, table: pa.Table) -> dict[str, Any]:
    """Writes the shards and returns what `dataset.json` says of them."""
    order = np.random.default_rng(_SPLIT_SEED).permutation(table.num_rows)
    told: dict[str, Any] = {}
    first = 0
    for split, rows in split_sizes(table.num_rows).items():
        part = table.take(pa.array(order[first : first + rows]))
        first += rows
        bounds = shards.part_bounds(rows, _TRAIN_FILES if split == "train" else _HELD_OUT_FILES)
        for number, (start, end) in enumerate(bounds):
            shards.write_part(part.slice(start, end - start), stage, split, number, row_group_rows=_ROW_GROUP_ROWS)
        told[split] = {"rows": rows, "files": len(bounds), "label_rate": pc.mean(part["label"]).as_py()}
    return told


def _check_free(output: Path, overwrite: bool) -> None:
    """Refuses to go to work for an output that cannot be put in its place."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{output} is not empty; name another folder, or pass --overwrite to replace it")
    if not _is_replaceable(output):
        raise FileExistsError(f"{output} holds no {shards.SUMMARY_FILE}, so it is not replaced; name another folder")


def _is_replaceable(output: Path) -> bool:
    """Tells whether `output` is a data set: a slip of the hand must not remove any other folder."""
    return shards.read_summary(output) is not None


class _Files:
    """The official files, in a folder or a zip file, at the top or under `ml-1m/`."""

    def __init__(self, source: Path) -> None:
        if not source.exists():
            raise FileNotFoundError(f"{source} does not exist; {_WHERE}")
        if not source.is_dir() and not zipfile.is_zipfile(source):
            raise ValueError(f"{source} is neither a folder nor a zip file; {_WHERE}")
        self._source = source

    def find(self, name: str) -> str | None:
        """Returns the path of a file inside the source, or None."""
        paths = (name, f"ml-1m/{name}")
        if self._source.is_dir():
            return next((path for path in paths if (self._source / path).is_file()), None)
        with zipfile.ZipFile(self._source) as archive:
            members = set(archive.namelist())
        return next((path for path in paths if path in members), None)

    def read(self, name: str) -> tuple[str, bytes]:
        """Returns a file's full name, for messages, and what it holds."""
        path = self.find(name)
        if path is None:
            raise FileNotFoundError(f"{self._source} has no {name}; {_WHERE}")
        if self._source.is_dir():
            return str(self._source / path), (self._source / path).read_bytes()
        try:
            with zipfile.ZipFile(self._source) as archive:
                return f"{self._source}/{path}", archive.read(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self._source}: {error}; {_WHERE}") from error


def _wrong(file: str, line: int, what: str) -> ValueError:
    return ValueError(f"{file}, line {line}: {what}; {_WHERE}")


@dataclass(frozen=True)
class _Users:
    """Columns of users.dat, each of shape (users,); `row` maps an id to a place in them, -1 for no user."""

    row: Ints
    gender: Ints
    age: Ints
    occupation: Ints
    zip_prefix: Ints
    zip_prefixes: list[str]


@dataclass(frozen=True)
class _Movies:
    """Columns of movies.dat; `row` maps an id to a place in the others, -1 for no movie."""

    row: Ints
    year: Ints
    genres: pa.ListArray
    first_genre: Ints


@dataclass(frozen=True)
class _Ratings:
    """Columns of the ratings file, each of shape (rows,)."""

    file: str
    first_line: int
    user: Ints
    movie: Ints
    rating: Ints
    timestamp: Ints | None


def _read_users(files: _Files) -> _Users:
    file, content = files.read("users.dat")
    ids, rows = [], []
    for line, text in _lines(content):
        fields = text.split("::")
        if len(fields) != 5 or not _are_ids(fields[0], fields[2], fields[3]):
            raise _wrong(file, line, f"{text!r} is not UserID::Gender::Age::Occupation::Zip-code")
        user, gender, age, occupation, zip_code = fields
        if gender not in GENDERS:
            raise _wrong(file, line, f"gender is {gender!r}, not one of {', '.join(GENDERS)}")
        if int(age) not in AGES:
            raise _wrong(file, line, f"age is {age}, not one of {', '.join(map(str, AGES))}")
        if int(occupation) >= OCCUPATIONS:
            raise _wrong(file, line, f"occupation is {occupation}, not in 0..{OCCUPATIONS - 1}")
        ids.append(int(user))
        rows.append((GENDERS.index(gender), AGES.index(int(age)), int(occupation), zip_code[:3]))
    genders, ages, occupations, prefixes = zip(*rows, strict=True) if rows else ((), (), (), ())
    vocabulary, zip_prefix = np.unique(np.array(prefixes, dtype=str), return_inverse=True)
    return _Users(
        row=_row_of_id(file, ids),
        gender=np.array(genders, np.int64),
        age=np.array(ages, np.int64),
        occupation=np.array(occupations, np.int64),
        zip_prefix=zip_prefix.astype(np.int64),
        zip_prefixes=vocabulary.tolist(),
    )


def _read_movies(files: _Files) -> _Movies:
    file, content = files.read("movies.dat")
    # The title is all between the first and the last separator: titles have colons of their own.
    form = re.compile(r"(\d+)::(.*\((\d{4})\))::([^:]+)")
    number = {genre: index for index, genre in enumerate(GENRES)}
    ids, years, genres = [], [], []
    for line, text in _lines(content):
        match = form.fullmatch(text)
        if match is None:
            raise _wrong(file, line, f"{text!r} is not MovieID::Title (year)::Genres")
        year, names = int(match[3]), match[4].split("|")
        if not FIRST_YEAR <= year <= LAST_YEAR:
            raise _wrong(file, line, f"year is {year}, not in {FIRST_YEAR}..{LAST_YEAR}")
        unknown = [name for name in names if name not in number]
        if unknown:
            raise _wrong(file, line, f"unknown genre {unknown[0]!r}")
        ids.append(int(match[1]))
        years.append(year - FIRST_YEAR)
        genres.append([number[name] for name in names])
    return _Movies(
        row=_row_of_id(file, ids),
        year=np.array(years, np.int64),
        genres=pa.array(genres, pa.list_(pa.int64())),
        first_genre=np.array([one[0] for one in genres], np.int64),
    )


def _read_ratings(files: _Files) -> _Ratings:
    if files.find("ratings.dat") is None and files.find("ratings.csv") is not None:
        file, content = files.read("ratings.csv")
        names = ["user", "movie", "rating"]
        header, _, _ = content.partition(b"\n")
        if header.strip() != b"user,movie,rating":
            raise _wrong(file, 1, f"the header is {header.decode('latin-1').strip()!r}, not 'user,movie,rating'")
        table = _read_numbers(file, content, names, ",", first_line=2)
    else:
        file, content = files.read("ratings.dat")
        names = ["user", "movie", "rating", "timestamp"]
        table = _read_numbers(file, content, names, "::", first_line=1)
    columns = {name: table[name].to_numpy() for name in names}
    return _Ratings(
        file=file,
        first_line=2 if file.endswith(".csv") else 1,
        user=columns["user"],
        movie=columns["movie"],
        rating=columns["rating"],
        timestamp=columns.get("timestamp"),
    )


def _read_numbers(file: str, content: bytes, names: list[str], separator: str, *, first_line: int) -> pa.Table:
    """Parses whole numbers parted by `separator`, skipping the lines before `first_line`.

    Arrow parts fields by one character only. Of a separator of several, all but the first make empty columns
    between the real ones, which are read as nulls and dropped.
    """
    between = [f"{name}/{gap}" for name in names[1:] for gap in range(1, len(separator))]
    padded = [column for name in names for column in (*(gap for gap in between if gap.startswith(f"{name}/")), name)]
    try:
        table = pa_csv.read_csv(
            io.BytesIO(content),
            read_options=pa_csv.ReadOptions(column_names=padded, skip_rows=first_line - 1),
            parse_options=pa_csv.ParseOptions(delimiter=separator[0], quote_char=False, ignore_empty_lines=False),
            convert_options=pa_csv.ConvertOptions(
                column_types={**dict.fromkeys(names, pa.int64()), **dict.fromkeys(between, pa.null())},
                null_values=[""],
            ),
        ).select(names)
        clean = all(table[name].null_count == 0 for name in names)
    except pa.ArrowInvalid:
        clean = False
    if clean:
        return table
    # Something is wrong: look for it slowly, to name the line.
    form = re.compile(re.escape(separator).join([r"\d+"] * len(names)))
    for line, text in _lines(content):
        if line >= first_line and not form.fullmatch(text):
            raise _wrong(file, line, f"{text!r} is not {separator.join(names)}, each a whole number")
    raise ValueError(f"{file} holds no ratings that can be read; {_WHERE}")


def _join(ratings: _Ratings, users: _Users, movies: _Movies) -> pa.Table:
    """Puts what is known of its user and movie beside each rating, in the order of the file."""

    def refuse(bad: npt.NDArray[np.bool_], what: str, values: Ints, why: str) -> None:
        if bad.any():
            at = int(bad.argmax())
            raise _wrong(ratings.file, at + ratings.first_line, f"{what} {values[at]} {why}")

    refuse((ratings.rating < 1) | (ratings.rating > 5), "rating", ratings.rating, "is not in 1..5")
    user, movie = _rows_of(ratings.user, users.row), _rows_of(ratings.movie, movies.row)
    refuse(user < 0, "user", ratings.user, "is not in users.dat")
    refuse(movie < 0, "movie", ratings.movie, "is not in movies.dat")
    columns = {
        "user_id": pa.array(ratings.user),
        "movie_id": pa.array(ratings.movie),
        "gender": pa.array(users.gender[user]),
        "age": pa.array(users.age[user]),
        "occupation": pa.array(users.occupation[user]),
        "zip_prefix": pa.array(users.zip_prefix[user]),
        "genres": movies.genres.take(pa.array(movie)),
        "year": pa.array(movies.year[movie]),
        "domain_gender": pa.array(users.gender[user]),
        "domain_age": pa.array(users.age[user]),
        "domain_occupation": pa.array(users.occupation[user]),
        "domain_genre": pa.array(movies.first_genre[movie]),
        "rating": pa.array(ratings.rating.astype(np.int8)),
        "label": pa.array((ratings.rating >= _POSITIVE_RATING).astype(np.int8)),
    }
    if ratings.timestamp is not None:
        columns["timestamp"] = pa.array(ratings.timestamp)
    return pa.table(columns)


def _columns(users: _Users, movies: _Movies, names: list[str]) -> dict[str, dict[str, Any]]:
    """What each column means; an id column's size is one more than its largest id can be."""

    def ids(size: int, meaning: str, type_: str = "int64") -> dict[str, Any]:
        return {"type": type_, "size": size, "meaning": meaning}

    columns: Mapping[str, dict[str, Any]] = {
        "user_id": ids(len(users.row), "official id, from 1"),
        "movie_id": ids(len(movies.row), "official id, from 1"),
        "gender": ids(len(GENDERS), "place in the vocabulary"),
        "age": ids(len(AGES), "place of the age bracket in the vocabulary"),
        "occupation": ids(OCCUPATIONS, "official code"),
        "zip_prefix": ids(len(users.zip_prefixes), "place of the zip code's first 3 characters in the vocabulary"),
        "genres": ids(len(GENRES), "places in the vocabulary", "list<int64>"),
        "year": ids(LAST_YEAR - FIRST_YEAR + 1, f"of release, less {FIRST_YEAR}"),
        "domain_gender": ids(len(GENDERS), "gender again, to part the rows by"),
        "domain_age": ids(len(AGES), "age again, to part the rows by"),
        "domain_occupation": ids(OCCUPATIONS, "occupation again, to part the rows by"),
        "domain_genre": ids(len(GENRES), "the first of genres, to part the rows by"),
        "rating": {"type": "int8", "meaning": "1 to 5 stars: never a feature"},
        "label": {"type": "int8", "meaning": f"1 for a rating of {_POSITIVE_RATING} or more"},
        "timestamp": {"type": "int64", "meaning": "of the rating, in seconds since 1970"},
    }
    return {name: columns[name] for name in names}


def _lines(content: bytes) -> Iterator[tuple[int, str]]:
    """Yields number, from 1, and text of each line; only line feeds end one, as Arrow has it."""
    text = content.decode("latin-1")
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        yield number, line.removesuffix("\r")


def _are_ids(*fields: str) -> bool:
    return all(field.isascii() and field.isdigit() for field in fields)


def _row_of_id(file: str, ids: list[int]) -> Ints:
    """Returns an array that maps each id to its place in `ids`, and any other up to the largest to -1."""
    if not ids:
        raise ValueError(f"{file} is empty; {_WHERE}")
    if max(ids) > 1_000_000:
        raise _wrong(file, ids.index(max(ids)) + 1, f"id {max(ids)} is beyond reason")
    row = np.full(max(ids) + 1, -1, np.int64)
    for place, one in enumerate(ids):
        if row[one] >= 0:
            raise _wrong(file, place + 1, f"id {one} is already on line {row[one] + 1}")
        row[one] = place
    return row


def _rows_of(ids: Ints, row: Ints) -> Ints:
    """Looks up `ids` in what `_row_of_id` made; -1 for those it does not know."""
    known = (ids >= 0) & (ids < len(row))
    return np.where(known, row[np.where(known, ids, 0)], -1)
