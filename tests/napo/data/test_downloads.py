"""Downloads from a real HTTP server on this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO

import pytest
from data_files import prepare

from napo.data import downloads
from napo.data.downloads import Archive, download

RATINGS = "".join(
    f"{user}\t{item}\t5\t{100 * user + item}\n" for user in range(1, 13) for item in range(6 * user - 5, 6 * user + 1)
)
MOVIES = "".join(f"{item}|Film {item} (1990)|01-Jan-1990\n" for item in range(1, 73))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Archive]:
    """A small ml-100k behind an address; ``served/ml.zip`` is the file."""
    (tmp_path / "served").mkdir()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("ml-100k/u.data", RATINGS)
        file.writestr("ml-100k/u.item", MOVIES)
    (tmp_path / "served/ml.zip").write_bytes(buffer.getvalue())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made = Archive(
        "movielens",
        f"http://127.0.0.1:{server.server_address[1]}/ml.zip",
        hashlib.sha256(buffer.getvalue()).hexdigest(),
        "ml-100k",
    )
    monkeypatch.setitem(downloads.ARCHIVES, "ml-100k", made)
    yield made
    server.shutdown()
    server.server_close()


def test_what_comes_can_be_prepared_and_comes_once(archive: Archive, tmp_path: Path) -> None:
    folder = download("ml-100k", tmp_path / "raw/ml", source="movielens")
    data = prepare("movielens", folder, tmp_path / "out", min_user=1, min_item=1)
    assert data.num_items == 72 and data.meta["counts"]["users"] == 12
    (tmp_path / "served/ml.zip").unlink()
    assert download("ml-100k", folder, source="movielens") == folder
    assert [path.name for path in folder.parent.iterdir()] == ["ml"]


def test_other_bytes_leave_nothing(archive: Archive, tmp_path: Path) -> None:
    with (tmp_path / "served/ml.zip").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match=f"came with SHA-256 [0-9a-f]{{64}}, expected {archive.sha256}; try again"):
        download("ml-100k", tmp_path / "raw/ml")
    assert list((tmp_path / "raw").iterdir()) == []


def test_a_download_that_is_cut_off_says_so_and_leaves_nothing(archive: Archive, tmp_path: Path) -> None:
    class Cut(Quiet):
        def copyfile(self, source: IO[bytes], outputfile: IO[bytes]) -> None:
            outputfile.write(source.read(200))

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Cut, directory=str(tmp_path / "served")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/ml.zip"
    downloads.ARCHIVES["ml-100k"] = dataclasses.replace(archive, address=address)  # the fixture puts it back
    try:
        with pytest.raises(ValueError, match=r"cut off after 200 of \d+ bytes; try again"):
            download("ml-100k", tmp_path / "raw/ml")
    finally:
        server.shutdown()
        server.server_close()
    assert list((tmp_path / "raw").iterdir()) == []


def test_no_network(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "served/ml.zip").unlink()
    with pytest.raises(ValueError, match=r"cannot fetch http://127.0.0.1.* \(.*[Nn]ot [Ff]ound\); check the network"):
        download("ml-100k", tmp_path / "ml")
    downloads.ARCHIVES["ml-100k"] = dataclasses.replace(archive, address="http://127.0.0.1:9/ml.zip")  # nobody listens
    with pytest.raises(ValueError, match=r"cannot fetch http://127.0.0.1:9/ml.zip \(.*refused\); check the network"):
        download("ml-100k", tmp_path / "ml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["served"]


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="expected one of ml-100k, ml-1m, ml-20m, ml-25m, ml-latest-small for movielens, got 'ml-2m'"
    ):
        download("ml-2m", tmp_path / "ml", source="movielens")
    with pytest.raises(ValueError, match="goodreads is published without a checksum; fetch its files from https://"):
        download("goodreads", tmp_path / "books", source="goodreads")
    with pytest.raises(ValueError, match="this source has no public address, got 'ml-1m'"):
        download("ml-1m", tmp_path / "ml", source="csv")
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="mine: exists and is not ml-1m"):
        download("ml-1m", tmp_path / "mine", source="movielens")
