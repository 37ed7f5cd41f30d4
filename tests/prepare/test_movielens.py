"""MovieLens comes out of its official files row for row, or with an error that says where."""

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.config import load_config
from recsys.prepare import writing
from recsys.prepare.movielens import (
    GENRES_1M,
    GENRES_100K,
    OCCUPATIONS_100K,
    YEARS_1M,
    convert_movielens_1m,
    convert_movielens_100k,
)

USERS = ["1::F::1::10::48067", "2::M::56::16::70072", "3::M::25::15::98107-2117", "5::F::18::0::48100"]
MOVIES = [
    "1::Toy Story (1995)::Animation|Children's|Comedy",
    "4::Cité des enfants perdus, La (City of Lost Children: The) (1919)::Sci-Fi",
    "9::Star Trek: First Contact: A::B (2000)::Action|Adventure|Sci-Fi",
]
RATINGS = [f"{(1, 2, 3, 5)[row % 4]}::{(1, 4, 9)[row % 3]}::{row % 5 + 1}::{978300760 + row}" for row in range(41)]
# The columns of a row that hang on its user and movie alone, worked out by hand.
USER_COLUMNS = {  # gender, age, occupation, zip_prefix of 480, 481, 700, 981
    1: (0, 0, 10, 0),
    2: (1, 6, 16, 2),
    3: (1, 2, 15, 3),
    5: (0, 1, 0, 1),
}
MOVIE_COLUMNS = {  # genres, year
    1: ([2, 3, 4], 76),
    4: ([14], 0),
    9: ([0, 1, 14], 81),
}


def write_official(directory: Path, **files: list[str]) -> Path:
    """Writes the three files; a keyword such as users=[...] replaces one, and an empty list leaves it out."""
    directory.mkdir(parents=True)
    for name, lines in {"users": USERS, "movies": MOVIES, "ratings": RATINGS, **files}.items():
        if lines:
            (directory / f"{name}.dat").write_bytes(("\n".join(lines) + "\n").encode("latin-1"))
    return directory


def read(output: Path) -> pa.Table:
    """Reads all splits, in the order of the permutation."""
    return pa.concat_tables(pq.read_table(output / split) for split in ("train", "valid", "test"))


def row_of(
    user: int, movie: int, rating: int, user_columns: tuple[Any, ...], movie_columns: tuple[Any, ...]
) -> dict[str, Any]:
    """All columns of a rating's row but its timestamp."""
    gender, age, occupation, zip_prefix = user_columns
    genres, year = movie_columns
    return {
        "user_id": user,
        "movie_id": movie,
        "gender": gender,
        "age": age,
        "occupation": occupation,
        "zip_prefix": zip_prefix,
        "genres": genres,
        "year": year,
        "domain_gender": gender,
        "domain_age": age,
        "domain_occupation": occupation,
        "domain_genre": genres[0],
        "rating": rating,
        "label": int(rating >= 4),
    }


def check(output: Path, *, timestamps: bool = True) -> None:
    """Compares every value of the shards with what the fixture's lines say."""
    rows = read(output).to_pylist()
    for place, index in enumerate(np.random.default_rng(2024).permutation(len(RATINGS))):
        user, movie, rating, timestamp = map(int, RATINGS[index].split("::"))
        expected = row_of(user, movie, rating, USER_COLUMNS[user], MOVIE_COLUMNS[movie])
        assert rows[place] == {**expected, **({"timestamp": timestamp} if timestamps else {})}


def test_every_value_of_the_official_files(tmp_path: Path) -> None:
    convert_movielens_1m(write_official(tmp_path / "source"), tmp_path / "out")
    check(tmp_path / "out")
    summary = writing.read_summary(tmp_path / "out")
    assert summary is not None and writing.is_complete(tmp_path / "out", summary)
    assert {split: told["rows"] for split, told in summary["splits"].items()} == {
        "train": 32,
        "valid": 4,
        "test": 5,
    }
    assert summary["splits"]["train"]["files"] == 8
    sizes = {name: told["size"] for name, told in summary["columns"].items() if "size" in told}
    assert sizes == {
        "user_id": 6,
        "movie_id": 10,
        "gender": 2,
        "age": 7,
        "occupation": 21,
        "zip_prefix": 4,
        "genres": 18,
        "year": 82,
        "domain_gender": 2,
        "domain_age": 7,
        "domain_occupation": 21,
        "domain_genre": 18,
    }
    assert summary["vocabularies"]["zip_prefix"] == ["480", "481", "700", "981"]
    assert summary["vocabularies"]["year"] == list(YEARS_1M) and len(GENRES_1M) == 18


