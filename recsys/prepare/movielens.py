"""MovieLens, by GroupLens: converters from its files to Parquet shards."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys.config import BucketizeIdsConfig, IdsConfig, SparseFeatureConfig
from recsys.data.storage import DataError
from recsys.prepare.mapping import by_vocabulary
from recsys.prepare.sources import Ints, Source, SourceFile, check_free, split_at_random, split_by_time, write_data_set

GENDERS = ("F", "M")
AGES = (1, 18, 25, 35, 45, 50, 56)  # the lowest age of each bracket, as MovieLens-1M's users.dat writes it
OCCUPATIONS_1M = 21
OCCUPATIONS_100K = (
    "administrator",
    "artist",
    "doctor",
    "educator",
    "engineer",
    "entertainment",
    "executive",
    "healthcare",
    "homemaker",
    "lawyer",
    "librarian",
    "marketing",
    "none",
    "other",
    "programmer",
    "retired",
    "salesman",
    "scientist",
    "student",
    "technician",
    "writer",
)
GENRES_1M = (
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
GENRES_100K = ("unknown", *GENRES_1M)  # in the order of u.item's flags
YEARS_1M = range(1919, 2001)
YEARS_100K = range(1922, 1999)

_ZIP_PREFIX = 3
_PLACES = {"domain_gender": "gender", "domain_age": "age", "domain_occupation": "occupation", "domain_genre": "genres"}
"""Columns to divide the rows by, each with the feature by whose mapping its values become numbers."""
_AGE_NAMES = ("under 18", "18-24", "25-34", "35-44", "45-49", "50-55", "56 and over")
_DOMAIN = {"column": "domain_age", "num_domains": len(AGES), "names": list(_AGE_NAMES)}
_POSITIVE_RATING = 4
_WHERE_1M = "take ml-1m.zip from https://grouplens.org/datasets/movielens/1m/"
_WHERE_100K = "take ml-100k.zip from https://grouplens.org/datasets/movielens/100k/"
_RATING_FIELDS = ("user", "movie", "rating", "timestamp")
# The one movie of MovieLens-100K of which nothing is known; the second is how the atomic files spell it.
_NOT_KNOWN = ("unknown", "unkonwn (unkonwn)")


def convert_movielens_1m(source: Path, output: Path, *, overwrite: bool = False) -> None:
    """Convert MovieLens-1M to Parquet shards split at random into 80 % train, 10 % valid and 10 % test.

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
    check_free(output, overwrite)
    raw, users, movies = _read_1m(source)
    write_data_set(
        output,
        raw,
        split_at_random(raw.num_rows),
        name="movielens-1m",
        columns=_columns(raw, users, movies, "official code", OCCUPATIONS_1M),
        vocabularies=_vocabularies(users, movies),
        sparse=features(),
        mapped_as=_PLACES,
        domain=_DOMAIN,
        overwrite=overwrite,
    )


def read_movielens_1m(source: Path) -> pa.Table:
    """All ratings of MovieLens-1M, in the order of their file, with the raw values of their user and movie beside them.

    Args:
        source: as `convert_movielens_1m` takes it.

    Raises:
        FileNotFoundError: `source` or one of its files is missing.
        DataError: a file does not say what it should; the message names file and line.
    """
    return _read_1m(source)[0]


def convert_movielens_100k(source: Path, output: Path, *, overwrite: bool = False) -> None:
    """Convert MovieLens-100K to Parquet shards split by time.

    Of each user's n ratings in the order of their timestamps, those of one second in the order of the file,
    the last n // 10 are test, the n // 10 before them valid and the rest train. Every split's shards are in
    the order of `numpy.random.default_rng(2024).permutation(rows)`, so reading them in order is already
    shuffled.

    The columns are those of `convert_movielens_1m`: ages are put in its brackets, and the year is that of the
    title, not of the American release; it is null for the one movie that has none. `user_id` and `movie_id`
    are the official ids; every other id is dense, from 0, by the vocabularies that `dataset.json` gives. The
    label is 1 for a rating of 4 or 5. Never feed `rating` to a model.

    Args:
        source: folder or zip file with the official `u.data`, `u.user` and `u.item`, or with RecBole's atomic
            files `ml-100k.inter`, `ml-100k.user` and `ml-100k.item`, at the top or under `ml-100k/`. Both
            give the same rows; where both are, the official ones are read.
        output: becomes the data set: `dataset.json` and a folder of Parquet files for each split.
        overwrite: replace the data set that is at `output`.

    Raises:
        FileNotFoundError: `source` or one of its files is missing.
        FileExistsError: `output` is not empty, and `overwrite` is not set or it holds no data set.
        ValueError: a file does not say what it should; the message names file and line.
    """
    check_free(output, overwrite)
    files = Source(source, "ml-100k", _WHERE_100K)
    if files.has("ml-100k.inter") and not files.has("u.data"):
        header = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"
        users = _users_100k(files.read("ml-100k.user", header), "\t")
        header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
        movies = _movies_100k_atomic(files.read("ml-100k.item", header))
        file = files.read("ml-100k.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float")
    else:
        users = _users_100k(files.read("u.user"), "|")
        movies = _movies_100k(files.read("u.item"))
        file = files.read("u.data")
    ratings = file.numbers(_RATING_FIELDS, "\t")
    raw = _join(file, ratings, users, movies)
    write_data_set(
        output,
        raw,
        split_by_time(ratings["user"], ratings["timestamp"]),
        name="movielens-100k",
        columns=_columns(raw, users, movies, "place in the vocabulary", len(OCCUPATIONS_100K)),
        vocabularies={**_vocabularies(users, movies), "occupation": list(OCCUPATIONS_100K)},
        sparse=features(occupation=by_vocabulary("occupation")),
        mapped_as=_PLACES,
        domain=_DOMAIN,
        overwrite=overwrite,
    )


