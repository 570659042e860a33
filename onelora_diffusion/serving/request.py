"""The request for one picture, which the page, the API and saved PNG files share; it is checked when it is made."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from onelora_diffusion.files import printable
from onelora_diffusion.injection.routing import GUIDANCES, Guidance
from onelora_diffusion.sampling.schedulers import SAMPLERS
from onelora_diffusion.sampling.settings import SamplerName

MAX_ADAPTERS = 8
MAX_WEIGHT = 10.0  # largest absolute weight of an adapter
MAX_GUIDANCE_SCALE = 100.0
MAX_SEED = 2**63 - 1
MAX_TEXT = 2000  # characters of a prompt or a name


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture: what it shows, the adapters that draw it, how it is sampled, and the seed of its own noise.

    Attributes:
        subject: a class by name or number, or a prompt, depending on the base.
        adapters: (name, weight) of each adapter of a weighted sum; empty for the base alone. If several adapters have
            classes of their own, those of the last one are drawn.
        guidance_scale: the scale of guidance; 1 or less turns guidance off.
        sampler: None takes the base's own.
        size: side of the image in pixels; None takes the base's own.
    """

    subject: str | int
    adapters: tuple[tuple[str, float], ...] = ()
    guidance: Guidance = "cfg"
    guidance_scale: float = 4.0
    sampler: SamplerName | None = None
    num_inference_steps: int = 25
    seed: int = 0
    size: int | None = None

    def __post_init__(self):
        _check_subject(self.subject)
        _check_adapters(self.adapters)
        _check_choice("guidance", self.guidance, GUIDANCES)
        _check_number("guidance_scale", self.guidance_scale, 0.0, MAX_GUIDANCE_SCALE)
        _check_choice("sampler", self.sampler, (None, *SAMPLERS))
        _check_whole("num_inference_steps", self.num_inference_steps, 1, 1000)
        _check_whole("seed", self.seed, 0, MAX_SEED)
        if self.size is not None:
            _check_whole("size", self.size, 1, 16384)
        if self.guidance == "domain" and not self.adapters:
            raise ValueError("guidance 'domain' leads from the base to an adapter: name one, or choose 'cfg'")

    def as_json(self) -> dict:
        """The request as plain values, which `from_json` reads."""
        return dataclasses.asdict(self) | {"adapters": dict(self.adapters)}

    @classmethod
    def from_json(cls, values) -> "Request":
        """Check plain values from a client and make a request of them; `adapters` is {name: weight} or one name.

        Raises:
            ValueError: a field is wrong; the message names it and says what it may be, in one line.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a request is an object of settings, not {_shown(values)}")
        fields = [field.name for field in dataclasses.fields(cls)]
        if unknown := [key for key in values if key not in fields]:
            raise ValueError(f"unknown setting {_shown(unknown[0])}; there is {', '.join(fields)}")
        if values.get("subject") is None:
            raise ValueError("subject is missing: give a class, or a prompt")
        adapters = values.get("adapters")
        if isinstance(adapters, str):
            adapters = {adapters: 1.0}
        if not isinstance(adapters, Mapping | None):
            raise ValueError(f"adapters are {{name: weight}}, not {_shown(adapters)}")
        given = {name: value for name, value in values.items() if value is not None}
        return cls(**given | {"adapters": tuple((adapters or {}).items())})


def _check_subject(subject) -> None:
    if isinstance(subject, str):
        if not subject.strip() or len(subject) > MAX_TEXT:
            raise ValueError(f"subject has {len(subject)} characters; give 1 to {MAX_TEXT}")
        if not subject.isprintable():
            raise ValueError("subject has control characters; give one line of text")
    else:
        _check_whole("subject", subject, 0, 10**6, "the name or the number of a class, or a prompt")


def _check_adapters(adapters: tuple) -> None:
    if len(adapters) > MAX_ADAPTERS:
        raise ValueError(f"{len(adapters)} adapters asked for; {MAX_ADAPTERS} is the most")
    for name, weight in adapters:
        if not isinstance(name, str) or not 0 < len(name) <= MAX_TEXT:
            raise ValueError(f"adapters has {_shown(name)}, which is no name")
        _check_number(f"the weight of adapter '{printable(name, 60)}'", weight, -MAX_WEIGHT, MAX_WEIGHT)


def _check_choice(name: str, value, choices: tuple) -> None:
    if not isinstance(value, str | None) or value not in choices:
        raise ValueError(f"{name} is {_shown(value)}; choose {', '.join(c for c in choices if c)}")


def _check_number(name: str, value, least: float, most: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not least <= value <= most:
        raise ValueError(f"{name} is {_shown(value)}; give a number from {least:g} to {most:g}")


def _check_whole(name: str, value, least: int, most: int, what: str | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} is {_shown(value)}; give {what or f'a whole number from {least} to {most}'}")


def _shown(value) -> str:
    return printable(repr(value), 60)
