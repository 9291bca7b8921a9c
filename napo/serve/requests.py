"""What is sent and what comes back, as FastAPI reads, checks and describes it."""

# Annotations are not postponed here: pydantic reads those of a model that a function makes.
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from napo.data.interactions import EXACT_FLOATS
from napo.recommend import Query, Unknown
from napo.serve.limits import Limits


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class RecommendationModel(BaseModel):
    item: str = Field(description="The item's id in the source of the data.")
    title: str
    score: float


class AnswerModel(BaseModel):
    items: list[RecommendationModel] = Field(description="Best first.")
    model: str = Field(description="What ranked; popularity where nothing is known of who asks.")
    notes: list[str] = Field(description="What was taken for what, and why a list is shorter than asked for.")


class ErrorModel(BaseModel):
    error: str = Field(description="What was expected and what was there.")
    field: str | None = Field(None, description="The field of the request at fault, such as k or history.0.")


def _whole(value: Any) -> Any:
    """2.0 is 2: JSON has one kind of number, and some clients write all of them as floats. Not where a float stands
    for several whole numbers."""
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < EXACT_FLOATS
    return int(value) if is_whole else value


Whole = BeforeValidator(_whole)


def request_model(limits: Limits, longest: int) -> type[BaseModel]:
    """A request for recommendations. ``longest``: characters of a title or an id."""
    text = Annotated[str, Field(max_length=longest)]
    number = Annotated[int, Whole]
    count = Annotated[int, Field(ge=1, le=limits.max_k), Whole]

    class ById(Strict):
        """An item by the id of the data's source."""

        id: text | number  # type: ignore[valid-type]

    class ByTitle(Strict):
        """An item by its title."""

        title: text  # type: ignore[valid-type]

    items: Any = Annotated[list[text | number | ById | ByTitle], Field(max_length=limits.max_history)]  # type: ignore
    return create_model(
        "RecommendRequest",
        __base__=Strict,
        history=(items | None, Field(None, description="Titles or ids, oldest first.")),
        user=(text | number | None, Field(None, description="A user id of the data, in place of a history.")),
        k=(count, Field(10, description="How many to name.")),
        exclude=(items, Field([], description="Titles or ids that are not wanted.")),
        exact=(bool, Field(False, description="Titles letter by letter; nothing is guessed.")),
        unknown=(Unknown, Field("error", description="Items of the history that are not known: skip leaves them out.")),
    )


def query_of(request: Any) -> Query:
    return Query(
        history=_plain(request.history),
        user=request.user,
        k=request.k,
        exclude=_plain(request.exclude) or (),
        exact=request.exact,
        unknown=request.unknown,
    )


def _plain(items: list[Any] | None) -> list[Any] | None:
    """Items by id or by title as the mappings that ``Query`` takes."""
    if items is None:
        return None
    return [item.model_dump() if isinstance(item, BaseModel) else item for item in items]