def features(occupation: IdsConfig | None = None) -> dict[str, SparseFeatureConfig]:
    """Each feature, with the mapping from its raw values; `occupation` is that one's, None for official codes."""
    return {
        "user_id": SparseFeatureConfig(table="user"),
        "movie_id": SparseFeatureConfig(table="movie"),
        "gender": SparseFeatureConfig(table="gender", ids=by_vocabulary("gender")),
        "age": SparseFeatureConfig(
            table="age", ids=BucketizeIdsConfig(type="bucketize", boundaries=tuple(map(float, AGES[1:])), applied=True)
        ),
        "occupation": SparseFeatureConfig(table="occupation", ids=occupation),
        "zip_prefix": SparseFeatureConfig(table="zip_prefix", ids=by_vocabulary("zip_prefix")),
        "genres": SparseFeatureConfig(table="genre", ids=by_vocabulary("genres")),
        "year": SparseFeatureConfig(table="year", ids=by_vocabulary("year")),
    }


@dataclass(frozen=True)
class _Users:
    """Raw columns of a file of users, each of shape (users,); `row` maps an id to a place in them, -1 for no user."""

    file: str
    row: Ints
    gender: pa.StringArray
    age: pa.Int64Array
    occupation: pa.Array
    zip_prefix: pa.StringArray


@dataclass(frozen=True)
class _Movies:
    """Raw columns of a file of movies; `row` maps an id to a place in the others, -1 for no movie."""

    file: str
    row: Ints
    year: pa.Int64Array
    years: range
    genres: pa.ListArray
    first_genre: pa.StringArray
    genre_names: Sequence[str]


def _read_1m(source: Path) -> tuple[pa.Table, _Users, _Movies]:
    files = Source(source, "ml-1m", _WHERE_1M)
    users = _users_1m(files.read("users.dat"))
    movies = _movies_1m(files.read("movies.dat"))
    if files.has("ratings.csv") and not files.has("ratings.dat"):
        file = files.read("ratings.csv", header="user,movie,rating")
        ratings = file.numbers(_RATING_FIELDS[:3], ",")
    else:
        file = files.read("ratings.dat")
        ratings = file.numbers(_RATING_FIELDS, "::")
    return _join(file, ratings, users, movies), users, movies


def _users_1m(file: SourceFile) -> _Users:
    rows = []
    for line, text in file.lines():
        fields = text.split("::")
        if len(fields) != 5 or not _are_ids(fields[0], fields[2], fields[3]):
            raise file.wrong(line, f"{text!r} is not UserID::Gender::Age::Occupation::Zip-code")
        user, gender, age, occupation, zip_code = fields
        if int(occupation) >= OCCUPATIONS_1M:
            raise file.wrong(line, f"occupation is {occupation}, not in 0..{OCCUPATIONS_1M - 1}")
        _check_known(file, line, "gender", gender, GENDERS)
        _check_known(file, line, "age", int(age), AGES)
        rows.append((int(user), gender, int(age), int(occupation), zip_code))
    return _users(file, rows)


