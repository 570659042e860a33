"""What is done to captions before they are encoded: the trigger word, and other orders of tags."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from onelora_diffusion.files import printable

PLACES = re.compile(r"\{trigger\}|\[trigger\]")  # the latter is ai-toolkit's
MOST_TOKENS = 10_000  # of a prompt, some twenty times what text encoders read


def filled(text: str, trigger: str | None) -> str:
    """A text with the trigger word in place of `{trigger}` and `[trigger]`; ValueError if these need a word."""
    if trigger is None and (place := PLACES.search(text)):
        raise ValueError(f"{printable(repr(text), 100)} has {place[0]}: give the word by --trigger")
    return PLACES.sub(lambda place: trigger, text)


def filled_by(prompts: Sequence[str], triggers: Iterable[str | None]) -> list[str]:
    """Prompts with the trigger word of the adapters that draw them in its places; ValueError if there is not one."""
    words = sorted({str(word) for word in triggers if word})
    for prompt in prompts if len(words) != 1 else ():
        if place := PLACES.search(prompt):
            several = f"the adapters have {printable(' and '.join(words), 200)}"
            there = several if words else "no adapter here has a trigger word"
            raise ValueError(f"{printable(repr(prompt), 100)} has {place[0]}, and {there}: write the word")
    return [filled(prompt, "".join(words)) for prompt in prompts]


def with_trigger(caption: str, trigger: str | None) -> str:
    """A caption with the trigger word in its place, or else before it, with a comma, unless it has the word."""
    caption = filled(caption, trigger)
    if trigger is None or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption):
        return caption
    return f"{trigger}, {caption}"


def tag_orders(caption: str, number: int, keep: int, random: np.random.Generator) -> list[str]:
    """A caption as it is, then with its tags, parted by commas, in `number` random orders; `keep` first ones stay."""
    tags = [tag.strip() for tag in caption.split(",")]
    first, others = tags[:keep], tags[keep:]
    return [caption, *(", ".join([*first, *random.permutation(others)]) for _ in range(number))]
