"""What is in a folder of images, what is none of it, and what is left out and said."""

import os

import pytest
from PIL import Image
from reading import load_captioned

from onelora_diffusion.data import load_dataset
from onelora_diffusion.data.listing import describe, list_images


def put(folder, *names, **options):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 0, 0)).save(path, **options)
    return folder


def classes(root, split="train"):
    """How many images each class has; all of them are read."""
    dataset = load_dataset("imagefolder", root, split, resolution=8)
    labels = [dataset[index][1] for index in range(len(dataset))]
    return {name: labels.count(label) for label, name in dataset.id2label.items()}


def captioned(root, prompt="x"):
    dataset = load_captioned(root, prompt, resolution=16)
    assert all(dataset[index, False][0].shape == (3, 16, 16) for index in range(len(dataset)))
    return dataset.dataset


PETS = ("a/1.png", "a/2.png", "b/1.png")


def test_what_systems_and_programs_leave_in_folders_is_none_of_it(tmp_path):
    put(tmp_path, *PETS, ".ipynb_checkpoints/1-checkpoint.png", "a/.ipynb_checkpoints/x.png", "@eaDir/1.png")
    put(tmp_path, "__MACOSX/a/1.png", ".git/1.png")
    for name in ("a/._1.png", "a/Thumbs.db", ".DS_Store", "desktop.ini"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    assert classes(tmp_path) == {"a": 2, "b": 1}
    assert describe(load_dataset("imagefolder", tmp_path)) == "imagefolder: 3 images of 2 classes (a 2, b 1)"
    assert len(captioned(tmp_path)) == 3 and describe(captioned(tmp_path)) == f"{tmp_path.name}: 3 images"


def test_formats_that_are_read_and_those_that_are_left_out_with_a_word(tmp_path):
    put(tmp_path, "a/1.png", "a/2.gif", "a/3.jp2", "a/4.webp", "a/5.JPG", "a/6.jpe")
    put(tmp_path, "a/7.jfif", format="JPEG")
    if ".avif" in list(Image.registered_extensions()):
        put(tmp_path, "a/8.avif")
    for name in ("a/9.heic", "a/film.mp4", "a/notes.txt", "b.pdf"):
        (tmp_path / name).write_bytes(b"?")
    count = 7 + (tmp_path / "a/8.avif").exists()
    assert classes(tmp_path) == {"a": count} and len(captioned(tmp_path)) == count
    said = describe(captioned(tmp_path))
    assert f"{count} images; left out: .heic, which this Pillow does not read (1); files of other kinds (" in said
    assert all(f"{kind} 1" in said for kind in (".mp4", ".pdf", ".txt"))


def test_captions_are_no_files_that_are_left_out(tmp_path):
    put(tmp_path, "1.png", "more/2.png")
    for name in ("1.txt", "more/2.txt", "3.txt"):
        (tmp_path / name).write_text("a caption")
    assert describe(captioned(tmp_path, None)).endswith("2 images; left out: files of other kinds (.txt 1)")


def test_linked_folders_are_read_and_loops_and_dead_links_are_counted(tmp_path):
    put(tmp_path / "elsewhere", "1.png", "2.png")
    root = put(tmp_path / "pets", "a/1.png")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "down").symlink_to(root / "a")
    (root / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert classes(root) == {"a": 1, "b": 2}
    said = describe(captioned(root))
    assert said == "pets: 3 images; left out: broken links (1); links to a folder that they are in (2)"
    (root / "c").symlink_to(tmp_path / "elsewhere")  # twice the same folder is no loop
    assert classes(root) == {"a": 1, "b": 2, "c": 2}
    (tmp_path / "link").symlink_to(root)
    assert len(captioned(tmp_path / "link")) == 5


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("bus/1.png", "car/1.png", "train/1.png"), {"bus": 1, "car": 1, "train": 1}),
        (("essay/1.png", "test/1.png"), {"essay": 1, "test": 1}),
        (("bus/1.png", "train/ice/1.png", "train/tgv/1.png"), {"bus": 1, "train": 2}),
        (("train/a/1.png", "train/a/deep/2.png", "test/b/1.png"), {"a": 2}),
        (("a b/1.png", "a/sub/1.png", "a/1.png"), {"a": 2, "a b": 1}),
    ],
)
def test_folders_of_parts_are_classes_beside_others(tmp_path, names, expected):
    put(tmp_path, *names)
    assert classes(tmp_path) == expected


def test_a_class_without_images_is_named_and_images_of_no_class_are_counted(tmp_path):
    put(tmp_path, *PETS, "cover.png")
    assert describe(load_dataset("imagefolder", tmp_path)).endswith("left out: images in no folder of a class (1)")
    (tmp_path / "c").mkdir()
    with pytest.raises(FileNotFoundError, match="no images in .*/c: a class needs some, or take the folder out"):
        classes(tmp_path)
    put(tmp_path / "flat", "train/1.png", "test/1.png")
    with pytest.raises(FileNotFoundError, match="no images in .*/train/<class>/: give a folder with one folder for"):
        classes(tmp_path / "flat")


def test_the_output_of_runs_below_the_data_is_left_out(tmp_path):
    put(tmp_path, *PETS, "runs/x/samples/1.png", "runs/x/distance.png", "samples/1.png", "distance.png")
    (tmp_path / "runs/x/clock.json").touch()
    (tmp_path / "runs/latents/x").mkdir(parents=True)
    (tmp_path / "runs/latents/x/inputs.json").touch()
    assert classes(tmp_path) == {"a": 2, "b": 1, "samples": 1} and len(captioned(tmp_path)) == 5
    assert list_images(tmp_path).left_out == {"folders of training runs": 1} and not list_images(tmp_path).others
    (tmp_path / "onelora_weights.safetensors").touch()  # a run has the folder of images for its own
    assert classes(tmp_path) == {"a": 2, "b": 1} and len(captioned(tmp_path)) == 3
    assert list_images(tmp_path).left_out == {"folders of training runs": 1, "outputs of a training run": 2}


def test_masks_are_no_images(tmp_path):
    put(tmp_path, *PETS, "a/1.mask.png", "b/1-MaskLabel.PNG", "b/mask.png")
    assert classes(tmp_path) == {"a": 2, "b": 2}
    assert describe(load_dataset("imagefolder", tmp_path)).endswith("; left out: masks of images (2)")


def test_names_that_are_no_utf_8_are_read(tmp_path):
    put(tmp_path, *PETS)
    try:
        os.rename(os.fsencode(tmp_path / "a" / "1.png"), os.fsencode(tmp_path) + b"/a/\xff\n.png")
        os.rename(os.fsencode(tmp_path / "b"), os.fsencode(tmp_path) + b"/\xe9")
    except OSError:
        pytest.skip("this file system has names of UTF-8 alone")
    assert classes(tmp_path) == {"a": 2, " ": 1} and len(captioned(tmp_path)) == 3
    with pytest.raises(ValueError, match="a/  .png has no caption"):
        (tmp_path / "metadata.csv").write_text("file_name,text\na/2.png,x\n")
        captioned(tmp_path, None)
