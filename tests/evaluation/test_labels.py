"""Which classes are drawn: in turns, at random, as often as in a data set."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from onelora_diffusion.data import load_dataset
from onelora_diffusion.data.from_hub import HubImages
from onelora_diffusion.evaluation.labels import class_frequencies, draw_labels


def test_labels_in_turns():
    assert draw_labels("turns", 7, 3, seed=5) == [0, 1, 2, 0, 1, 2, 0]


def test_a_label_is_a_function_of_seed_and_image_alone():
    many, few = draw_labels("random", 1000, 10, seed=3), draw_labels("random", 17, 10, seed=3)
    assert few == many[:17] and many != draw_labels("random", 1000, 10, seed=4)
    assert draw_labels("random", 5, 10, seed=-1) == draw_labels("random", 5, 10, seed=2**64 - 1)


@pytest.mark.parametrize("order, frequencies", [("random", [1, 1, 1, 1]), ("dataset", [600, 0, 300, 100])])
def test_labels_are_drawn_as_often_as_they_should_be(order, frequencies):
    count = 20_000
    labels = draw_labels(order, count, 4, seed=0, frequencies=frequencies)
    share = np.array(frequencies) / sum(frequencies)
    deviation = np.sqrt(share * (1 - share) / count)  # of a binomial share; five of them are one chance in a million
    found = np.bincount(labels, minlength=4) / count
    assert (np.abs(found - share) <= 5 * deviation).all()


class Three(Dataset):
    """A data set whose source lists labels under a name of torchvision's."""

    name, num_classes, id2label = "three", 3, {0: "a", 1: "b", 2: "c"}

    def __init__(self, attribute, labels):
        self.source = SimpleNamespace(**{attribute: labels})


def test_frequencies_are_counted_by_the_names_of_classes():
    digits = load_dataset("digits", classes=(7, 0))
    expected = [digits.labels.count(1), digits.labels.count(0)]
    assert class_frequencies(digits, ["0", "7"]) == expected and min(expected) > 100
    for attribute, labels in (("targets", [0, 2, 2]), ("_labels", [0, 2, 2]), ("labels", torch.tensor([0, 2, 2]))):
        assert class_frequencies(Three(attribute, labels), ["c", "b"]) == [2, 0]
    with pytest.raises(ValueError, match="'d' is no class of three"):
        class_frequencies(Three("targets", [0]), ["a", "d"])
    with pytest.raises(ValueError, match="three does not list its labels: choose --labels turns or random"):
        class_frequencies(Three("attributes", [0]), ["a"])
    of_hub = Three("rows", None)
    of_hub.source = HubImages([], "image", [2, 1, 2])
    assert class_frequencies(of_hub, ["a", "c"]) == [0, 2]
