"""The handwritten digits: values, labels and splits known by hand."""

import pytest
import torch
from rounding import assert_rounded
from sklearn.datasets import load_digits

from onelora_diffusion.data import load_dataset
from onelora_diffusion.data.digits import Digits


def test_an_image_is_the_scanned_digit_enlarged():
    first_five = load_digits().images[load_digits().target == 5][0]
    image, label = Digits("all", resolution=8, classes=(5, 6))[0]
    assert image.shape == (3, 8, 8) and image.dtype == torch.float32 and label == 0
    for channel in image:
        assert torch.equal(channel, torch.tensor(first_five / 8 - 1, dtype=torch.float32))


def test_enlarging_is_bilinear():
    small, large = Digits("all", resolution=8)[0][0], Digits("all", resolution=16)[0][0]
    assert large.shape == (3, 16, 16)
    # Between pixel centres at 1/4 and 3/4: 9/16, 3/16, 3/16 and 1/16 of the four around.
    expected = (9 * small[:, 2, 2] + 3 * small[:, 2, 3] + 3 * small[:, 3, 2] + small[:, 3, 3]) / 16
    assert_rounded(large[:, 5, 5], expected, terms=4, size=1)
    assert torch.equal(large[:, 0, 0], small[:, 0, 0])


def test_images_span_minus_one_to_one():
    images = Digits("all").images
    assert images.min() == -1 and images.max() > 0.9 and images.max() <= 1


def test_labels_count_from_zero_in_the_order_of_the_classes():
    digits = Digits("all", classes=(9, 3))
    target = load_digits().target
    assert digits.id2label == {0: "9", 1: "3"} and digits.num_classes == 2 and digits.name == "digits"
    assert digits.labels == [{9: 0, 3: 1}[t] for t in target.tolist() if t in (9, 3)]
    assert [label for _, label in (digits[i] for i in range(5))] == digits.labels[:5]


def test_the_default_is_all_ten():
    assert Digits().id2label == {digit: str(digit) for digit in range(10)}


def test_counts_of_the_splits():
    # 178, 182, 177, 183, 181, 182, 181, 179, 174 and 180 images of 0 to 9; the test split takes every fifth.
    assert [len(Digits(split)) for split in ("all", "test", "train")] == [1797, 355, 1442]
    test_labels = torch.tensor(Digits("test").labels)
    assert torch.bincount(test_labels).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]


def test_train_and_test_are_disjoint_and_complete():
    def keys(split):
        return sorted(tuple(image.flatten().tolist()) for image in Digits(split, resolution=8).images[:, 0])

    train, test = keys("train"), keys("test")
    assert not set(train) & set(test)
    assert sorted(train + test) == keys("all")


def test_load_dataset_passes_its_arguments_on():
    digits = load_dataset("digits", split="test", resolution=12, classes=(0, 1))
    assert digits.images.shape[1:] == (3, 12, 12) and digits.id2label == {0: "0", 1: "1"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"split": "validation"}, "validation"), ({"classes": (5, 10)}, "10"), ({"classes": (5, 5)}, "5, 5")],
)
def test_a_wrong_argument_is_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        Digits(**arguments)
