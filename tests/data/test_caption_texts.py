"""The trigger word and the orders of tags, by hand."""

from collections import Counter

import numpy as np
import pytest

from onelora_diffusion.data.caption_texts import filled, filled_by, tag_orders, with_trigger


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog in a bucket", "sks, a dog in a bucket"),
        ("a {trigger} dog, [trigger]", "a sks dog, sks"),
        ("a photo of sks", "a photo of sks"),
        ("masks of dogs", "sks, masks of dogs"),
        ("SKS dog", "sks, SKS dog"),
    ],
)
def test_the_trigger_word_is_in_each_caption_once(caption, expected):
    assert with_trigger(caption, "sks") == expected
    if "trigger" not in caption:
        assert with_trigger(caption, None) == caption


def test_a_word_with_signs_is_taken_as_it_is():
    assert with_trigger("a [trigger] dog", r"s\1*") == r"a s\1* dog"
    assert with_trigger("a dog", "<s1>") == "<s1>, a dog"
    assert with_trigger("a <s1> dog", "<s1>") == "a <s1> dog"


@pytest.mark.parametrize("place", ["{trigger}", "[trigger]"])
def test_a_place_without_a_word_is_one_line(place):
    with pytest.raises(ValueError) as caught:
        filled(f"a {place} dog", None)
    assert str(caught.value) == f"'a {place} dog' has {place}: give the word by --trigger"


def test_prompts_have_the_one_trigger_word_of_their_adapters():
    prompts = ["a {trigger} dog", "[trigger]", "a cat"]
    assert filled_by(prompts, ["sks", None, "sks"]) == ["a sks dog", "sks", "a cat"]
    assert filled_by(["a cat"], []) == filled_by(["a cat"], ["sks", "zwx"]) == ["a cat"]
    for words, said in (
        ([None], "no adapter here has a trigger word"),
        (["zwx", "sks"], "the adapters have sks and zwx"),
    ):
        with pytest.raises(ValueError) as caught:
            filled_by(prompts, words)
        assert str(caught.value) == f"'a {{trigger}} dog' has {{trigger}}, and {said}: write the word"


def test_tags_take_all_orders_equally_often_and_the_first_stay():
    written, *orders = tag_orders("1girl,  solo, red hair , smile,hat", 6000, 2, np.random.default_rng(0))
    assert written == "1girl,  solo, red hair , smile,hat"
    counts = Counter(orders)
    assert len(counts) == 6 and all(order.startswith("1girl, solo, ") for order in counts)
    assert {frozenset(order.split(", ")) for order in counts} == {
        frozenset(["1girl", "solo", "red hair", "smile", "hat"])
    }
    # Six equal shares of 6,000, each of standard deviation 29.
    assert all(abs(count - 1000) < 6 * 29 for count in counts.values())
    assert tag_orders("a, b", 2, 0, np.random.default_rng(1)) == tag_orders("a, b", 2, 0, np.random.default_rng(1))
    assert tag_orders("no tags", 2, 3, np.random.default_rng(0)) == ["no tags"] * 3