def _users_100k(file: SourceFile, separator: str) -> _Users:
    rows = []
    for line, text in file.lines():
        fields = text.split(separator)
        if len(fields) != 5 or not _are_ids(*fields[:2]):
            raise file.wrong(line, f"{text!r} is not {separator.join(('id', 'age', 'gender', 'occupation', 'zip'))}")
        user, age, gender, occupation, zip_code = fields
        if int(age) < AGES[0]:
            raise file.wrong(line, f"age is {age}, below {AGES[0]}")
        _check_known(file, line, "gender", gender, GENDERS)
        _check_known(file, line, "occupation", occupation, OCCUPATIONS_100K)
        rows.append((int(user), gender, int(age), occupation, zip_code))
    return _users(file, rows)


def _users(file: SourceFile, rows: Sequence[tuple[int, str, int, int | str, str]]) -> _Users:
    """Put rows of id, gender, age, occupation and zip code into columns."""
    ids, genders, ages, occupations, zip_codes = zip(*rows, strict=True) if rows else ((),) * 5
    return _Users(
        file=file.name,
        row=_row_of_id(file, ids),
        gender=pa.array(genders, pa.string()),
        age=pa.array(ages, pa.int64()),
        occupation=pa.array(occupations),
        zip_prefix=pa.array([code[:_ZIP_PREFIX] for code in zip_codes], pa.string()),
    )


def _movies_1m(file: SourceFile) -> _Movies:
    # The title is all between the first and the last separator: titles have colons of their own.
    form = re.compile(r"(\d+)::(.*\((\d{4})\))::([^:]+)")
    rows = []
    for line, text in file.lines():
        match = form.fullmatch(text)
        if match is None:
            raise file.wrong(line, f"{text!r} is not MovieID::Title (year)::Genres")
        rows.append((int(match[1]), match[2], match[4].split("|")))
    return _movies(file, rows, YEARS_1M, GENRES_1M)


def _movies_100k(file: SourceFile) -> _Movies:
    rows = []
    for line, text in file.lines():
        fields = text.split("|")
        flags = fields[5:]
        if not _are_ids(fields[0]) or len(flags) != len(GENRES_100K) or not set(flags) <= {"0", "1"}:
            form = f"id|title|release date|video date|URL|{len(GENRES_100K)} genres of 0 or 1"
            raise file.wrong(line, f"{text!r} is not {form}")
        names = [genre for genre, flag in zip(GENRES_100K, flags, strict=True) if flag == "1"]
        rows.append((int(fields[0]), fields[1], names))
    return _movies(file, rows, YEARS_100K, GENRES_100K)


def _movies_100k_atomic(file: SourceFile) -> _Movies:
    rows = []
    for line, text in file.lines():
        fields = text.split("\t")
        if len(fields) != 4 or not _are_ids(fields[0]):
            raise file.wrong(line, f"{text!r} is not id, title, year and genres, separated by tabs")
        movie, title, year, genres = fields
        # The year is what the last brackets of the official title hold, even where that is the V of a video.
        rows.append((int(movie), f"{title} ({year})", genres.split()))
    return _movies(file, rows, YEARS_100K, GENRES_100K)


def _movies(
    file: SourceFile, rows: Sequence[tuple[int, str, list[str]]], years: range, genre_names: Sequence[str]
) -> _Movies:
    """Put rows of id, title with year, and names of genres into columns."""
    ids: list[int] = []
    released: list[int | None] = []
    genres = []
    for line, (movie, title, names) in enumerate(rows, start=file.first_line):
        year = re.match(r".*\((\d{4})\)", title)
        if year is None and title not in _NOT_KNOWN:
            raise file.wrong(line, f"title {title!r} has no year")
        if year is not None and int(year[1]) not in years:
            raise file.wrong(line, f"year is {year[1]}, not in {years[0]}..{years[-1]}")
        if not names:
            raise file.wrong(line, "the movie has no genre")
        ids.append(movie)
        released.append(None if year is None else int(year[1]))
        for name in names:
            _check_known(file, line, "genre", name, genre_names)
        genres.append(names)
    return _Movies(
        file=file.name,
        row=_row_of_id(file, ids),
        year=pa.array(released, pa.int64()),
        years=years,
        genres=pa.array(genres, pa.list_(pa.string())),
        first_genre=pa.array([one[0] for one in genres], pa.string()),
        genre_names=genre_names,
    )


