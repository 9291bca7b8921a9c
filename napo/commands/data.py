"""``napo prepare``: from a source of interactions to a prepared data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from napo.command_line.parameters import Options, Seed, one_of
from napo.command_line.process import prepare_process
from napo.data.archives import ARCHIVES
from napo.data.sources import SOURCES
from napo.data.split_kinds import SPLIT_KINDS


def prepare(
    source: Annotated[str, typer.Argument(help=f"The format of PATH: {', '.join(SOURCES)}.", callback=one_of(SOURCES))],
    path: Annotated[Path, typer.Argument(help="A file or a folder, depending on the source.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    split: Annotated[str | None, typer.Option(help=f"One of {', '.join(SPLIT_KINDS)}.")] = None,
    download: Annotated[
        str | None,
        typer.Option(help=f"Fetch it into PATH first, unless it is there already. One of {', '.join(ARCHIVES)}."),
    ] = None,
    max_bad: Annotated[str, typer.Option(help="Share of bad lines above which a file is refused.")] = "1%",
    check_tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Then fail if this model's tokenizer cannot tell the titles apart; OUT stays.",
        ),
    ] = None,
    seed: Seed = 0,
    *,
    options: Options,
) -> None:
    """Read interactions, filter, split and draw candidate lists.

    Example: napo prepare movielens raw/ml-1m --download ml-1m --out data/ml-1m --set test_users=400
    """
    from napo.data.prepare import prepare as run_prepare
    from napo.data.prepare import split_options, summary

    if download is not None:
        from napo.data.downloads import download as run_download

        run_download(download, path, source=source)
    chosen = {"split": split, "seed": seed, "max_bad": _share("--max-bad", max_bad), **options}
    data = run_prepare(source, path, out, *split_options(chosen))
    counts = data.meta["counts"]
    rows = ", ".join(f"{number} {name}" for name, number in counts["rows"].items())
    known = f"{counts['users']} users, {counts['interactions']} interactions" if data.has_users else "users unknown"
    for line in summary(data.meta):
        print(line)
    print(f"{out}: {counts['items']} items, {known}; rows: {rows}")
    if check_tokenizer is not None:
        prepare_process(None)
        from napo.stages import check_titles

        check_titles(data, check_tokenizer)
        print(f"{check_tokenizer}: its tokenizer tells all titles apart")


def _share(option: str, text: str) -> float:
    """ "1%" or "0.01"."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise typer.BadParameter(f"{option}: expected a share like 1% or 0.01; got {text!r}") from None