def test_types(tmp_path: Path) -> None:
    convert_movielens_1m(write_official(tmp_path / "source"), tmp_path / "out")
    table = pq.read_table(tmp_path / "out/train")
    special = {"rating": pa.int8(), "label": pa.int8(), "genres": pa.list_(pa.int64())}
    for field in table.schema:
        assert field.type.equals(special.get(field.name, pa.int64())), field.name


@pytest.mark.parametrize("folder", ["ml-1m/", ""])
def test_zip_file(tmp_path: Path, folder: str) -> None:
    source = write_official(tmp_path / "source")
    with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as archive:
        for path in source.iterdir():
            archive.write(path, folder + path.name)
    convert_movielens_1m(tmp_path / "ml-1m.zip", tmp_path / "out")
    check(tmp_path / "out")


def test_folder_around_the_official_one(tmp_path: Path) -> None:
    write_official(tmp_path / "source/ml-1m")
    convert_movielens_1m(tmp_path / "source", tmp_path / "out")
    check(tmp_path / "out")


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_ratings_csv_in_place_of_ratings_dat(tmp_path: Path, line_break: str) -> None:
    source = write_official(tmp_path / "source", ratings=[])
    lines = ["user,movie,rating", *(",".join(line.split("::")[:3]) for line in RATINGS)]
    (source / "ratings.csv").write_bytes((line_break.join(lines) + line_break).encode())
    convert_movielens_1m(source, tmp_path / "out")
    check(tmp_path / "out", timestamps=False)


def broken(lines: list[str], line: int, text: str) -> list[str]:
    """Returns `lines` with line number `line`, from 1, replaced."""
    return [*lines[: line - 1], text, *lines[line:]]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"ratings": []}, "source has no ratings.dat; take ml-1m.zip"),
        ({"users": []}, "source has no users.dat; take ml-1m.zip"),
        ({"movies": []}, "source has no movies.dat; take ml-1m.zip"),
        ({"ratings": broken(RATINGS, 7, "1::1::5")}, r"ratings.dat, line 7: '1::1::5' is not user::movie"),
        ({"ratings": broken(RATINGS, 7, "1::1::5:9:978300760")}, "ratings.dat, line 7: '1::1::5:9:"),
        ({"ratings": broken(RATINGS, 7, "1::1::five::978300760")}, "ratings.dat, line 7: '1::1::five"),
        ({"ratings": broken(RATINGS, 7, "1:1:1::5::978300760")}, "ratings.dat, line 7: '1:1:1::5"),
        ({"ratings": broken(RATINGS, 7, "1::::5::978300760")}, "ratings.dat, line 7: '1::::5"),
        ({"ratings": broken(RATINGS, 7, "")}, "ratings.dat, line 7: '' is not"),
        (
            {"ratings": broken(RATINGS, 7, "1::1::6::978300760")},
            "ratings.dat, line 7: rating 6 is not in 1..5",
        ),
        (
            {"ratings": broken(RATINGS, 7, "1::1::0::978300760")},
            "ratings.dat, line 7: rating 0 is not in 1..5",
        ),
        ({"ratings": broken(RATINGS, 7, "4::1::5::978300760")}, "line 7: user 4 is not in users.dat"),
        ({"ratings": broken(RATINGS, 7, "99::1::5::978300760")}, "line 7: user 99 is not in users.dat"),
        ({"ratings": broken(RATINGS, 7, "1::2::5::978300760")}, "line 7: movie 2 is not in movies.dat"),
        ({"ratings": broken(RATINGS, 7, "1::3953::5::978300760")}, "line 7: movie 3953 is not in movies.dat"),
        ({"users": broken(USERS, 2, "2::M::56::16")}, "users.dat, line 2: '2::M::56::16' is not UserID::"),
        (
            {"users": broken(USERS, 2, "2::X::56::16::70072")},
            "users.dat, line 2: gender is 'X', not one of F, M",
        ),
        (
            {"users": broken(USERS, 2, "2::M::57::16::70072")},
            "users.dat, line 2: age is 57, not one of 1, 18",
        ),
        (
            {"users": broken(USERS, 2, "2::M::56::21::70072")},
            r"users.dat, line 2: occupation is 21, not in 0..20",
        ),
        ({"users": broken(USERS, 2, "1::M::56::16::70072")}, "users.dat, line 2: id 1 is already on line 1"),
        (
            {"users": broken(USERS, 2, "99999999::M::56::16::70072")},
            "users.dat, line 2: id 99999999 is beyond",
        ),
        ({"users": [""]}, "users.dat, line 1: '' is not"),
        (
            {"movies": broken(MOVIES, 3, "9::Untitled::Action")},
            "movies.dat, line 3: '9::Untitled::Action' is not",
        ),
        (
            {"movies": broken(MOVIES, 3, "9::Late (2001)::Action")},
            "movies.dat, line 3: year is 2001, not in 1919",
        ),
        (
            {"movies": broken(MOVIES, 3, "9::Odd (1999)::Action|Odd")},
            "movies.dat, line 3: genre is 'Odd', not one of Action, Adv",
        ),
    ],
)
def test_errors_name_file_and_line_and_leave_nothing(tmp_path: Path, files: Any, message: str) -> None:
    source = write_official(tmp_path / "source", **files)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        convert_movielens_1m(source, tmp_path / "out")
    assert "https://grouplens.org" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["users", "movies", "ratings"])