def _join(file: SourceFile, ratings: dict[str, Ints], users: _Users, movies: _Movies) -> pa.Table:
    """Put the raw values of its user and movie beside each rating, in the order of the file."""

    def refuse(bad: npt.NDArray[np.bool_], what: str, why: str) -> None:
        if bad.any():
            at = int(bad.argmax())
            raise file.wrong(at + file.first_line, f"{what} {ratings[what][at]} {why}")

    rating = ratings["rating"]
    refuse((rating < 1) | (rating > 5), "rating", "is not in 1..5")
    user, movie = _rows_of(ratings["user"], users.row), _rows_of(ratings["movie"], movies.row)
    refuse(user < 0, "user", f"is not in {users.file}")
    refuse(movie < 0, "movie", f"is not in {movies.file}")
    of_user, of_movie = pa.array(user), pa.array(movie)
    columns = {
        "user_id": pa.array(ratings["user"]),
        "movie_id": pa.array(ratings["movie"]),
        "gender": users.gender.take(of_user),
        "age": users.age.take(of_user),
        "occupation": users.occupation.take(of_user),
        "zip_prefix": users.zip_prefix.take(of_user),
        "genres": movies.genres.take(of_movie),
        "year": movies.year.take(of_movie),
        "domain_gender": users.gender.take(of_user),
        "domain_age": users.age.take(of_user),
        "domain_occupation": users.occupation.take(of_user),
        "domain_genre": movies.first_genre.take(of_movie),
        "rating": pa.array(rating.astype(np.int8)),
        "label": pa.array((rating >= _POSITIVE_RATING).astype(np.int8)),
    }
    if "timestamp" in ratings:
        columns["timestamp"] = pa.array(ratings["timestamp"])
    return pa.table(columns)


def _columns(
    raw: pa.Table, users: _Users, movies: _Movies, occupation: str, occupations: int
) -> dict[str, dict[str, Any]]:
    """What each column means; an id column's size is one more than its largest id can be."""

    def ids(size: int, meaning: str, type_: str = "int64") -> dict[str, Any]:
        return {"type": type_, "size": size, "meaning": meaning}

    genres = len(movies.genre_names)
    unknown = ", null for a movie without" if movies.year.null_count else ""
    columns = {
        "user_id": ids(len(users.row), "official id, from 1"),
        "movie_id": ids(len(movies.row), "official id, from 1"),
        "gender": ids(len(GENDERS), "place in the vocabulary"),
        "age": ids(len(AGES), "place of the age bracket in the vocabulary"),
        "occupation": ids(occupations, occupation),
        "zip_prefix": ids(len(_zip_prefixes(users)), "place of the zip code's first 3 characters in the vocabulary"),
        "genres": ids(genres, "places in the vocabulary", "list<int64>"),
        "year": ids(len(movies.years), f"of release, less {movies.years[0]}{unknown}"),
        "domain_gender": ids(len(GENDERS), "gender again, to divide the rows by"),
        "domain_age": ids(len(AGES), "age again, to divide the rows by"),
        "domain_occupation": ids(occupations, "occupation again, to divide the rows by"),
        "domain_genre": ids(genres, "the first of genres, to divide the rows by"),
        "rating": {"type": "int8", "meaning": "1 to 5 stars: never a feature"},
        "label": {"type": "int8", "meaning": f"1 for a rating of {_POSITIVE_RATING} or more"},
        "timestamp": {"type": "int64", "meaning": "of the rating, in seconds since 1970"},
    }
    return {name: columns[name] for name in raw.column_names}


def _zip_prefixes(users: _Users) -> list[str]:
    return sorted(set(users.zip_prefix.to_pylist()))


def _vocabularies(users: _Users, movies: _Movies) -> dict[str, Sequence[Any]]:
    return {
        "gender": list(GENDERS),
        "age": list(AGES),
        "zip_prefix": _zip_prefixes(users),
        "genres": list(movies.genre_names),
        "year": list(movies.years),
    }


def _check_known(file: SourceFile, line: int, what: str, value: int | str, known: Sequence[int | str]) -> None:
    if value not in known:
        raise file.wrong(line, f"{what} is {value!r}, not one of {', '.join(map(str, known))}")


def _are_ids(*fields: str) -> bool:
    return all(field.isascii() and field.isdigit() for field in fields)


def _row_of_id(file: SourceFile, ids: Sequence[int]) -> Ints:
    """An array that maps each id to its place in `ids`, and any other up to the largest to -1."""
    if not ids:
        raise DataError(f"{file.path} is empty; {file.where}")
    if max(ids) > 1_000_000:
        raise file.wrong(ids.index(max(ids)) + file.first_line, f"id {max(ids)} is beyond reason")
    row = np.full(max(ids) + 1, -1, np.int64)
    for place, one in enumerate(ids):
        if row[one] >= 0:
            raise file.wrong(place + file.first_line, f"id {one} is already on line {row[one] + file.first_line}")
        row[one] = place
    return row


def _rows_of(ids: Ints, row: Ints) -> Ints:
    """Look up `ids` in what `_row_of_id` made; -1 for those it does not know."""
    known = (ids >= 0) & (ids < len(row))
    return np.where(known, row[np.where(known, ids, 0)], -1)
