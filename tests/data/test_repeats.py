"""How often images count: by kohya's folders and by a column, and only where that is asked for."""

import pytest
from PIL import Image
from reading import load_captioned


@pytest.fixture
def folder(tmp_path):
    for name in ("10_sks dog/1.png", "3_cats/2.png", "3_cats/2_sitting/deep/3.png", "plain/4.png", "5.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def load(folder, **arguments):
    return load_captioned(folder, **dict(prompt="x", resolution=8, multiple=8) | arguments)


def test_folders_named_as_kohyas_repeat_their_images_if_that_is_asked_for(folder):
    captioned = load(folder, repeats_by_folder=True)
    names = [path.relative_to(folder).as_posix() for path in captioned.dataset.source.paths]
    expected = {"10_sks dog/1.png": 10, "3_cats/2.png": 3, "3_cats/2_sitting/deep/3.png": 2, "plain/4.png": 1}
    assert dict(zip(names, captioned.repeats, strict=True)) == expected | {"5.png": 1}
    assert captioned.notes == ["by their repeats, an epoch has 17 images"]
    plain = load(folder)
    assert plain.repeats is None and "images in 10_sks dog, 2_sitting, 3_cats count once: --repeats" in plain.notes[0]


def test_a_column_repeats_images(folder):
    table = "file_name,text,repeats\n5.png,five,3\n3_cats/2.png,two, 1\n"
    for name in ("10_sks dog/1.png", "3_cats/2_sitting/deep/3.png", "plain/4.png"):
        table += f"{name},other,2\n"
    (folder / "metadata.csv").write_text(table)
    captioned = load(folder, prompt=None, repeats_column="repeats")
    assert dict(zip(captioned.captions, captioned.repeats, strict=True)) == {"five": 3, "two": 1, "other": 2}
    assert "the column 'repeats' is not read: --repeats-column" in load(folder, prompt=None).notes[0]
    for wrong in ("0", "-1", "1.5", "", "many", "20000"):
        (folder / "metadata.csv").write_text(table.replace("five,3", f"five,{wrong}"))
        with pytest.raises(ValueError, match=f"line 2 of .*csv repeats '{wrong}' times: give a whole number from 1"):
            load(folder, prompt=None, repeats_column="repeats")
    with pytest.raises(ValueError, match="line 2 of .*csv has no column 'times': it has file_name, text, repeats"):
        load(folder, prompt=None, repeats_column="times")


def test_numbers_that_are_none_and_folders_without_one_are_one_line(folder):
    (folder / "3_cats").rename(folder / "0_cats")
    with pytest.raises(ValueError, match="the folder 0_cats repeats '0' times: give a whole number from 1 to 10000"):
        load(folder, repeats_by_folder=True)
    (folder / "0_cats").rename(folder / "20240131_cats")
    with pytest.raises(ValueError, match="the folder 20240131_cats repeats '20240131' times"):
        load(folder, repeats_by_folder=True)
    with pytest.raises(ValueError, match="--repeats-by-folder finds no folder named like 3_cats"):
        load(folder / "plain", repeats_by_folder=True)
    for arguments in (dict(repeats_by_folder=True), dict(mask_column="m"), dict(repeats_column="r")):
        with pytest.raises(ValueError, match="is of no use for handwritten digits"):
            load_captioned(None, resolution=16, multiple=4, **arguments)
