"""Classes by name and number."""

import pytest

from onelora_diffusion.families.classes import by_label, find_class, told_apart


def test_classes_are_found_by_name_and_number_and_the_error_says_what_there_is():
    classes = {0: "pizza", 1: "Fried rice", 2: "7", 7: "sushi, nigiri"}
    wanted = ["pizza", "fried_rice", "FRIED RICE", "nigiri", "0", "7", 7]
    assert [find_class(name, classes, "it") for name in wanted] == [0, 1, 1, 7, 0, 2, 7]  # "7" is the name
    with pytest.raises(ValueError, match="no class 'piza' among the 4 of it: there is pizza"):
        find_class("piza", classes, "it")
    with pytest.raises(ValueError, match="no class '5' among the 4 of it: there is pizza, fried_rice, 7, "):
        find_class("5", classes, "it")
    with pytest.raises(ValueError, match="label 3 is none of the 4 classes of it: give 0 to 3"):
        find_class(3, classes, "it")


def test_classes_of_one_name_are_told_apart():
    classes = told_apart({0: "crane", 1: "Crane", 2: "ibis"}, 4)
    assert classes == {0: "crane (0)", 1: "Crane (1)", 2: "ibis", 3: "3"}
    assert [find_class(name, classes, "it") for name in ("crane (1)", "ibis", "0")] == [1, 2, 0]
    with pytest.raises(ValueError, match=r"no class 'crane' among the 4 of it: there is crane_\(1\), crane_\(0\)"):
        find_class("crane", classes, "it")


def test_several_names_of_one_class_are_parted_by_commas():
    assert by_label({"sushi": 1, "nigiri": 1, "pizza": 0}) == {0: "pizza", 1: "sushi, nigiri"}