def test_an_empty_file_is_named(tmp_path: Path, name: str) -> None:
    source = write_official(tmp_path / "source")
    (source / f"{name}.dat").write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name}.dat (is empty|holds no rows)"):
        convert_movielens_1m(source, tmp_path / "out")


def test_errors_in_ratings_csv_count_its_header(tmp_path: Path) -> None:
    source = write_official(tmp_path / "source", ratings=[])
    (source / "ratings.csv").write_text("user,movie,rating\n1,1,5\n1,1,9\n")
    with pytest.raises(ValueError, match=r"ratings.csv, line 3: rating 9 is not in 1..5"):
        convert_movielens_1m(source, tmp_path / "out")
    (source / "ratings.csv").write_text("user,movie,rating\n1,1,5\n1,1\n")
    with pytest.raises(ValueError, match=r"ratings.csv, line 3: '1,1' is not user,movie,rating"):
        convert_movielens_1m(source, tmp_path / "out")
    (source / "ratings.csv").write_text("1,1,5\n")
    with pytest.raises(ValueError, match=r"ratings.csv, line 1: the header is '1,1,5', not 'user,movie,rating'"):
        convert_movielens_1m(source, tmp_path / "out")


def test_a_source_that_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing does not exist; take ml-1m\.zip"):
        convert_movielens_1m(tmp_path / "missing", tmp_path / "out")
    (tmp_path / "text").write_text("not a zip file")
    with pytest.raises(ValueError, match="text is neither a folder nor a zip file"):
        convert_movielens_1m(tmp_path / "text", tmp_path / "out")


