"""Steam (UCSD): steam_reviews.json.gz and steam_games.json.gz. The lines are Python literals, not JSON."""

from __future__ import annotations

import ast
import datetime
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..interactions import Log, key, title_of
from ..lines import BAD_LINE, Lines
from .files import only


def _literal(text: str) -> dict[str, Any]:
    """Parsed without eval. Raises ValueError for anything but the literal of a dict."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"no Python literal ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a dict, got {type(value).__name__}")
    return value


@dataclass(kw_only=True)
class Options:
    min_hours: float = 0.0
    """Games played for less are left out."""


def read(path: Path, options: Options, *, max_bad: float) -> Log:
    """``path``: the folder of the two files. Dates are days: within a day the order of the file counts."""
    log = Log(noun="Games")
    with Lines(only(path, "steam_reviews*.json*"), max_bad=max_bad) as lines:
        for number, text in lines:
            try:
                line = _literal(text)
                hours = float(line.get("hours") or 0.0)
                if math.isnan(hours):
                    raise ValueError(f"expected hours played, got {hours}")
                if hours < options.min_hours:
                    log.drop(f"less than {options.min_hours:g} hours played")
                    continue
                day = datetime.date.fromisoformat(line["date"]).toordinal() - 719_163
                log.add(key(line["username"]), key(line["product_id"]), day * 86_400)
            except BAD_LINE as error:
                lines.bad(number, error)
    log.report["files"].append(lines.report())
    with Lines(only(path, "steam_games*.json*"), max_bad=max_bad) as lines:
        for number, text in lines:
            try:
                line = _literal(text)
                # A few entries of the public file have no id or no name; their games drop out later, counted.
                if line.get("id") and line.get("app_name"):
                    log.title(key(line["id"]), title_of(line["app_name"]))
            except BAD_LINE as error:
                lines.bad(number, error)
    log.report["files"].append(lines.report())
    return log
