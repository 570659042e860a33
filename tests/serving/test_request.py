"""What comes in is a request, or is refused in one line; a PNG brings it back."""

import io
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from onelora_diffusion.serving.picture_file import png_of
from onelora_diffusion.serving.request import Request

GOOD = {
    "subject": "sushi",
    "adapters": {"food": 0.5, "birds/run": -1},
    "guidance": "domain",
    "guidance_scale": 3.5,
    "negative_prompt": "blurred",
    "sampler": "ddim",
    "num_inference_steps": 30,
    "seed": 2**40,
    "size": 256,
}
WRONG = {  # values of a field, none of which may pass
    "subject": [None, "", "   ", -1, 1.5, True, [], {}, ["7"], "x" * 2001, "two\nlines", "\x1b[2J", 10**7],
    "adapters": [7, ["food"], {"food": "1"}, {"food": None}, {"food": float("nan")}, {"food": float("inf")},
                 {"food": 11}, {"food": True}, {"": 1}, {"food": [1]}, {str(n): 1 for n in range(9)}, {1: 1.0}],
    "guidance": ["", "CFG", 1, True, ["cfg"], {}],
    "guidance_scale": ["4", -0.1, 101, float("nan"), float("inf"), True, [4], {}],
    "sampler": ["", "DDIM", 3, ["ddim"], {"ddim": 1}, "euler_a"],
    "num_inference_steps": [0, -1, 1001, 2.5, "25", True, [], float("nan")],
    "negative_prompt": [1, ["x"], "x" * 2001, "two\nlines"],
    "seed": [-1, 2**63, 0.5, "0", True, [], {}],
    "size": [0, -16, 16385, 16.0, "16", True, [16]],
}  # fmt: skip


def malformed(number: int) -> list:
    """So many requests with something wrong in each: one field, several, an unknown one, or no object at all."""
    draw = random.Random(0)
    found = [None, 7, "draw", [], [GOOD], True, {}, {"subject": None}, GOOD | {"steps": 5}, GOOD | {"": 1}]
    found += [GOOD | {field: value} for field, values in WRONG.items() for value in values if value is not None]
    while len(found) < number:
        fields = draw.sample(list(WRONG), draw.randint(2, 4))
        found.append(GOOD | {field: draw.choice([v for v in WRONG[field] if v is not None]) for field in fields})
    return found[:number]


def test_a_request_is_the_same_after_json():
    request = Request.from_json(GOOD)
    assert request.adapters == (("food", 0.5), ("birds/run", -1))
    assert request.as_json() == GOOD
    assert Request.from_json(request.as_json()) == request
    assert Request.from_json({"subject": 3, "adapters": "food"}).adapters == (("food", 1.0),)
    assert Request.from_json({"subject": 3, "size": None, "adapters": None}) == Request(subject=3)
    with pytest.raises(ValueError, match="seed"):
        Request(subject=3, seed=-1)


def test_200_malformed_requests_are_200_refusals_of_one_line():
    requests = malformed(200)
    assert len(requests) == 200
    for values in requests:
        with pytest.raises(ValueError) as error:
            Request.from_json(values)
        said = str(error.value)
        assert 10 < len(said) < 300 and said.isprintable(), said


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"subject": "7", "seed": -1}, "seed is -1: input should be greater than or equal to 0"),
        ({"subject": "7", "steps": 1}, "steps is 1: unexpected keyword argument"),
        ({"subject": "7", "guidance": "x"}, "guidance is 'x': input should be 'cfg' or 'domain'"),
        ({"subject": "7", "guidance": "domain"}, "leads from the base to an adapter: name one"),
        ({"subject": "7", "adapters": {"a": 1e9}}, "adapters.a is 1000000000.0: input should be less than"),
        ({"subject": " "}, "subject is ' ': give a class by name or number, or a prompt: one line of up to 2000"),
        ({"seed": 1}, "subject is missing"),
        ("7", "'7': Input should be a dictionary"),
    ],
)
def test_a_refusal_names_the_field_its_value_and_what_it_may_be(values, said):
    with pytest.raises(ValueError) as error:
        Request.from_json(values)
    assert said in str(error.value)


def test_a_png_brings_its_settings_back():
    settings = {"base": "miniature", "request": Request.from_json(GOOD).as_json()}
    picture = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8)
    image = Image.open(io.BytesIO(png_of(picture, settings)))
    assert json.loads(image.info["onelora"]) == settings
    assert np.array_equal(np.asarray(image), picture.numpy())