def test_output_is_replaced_only_on_request_and_only_if_a_data_set(tmp_path: Path) -> None:
    source, output = write_official(tmp_path / "source"), tmp_path / "out"
    convert_movielens_1m(source, output)
    with pytest.raises(FileExistsError, match="out is not empty; name another folder, or pass --overwrite"):
        convert_movielens_1m(source, output)
    (output / "test/part-00000.parquet").unlink()
    convert_movielens_1m(source, output, overwrite=True)
    check(output)
    (output / "dataset.json").unlink()
    with pytest.raises(FileExistsError, match=r"out holds no dataset.json, so it is not replaced"):
        convert_movielens_1m(source, output, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


# MovieLens-100K, in the form of u.user, u.item and u.data.
USERS_100K = ["1|24|M|technician|85711", "2|17|F|other|V3N4P", "3|7|F|student|85201", "5|56|M|none|06355"]
FLAGS = {1: "0001110000000000000", 4: "0000001000000000100", 9: "1000000000000000000", 7: "0001100000000000000"}
MOVIES_100K = [
    "1|Toy Story (1995)|01-Jan-1995||http://us.imdb.com/M/title-exact?Toy%20Story%20(1995)",
    "4|Cité des enfants perdus, La (City of Lost Children) (1922) |14-Feb-1997||",
    "9|unknown|||",
    "7|Land Before Time III: The Time of the Great Giving (1995) (V)|01-Jan-1995|02-Jan-1995|",
]
MOVIES_100K = [f"{line}|{'|'.join(FLAGS[int(line[0])])}" for line in MOVIES_100K]
RATINGS_100K = [
    f"{(1, 2, 3, 5)[row % 4]}\t{(1, 4, 9, 7)[row // 4 % 4]}\t{row % 5 + 1}\t{978300760 + row * 7 % 12}"
    for row in range(100)
]
USER_COLUMNS_100K = {  # gender, age, occupation, zip_prefix of 063, 852, 857, V3N
    1: (1, 1, 19, 2),
    2: (0, 0, 13, 3),
    3: (0, 0, 18, 1),
    5: (1, 6, 12, 0),
}
MOVIE_COLUMNS_100K = {  # genres, year
    1: ([3, 4, 5], 73),
    4: ([6, 16], 0),
    9: ([0], None),
    7: ([3, 4], 73),
}
ATOMIC_MOVIES = [
    "1\tToy Story\t1995\tAnimation Children's Comedy",
    "4\tCité des enfants perdus, La (City of Lost Children)\t1922\tCrime Thriller",
    "9\tunkonwn\tunkonwn\tunknown",
    "7\tLand Before Time III: The Time of the Great Giving (1995)\tV\tAnimation Children's",
]
ATOMIC_HEADERS = {
    "user": "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token",
    "item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
    "inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float",
}


def write_100k(directory: Path, **files: list[str]) -> Path:
    """Writes the three official files; keywords as those of `write_official`."""
    directory.mkdir(parents=True)
    for name, lines in {"user": USERS_100K, "item": MOVIES_100K, "data": RATINGS_100K, **files}.items():
        if lines:
            (directory / f"u.{name}").write_bytes(("\n".join(lines) + "\n").encode("latin-1"))
    return directory


def write_atomic(directory: Path, **files: list[str]) -> Path:
    """Writes RecBole's three files, which say the same."""
    directory.mkdir(parents=True)
    users = [line.replace("|", "\t") for line in USERS_100K]
    for name, lines in {"user": users, "item": ATOMIC_MOVIES, "inter": RATINGS_100K, **files}.items():
        if lines:
            text = "\n".join([ATOMIC_HEADERS[name], *lines]) + "\n"
            (directory / f"ml-100k.{name}").write_text(text, encoding="utf-8")
    return directory


def content(output: Path) -> dict[str, bytes]:
    """Every file of a data set."""
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_every_value_of_the_100k_files(tmp_path: Path) -> None:
    convert_movielens_100k(write_100k(tmp_path / "source"), tmp_path / "out")
    rows = {split: pq.read_table(tmp_path / "out" / split).to_pylist() for split in ("train", "valid", "test")}
    assert {split: len(part) for split, part in rows.items()} == {"train": 84, "valid": 8, "test": 8}
    order = np.random.default_rng(2024).permutation(len(RATINGS_100K))
    stamps = [int(line.split("\t")[3]) for line in RATINGS_100K]
    splits: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    for row in order:
        # How many of the 25 ratings of the same user come later; every fourth line is the same user's.
        later = sum((stamps[other], other) > (stamps[row], row) for other in range(row % 4, 100, 4))
        splits["test" if later < 2 else "valid" if later < 4 else "train"].append(row)
    for split, part in splits.items():
        for told, row in zip(rows[split], part, strict=True):
            user, movie, rating, timestamp = map(int, RATINGS_100K[row].split("\t"))
            expected = row_of(user, movie, rating, USER_COLUMNS_100K[user], MOVIE_COLUMNS_100K[movie])
            assert told == {**expected, "timestamp": timestamp}
    summary = writing.read_summary(tmp_path / "out")
    assert summary is not None and writing.is_complete(tmp_path / "out", summary)
    assert summary["name"] == "movielens-100k"
    assert summary["vocabularies"]["zip_prefix"] == ["063", "852", "857", "V3N"]
    assert summary["vocabularies"]["occupation"] == list(OCCUPATIONS_100K)
    assert summary["vocabularies"]["genres"] == list(GENRES_100K)
    sizes = {name: told["size"] for name, told in summary["columns"].items() if "size" in told}
    assert sizes == {
        "user_id": 6,
        "movie_id": 10,
        "gender": 2,
        "age": 7,
        "occupation": 21,
        "zip_prefix": 4,
        "genres": 19,
        "year": 77,
        "domain_gender": 2,
        "domain_age": 7,
        "domain_occupation": 21,
        "domain_genre": 19,
    }


def test_atomic_files_and_a_zip_file_give_the_data_set_of_the_official_folder(tmp_path: Path) -> None:
    source = write_100k(tmp_path / "source")
    with zipfile.ZipFile(tmp_path / "ml-100k.zip", "w") as archive:
        for path in source.iterdir():
            archive.write(path, f"ml-100k/{path.name}")
    convert_movielens_100k(source, tmp_path / "official")
    convert_movielens_100k(tmp_path / "ml-100k.zip", tmp_path / "zip")
    write_atomic(tmp_path / "around/ml-100k")
    convert_movielens_100k(tmp_path / "around", tmp_path / "atomic")
    assert content(tmp_path / "official") == content(tmp_path / "zip") == content(tmp_path / "atomic")


@pytest.mark.parametrize(
    ("write", "files", "message"),
    [
        (write_100k, {"data": []}, "source has no u.data; take ml-100k.zip"),
        (write_100k, {"user": []}, "source has no u.user; take ml-100k.zip"),
        (write_100k, {"item": []}, "source has no u.item; take ml-100k.zip"),
        (write_atomic, {"user": []}, "source has no ml-100k.user; take ml-100k.zip"),
        (write_100k, {"data": broken(RATINGS_100K, 7, "1\t1\t5")}, "u.data, line 7: '1.*' is not user"),
        (write_100k, {"data": broken(RATINGS_100K, 7, "4\t1\t5\t9")}, "u.data, line 7: user 4 is not in u.user"),
        (write_atomic, {"inter": broken(RATINGS_100K, 7, "1\t2\t5\t9")}, "r, line 8: movie 2 is not in ml-100k.item"),
        (write_atomic, {"inter": broken(RATINGS_100K, 7, "1\t1\t3.5\t9")}, "ml-100k.inter, line 8: .*whole number"),
        (write_100k, {"user": broken(USERS_100K, 2, "2|17|F|other")}, r"u.user, line 2: .* is not id\|age\|gender"),
        (write_100k, {"user": broken(USERS_100K, 2, "2|0|F|other|1")}, "u.user, line 2: age is 0, below 1"),
        (write_100k, {"user": broken(USERS_100K, 2, "2|17|f|other|1")}, "u.user, line 2: gender is 'f', not one of F"),
        (write_100k, {"user": broken(USERS_100K, 2, "2|17|F|poet|1")}, "line 2: occupation is 'poet', not one of adm"),
        (write_atomic, {"user": ["1\t9\tF\tother\t1"] * 2}, "ml-100k.user, line 3: id 1 is already on line 2"),
        (write_100k, {"item": broken(MOVIES_100K, 2, MOVIES_100K[1][:-2])}, r"u.item, line 2: .* is not id\|title"),
        (write_100k, {"item": broken(MOVIES_100K, 2, MOVIES_100K[1][:-1] + "2")}, "u.item, line 2: .*19 genres of 0"),
        (
            write_100k,
            {"item": broken(MOVIES_100K, 2, "4|A (1950)|||" + "|0" * 19)},
            "u.item, line 2: the movie has no g",
        ),
        (write_100k, {"item": broken(MOVIES_100K, 2, "4|Untitled|||" + "|1" * 19)}, "'Untitled' has no year"),
        (write_100k, {"item": broken(MOVIES_100K, 2, "4|A (1999)|||" + "|1" * 19)}, "year is 1999, not in 1922..1998"),
        (write_atomic, {"item": broken(ATOMIC_MOVIES, 2, "4\tA\t1995")}, "ml-100k.item, line 3: .*is not id, title"),
        (write_atomic, {"item": broken(ATOMIC_MOVIES, 2, "4\tA\tV\tWar")}, r"line 3: title 'A \(V\)' has no year"),
        (write_atomic, {"item": broken(ATOMIC_MOVIES, 2, "4\tA\t1995\tOdd")}, "line 3: genre is 'Odd', not one of unk"),
    ],
)
def test_100k_errors_name_file_and_line_and_leave_nothing(tmp_path: Path, write: Any, files: Any, message: str) -> None:
    source = write(tmp_path / "source", **files)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        convert_movielens_100k(source, tmp_path / "out")
    assert str(caught.value).endswith("take ml-100k.zip from https://grouplens.org/datasets/movielens/100k/")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_atomic_files_without_their_headers_are_refused(tmp_path: Path) -> None:
    source = write_atomic(tmp_path / "source")
    (source / "ml-100k.item").write_text("\n".join(ATOMIC_MOVIES))
    with pytest.raises(ValueError, match=r"ml-100k.item, line 1: the header is .1.*, not 'item_id:token"):
        convert_movielens_100k(source, tmp_path / "out")


@pytest.mark.skipif("HILOREC_DATA" not in os.environ, reason="HILOREC_DATA names no folder with ml-1m/")
def test_the_real_ratings(tmp_path: Path) -> None:
    convert_movielens_1m(Path(os.environ["HILOREC_DATA"]) / "ml-1m", tmp_path / "out")
    summary = writing.read_summary(tmp_path / "out")
    assert summary is not None and writing.is_complete(tmp_path / "out", summary)
    assert [told["rows"] for told in summary["splits"].values()] == [800_167, 100_021, 100_021]
    assert (summary["columns"]["user_id"]["size"], summary["columns"]["movie_id"]["size"]) == (6041, 3953)
    table = read(tmp_path / "out")
    assert table.num_rows == 1_000_209
    assert table["label"].to_numpy().mean() == pytest.approx(0.575, abs=0.0005)
    assert np.bincount(table["domain_gender"].to_numpy()).tolist() == [246_440, 753_769]
    assert table.group_by("user_id").aggregate([]).num_rows == 6_040


@pytest.mark.skipif("HILOREC_DATA" not in os.environ, reason="HILOREC_DATA names no folder with ml-100k/")
def test_the_real_100k_ratings(tmp_path: Path) -> None:
    source = Path(os.environ["HILOREC_DATA"]) / "ml-100k"
    convert_movielens_100k(source, tmp_path / "out")
    summary = writing.read_summary(tmp_path / "out")
    assert summary is not None and writing.is_complete(tmp_path / "out", summary)
    assert {split: told["rows"] for split, told in summary["splits"].items()} == {
        "train": 80_808,
        "valid": 9_596,
        "test": 9_596,
    }
    table = read(tmp_path / "out")
    assert table.num_rows == 100_000
    assert table["label"].to_numpy().mean() == pytest.approx(0.55375)
    assert table["year"].null_count == 9  # ratings of the one movie without a title
    assert table.group_by("user_id").aggregate([]).num_rows == 943
    assert table.group_by("movie_id").aggregate([]).num_rows == 1_682

    ends = {}
    for split in ("train", "valid", "test"):
        part = pq.read_table(tmp_path / "out" / split).group_by("user_id")
        ends[split] = part.aggregate([("timestamp", "min"), ("timestamp", "max")]).sort_by("user_id")
        assert ends[split].num_rows == 943  # each user has 20 ratings at least, so 2 or more in each split
    for earlier, later in (("train", "valid"), ("valid", "test")):
        assert np.all(ends[earlier]["timestamp_max"].to_numpy() <= ends[later]["timestamp_min"].to_numpy())

    # The config's tables are as large as the data asks for.
    config = load_config(Path(__file__).parents[2] / "configs/movielens_100k.yaml")
    for feature, told in config.features.sparse.items():
        assert config.tables[told.table].num_embeddings == summary["columns"][feature]["size"], feature


@pytest.mark.skipif("HILOREC_DATA" not in os.environ, reason="HILOREC_DATA names no folder with ml-100k/")
def test_the_real_100k_files_in_their_official_form(tmp_path: Path) -> None:
    # The official files again, as far as the atomic ones tell: users and ratings to the letter, movies without dates.
    atomic = Path(os.environ["HILOREC_DATA"]) / "ml-100k"
    users, movies, ratings = (
        (atomic / f"ml-100k.{name}").read_text(encoding="utf-8").splitlines()[1:] for name in ("user", "item", "inter")
    )
    official = []
    for line in movies:
        movie, title, year, genres = line.split("\t")
        whole = "unknown" if title == "unkonwn" else f"{title} ({year})"
        flags = "|".join(str(int(genre in genres.split(" "))) for genre in GENRES_100K)
        official.append(f"{movie}|{whole}||||{flags}")
    source = write_100k(
        tmp_path / "source", user=[line.replace("\t", "|") for line in users], item=official, data=ratings
    )
    convert_movielens_100k(source, tmp_path / "official")
    convert_movielens_100k(atomic, tmp_path / "atomic")
    assert content(tmp_path / "official") == content(tmp_path / "atomic")
