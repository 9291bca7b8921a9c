"""Files as others publish them: what is not as published is said."""

from __future__ import annotations

from pathlib import Path

import data_files
import pytest
from table_folder import Folder, kept


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


@pytest.mark.parametrize(
    "source, name, header",
    [
        ("movielens", "ratings.csv", "userId, movieId, rating, timestamp"),
        ("movielens", "movies.csv", "movieId, title, genres"),
        ("lastfm", "user_taggedartists-timestamps.dat", "userID, artistID, tagID, timestamp"),
        ("lastfm", "artists.dat", "id, name, url, pictureURL"),
    ],
)
def test_a_header_of_a_published_file_is_looked_at(source: str, name: str, header: str, folder: Folder) -> None:
    {"movielens": data_files.movielens_csv, "lastfm": data_files.lastfm}[source](folder.path, data_files.log())
    path = folder.path / name
    head, *rows = lines_of(path)
    path.write_text("".join(["\ufeff", '"' + head.strip() + '"\n' if "," in head else head, *rows]))
    assert kept(folder.prepare(source)) == len(data_files.log())
    path.write_text("".join(rows))
    with pytest.raises(ValueError, match=rf"{name}:1: expected the header {header}; got {rows[0][:1]}"):
        folder.prepare(source)
    first, second, *others = head.strip().replace("\t", ",").split(",")
    path.write_text("".join([",".join([second, first, *others]) + "\n", *rows]))
    with pytest.raises(ValueError, match=r"expected the header .* files of other columns are read as csv"):
        folder.prepare(source)


def test_a_bad_id_of_an_artist_is_a_bad_line(folder: Folder) -> None:
    data_files.lastfm(folder.path, data_files.log())
    with (folder.path / "artists.dat").open("a") as file:
        file.write("\tNobody\tx\tx\n")
    data = folder.prepare("lastfm", max_bad=0.1)
    assert kept(data) == len(data_files.log())
    assert data.meta["files"][1]["bad_examples"] == ["line 42: an empty user or item"]


def test_ratings_of_two_data_sets_are_not_chosen_from(folder: Folder) -> None:
    data_files.movielens_1m(folder.path, data_files.log())
    data_files.movielens_csv(folder.path, data_files.log(seed=1))
    with pytest.raises(ValueError, match=r"expected the ratings of one data set, found ratings.dat, ratings.csv; move"):
        folder.prepare("movielens")
    (folder.path / "ratings.csv").unlink()
    assert kept(folder.prepare("movielens")) == len(data_files.log())


def test_a_rating_that_is_no_number_is_above_no_limit(folder: Folder) -> None:
    data_files.movielens_1m(folder.path, data_files.log())
    path = folder.path / "ratings.dat"
    path.write_text(path.read_text().replace("::3::", "::nan::", 2))
    data = folder.prepare("movielens", min_rating=2)
    assert kept(data) == len(data_files.log()) - 2 and data.meta["files"][0]["bad_lines"] == 2
