"""MovieLens-1M comes out of its official files row for row, or with an error that says where."""

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.data import shards
from recsys.data.public import FIRST_YEAR, GENRES, convert_movielens_1m, split_sizes

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


def check(output: Path, *, timestamps: bool = True) -> None:
    """Compares every value of the shards with what the fixture's lines say."""
    rows = read(output).to_pylist()
    for place, index in enumerate(np.random.default_rng(2024).permutation(len(RATINGS))):
        user, movie, rating, timestamp = map(int, RATINGS[index].split("::"))
        gender, age, occupation, zip_prefix = USER_COLUMNS[user]
        genres, year = MOVIE_COLUMNS[movie]
        assert rows[place] == {
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
            **({"timestamp": timestamp} if timestamps else {}),
        }


def test_every_value_of_the_official_files(tmp_path: Path) -> None:
    convert_movielens_1m(write_official(tmp_path / "source"), tmp_path / "out")
    check(tmp_path / "out")
    summary = shards.read_summary(tmp_path / "out")
    assert summary is not None and shards.is_complete(tmp_path / "out", summary)
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
    assert summary["vocabularies"]["year"][0] == FIRST_YEAR and len(GENRES) == 18


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


def test_split_sizes_are_those_of_the_published_figures() -> None:
    assert split_sizes(1_000_209) == {"train": 800_167, "valid": 100_021, "test": 100_021}
    for rows in range(100):
        sizes = split_sizes(rows)
        assert sum(sizes.values()) == rows and 0 <= sizes["test"] - sizes["valid"] <= 1


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
            "movies.dat, line 3: unknown genre 'Odd'",
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
    with pytest.raises(ValueError, match=f"{name}.dat (is empty|holds no ratings)"):
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


@pytest.mark.skipif("HILOREC_DATA" not in os.environ, reason="HILOREC_DATA names no folder with ml-1m/")
def test_the_real_ratings(tmp_path: Path) -> None:
    convert_movielens_1m(Path(os.environ["HILOREC_DATA"]) / "ml-1m", tmp_path / "out")
    summary = shards.read_summary(tmp_path / "out")
    assert summary is not None and shards.is_complete(tmp_path / "out", summary)
    assert [told["rows"] for told in summary["splits"].values()] == [800_167, 100_021, 100_021]
    assert (summary["columns"]["user_id"]["size"], summary["columns"]["movie_id"]["size"]) == (6041, 3953)
    table = read(tmp_path / "out")
    assert table.num_rows == 1_000_209
    assert table["label"].to_numpy().mean() == pytest.approx(0.575, abs=0.0005)
    assert np.bincount(table["domain_gender"].to_numpy()).tolist() == [246_440, 753_769]
    assert table.group_by("user_id").aggregate([]).num_rows == 6_040
