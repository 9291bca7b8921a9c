"""What is wrong with a request, in the words of its fields. pydantic's own name what it tried in turn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from napo.data.texts import shown
from napo.recommend.recommender import UNKNOWN
from napo.serve.limits import Limits

NO_OBJECT = "body: expected a JSON object, with the header Content-Type: application/json"
FIELDS = ("history", "user", "k", "exclude", "exact", "unknown")
LISTS = ("history", "exclude")
ITEM = "a title, an id, or an object with id or title"
Found = Mapping[str, Any]


def reason(errors: Sequence[Found], limits: Limits, longest: int) -> tuple[int, str, str | None]:
    """pydantic's errors -> the status, the reason, and the field at fault. ``longest``: characters of a title or id."""
    first = errors[0]
    place = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return 400, f"body: not JSON ({first.get('ctx', {}).get('error', 'cannot be read')})", None
    if not place:
        got = first.get("input")  # FastAPI of some versions calls a null missing
        there = "it is empty or null" if first["type"] == "missing" or got is None else f"got {_as_json(got)}"
        return 422, f'body: expected a JSON object, such as {{"user": 17}}; {there}', None
    if place[0] not in FIELDS:
        return 422, f"{shown(place[0], 80)}: not a field; a request has {', '.join(FIELDS)}", shown(place[0], 80)
    if place[0] in LISTS and len(place) > 1:
        place = place[:2]
        expected = ITEM
    else:
        place = place[:1]
        expected = {
            "user": "the id of a user, text or a whole number",
            "k": f"a whole number from 1 to {limits.max_k}",
            "exact": "true or false",
            "unknown": UNKNOWN,
        }.get(place[0], "a list of titles or ids")
    field = ".".join(map(str, place))
    of_field = [error for error in errors if [part for part in error["loc"] if part != "body"][: len(place)] == place]
    for error in of_field:
        if error["type"] == "too_long":
            wanted = f"at most {limits.max_history} items"
            return 422, f"{field}: expected {wanted}; got {error['ctx']['actual_length']}", field
        if error["type"] == "string_too_long":
            return 422, f"{field}: expected at most {longest} characters; got {len(error['input'])}", field
    return 422, f"{field}: expected {expected}; got {_as_json(_value(of_field))}", field


def field_of(message: str) -> str | None:
    """The field that one of our own messages begins with."""
    name = message.partition(":")[0]
    return name if name in FIELDS else None


def _value(errors: Sequence[Found]) -> Any:
    """What stood there: of the errors about one value, and about parts of it, the one about the whole has it."""
    return min(errors, key=lambda error: len(error["loc"]))["input"]


def _as_json(value: Any) -> str:
    return shown(json.dumps(value, default=str), 80)
