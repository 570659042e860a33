"""The request for one picture, which the page, the API and saved PNG files share; pydantic checks its values."""

import dataclasses
from typing import Annotated

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.dataclasses import dataclass

from onelora_diffusion.files import printable
from onelora_diffusion.injection.routing import Guidance
from onelora_diffusion.sampling.settings import SamplerName

MAX_ADAPTERS = 8
MAX_WEIGHT = 10.0  # largest absolute weight of an adapter
MAX_SEED = 2**63 - 1
MAX_TEXT = 2000  # characters of a prompt or a name


def _is_line(value) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()


def _subject(value) -> str | int:
    is_label = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 10**6
    if is_label or _is_line(value) and value.strip():
        return value
    raise ValueError(f"give a class by name or number, or a prompt: one line of up to {MAX_TEXT} characters")


def _line(value: str) -> str:
    if not _is_line(value):
        raise ValueError(f"give one line of up to {MAX_TEXT} characters")
    return value


def _by_name(value):
    """One name, or (name, weight) pairs, as {name: weight}."""
    if isinstance(value, str):
        return {value: 1.0}
    return dict(value or ()) if isinstance(value, tuple | None) else value


Line = Annotated[str, AfterValidator(_line)]
Subject = Annotated[str | int, PlainValidator(_subject), WithJsonSchema({"type": ["string", "integer"]})]
Name = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Weight = Annotated[float, Field(strict=True, ge=-MAX_WEIGHT, le=MAX_WEIGHT)]
Weights = Annotated[dict[Name, Weight], Field(max_length=MAX_ADAPTERS)]
Adapters = Annotated[Weights, BeforeValidator(_by_name), AfterValidator(lambda weights: tuple(weights.items()))]
GuidanceScale = Annotated[float, Field(strict=True, ge=0, le=100)]
Steps = Annotated[int, Field(strict=True, ge=1, le=1000)]
Seed = Annotated[int, Field(strict=True, ge=0, le=MAX_SEED)]
Size = Annotated[int, Field(strict=True, ge=1, le=16384)]
CHECKED = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Request:
    """One picture: what it shows, the adapters that draw it, how it is sampled, and the seed of its own noise.

    ValueError for a value that its field may not have.
    """

    subject: Subject  # a class by name or number, or a prompt, depending on the base
    negative_prompt: Line | None = None  # from which guidance leads away, instead of the empty one
    # (name, weight) of each adapter of a weighted sum, given as {name: weight} or one name; empty for the base alone.
    # If several adapters have classes of their own, those of the last one are drawn.
    adapters: Adapters = ()
    guidance: Guidance = "cfg"
    # 1 or less turns guidance off. None takes 1 if guidance is trained into all its adapters, else 4.
    guidance_scale: GuidanceScale | None = None
    sampler: SamplerName | None = None  # None takes the base's own
    num_inference_steps: Steps = 25
    seed: Seed = 0
    size: Size | None = None  # side of the image in pixels; None takes the base's own

    @model_validator(mode="after")
    def _has_a_goal(self) -> "Request":
        if self.guidance == "domain" and not self.adapters:
            raise ValueError("guidance 'domain' leads from the base to an adapter: name one, or choose 'cfg'")
        return self

    def as_json(self) -> dict:
        """The request as plain values, which `from_json` reads."""
        return dataclasses.asdict(self) | {"adapters": dict(self.adapters)}

    @classmethod
    def from_json(cls, values) -> "Request":
        """Make a request of a client's plain values; ValueError as for `checked`."""
        return checked(cls, values)


def checked(kind: type, values):
    """An object of a class, made of plain values; ValueError names a wrong one and what it may be, in one line."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise ValueError(problem(error.errors())) from error


def problem(errors: list[dict]) -> str:
    """The first of pydantic's errors in one line: the field, its value and what it may be."""
    first = errors[0]
    said = first["msg"].removeprefix("Value error, ")
    field = printable(".".join(str(part) for part in first["loc"] if part != "body"), 60)
    if isinstance(first["input"], bytes) or not field and first["type"] == "missing":
        return "the request has no body of the type application/json"
    if not field:
        return said if first["type"] == "value_error" else f"{printable(repr(first['input']), 60)}: {said}"
    if first["type"] == "json_invalid":
        return "the request is no JSON"
    if first["type"] == "missing":
        return f"{field} is missing"
    return f"{field} is {printable(repr(first['input']), 60)}: {said[0].lower()}{said[1:]}"
