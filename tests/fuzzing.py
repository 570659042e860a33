"""Changes at random, for the tests that try files with them. `make fuzz` tries more, and others each time."""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def changed_bytes(data, content: bytes) -> bytes:
    """Content with flipped, cut, doubled and overwritten bytes, anywhere; data is hypothesis' own."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 8))):
        first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        change = data.draw(st.sampled_from(["flip", "cut", "double", "end", "write"]))
        if change == "flip" and first < len(content):
            content[first] ^= 1 << data.draw(st.integers(0, 7))
        elif change == "cut":
            del content[first : min(last, first + 64)]
        elif change == "double":
            content[first:first] = content[first : min(last, first + 64)]
        elif change == "end":
            del content[last:]
        elif change == "write":
            content[first : first + 8] = data.draw(st.binary(min_size=1, max_size=16))
    return bytes(content)


NUMBERS = st.one_of(
    st.integers(-3, 70), st.sampled_from([10**6, 10**12, 2**63, 10**400, 1e308, -0.0, float("nan"), float("inf")])
)
TEXTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["to_q", "1lora", "lora", "peft:oft", "pissa_niter_100000000", "(a+)+$", "\x1b[2J", "x" * 100_000]
    ),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(TEXTS, inner, max_size=4),
    ),
    max_leaves=8,
)
VALUES = VALUES | st.one_of(NUMBERS, TEXTS.filter(lambda text: len(text) < 50)).map(lambda value: [value] * 20_000)


def places_of(value, place=()):
    """The places in a value of JSON, outside in."""
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places_of(item, (*place, key))


def put(value, place, new):
    if not place:
        return new
    key, *rest = place
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[key] = put(copied[key], rest, new)
    return copied
