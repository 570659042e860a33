import io
import json
import random
import sys
import types

import pytest
import torch
from PIL import Image
from reading import load_captioned
from torch.utils.data import DataLoader

from onelora_diffusion.data.captions import MOST_CHARACTERS
from onelora_diffusion.data.digits import Digits
from onelora_diffusion.data.images import BrokenImageError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def write_images(folder, **colours):
    """Images of one colour, 20 by 16 pixels, by name."""
    for name, colour in colours.items():
        path = folder / f"{name.replace('__', '/')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), colour).save(path)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "signs", b=BLUE, a=RED, more__c=GREEN)


def write_metadata(folder, rows, name="metadata.jsonl"):
    (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


ROWS = [
    {"file_name": "b.png", "text": "a blue sign"},
    {"file_name": "./more/c.png", "text": " “green”\n"},
    {"text": "a red sign", "file_name": "a.png", "other": 3},
]
CAPTIONS = ["a red sign", "a blue sign", "“green”"]  # in the order of the files' names


def load(source, **arguments):
    return load_captioned(source, resolution=8, multiple=8, **arguments)


def test_images_come_with_the_captions_of_a_metadata_jsonl(folder):
    write_metadata(folder, ROWS)
    dataset = load(folder)
    assert (len(dataset), dataset.dataset.name, dataset.captions) == (3, "signs", CAPTIONS)
    for index, colour in enumerate((RED, BLUE, GREEN)):
        image, caption = dataset[index, False]
        assert caption == index and image.dtype == torch.uint8 and image.shape == (3, 8, 8)
        assert torch.equal(image, torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 8, 8))


def test_metadata_csv_text_files_and_other_columns_say_the_same(folder):
    lines = ["file_name,width,text", 'b.png,1,"a blue\nsign"', "more/c.png,2,“green”", "a.png,3,a red sign", ""]
    (folder / "metadata.csv").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    assert load(folder).captions == ["a red sign", "a blue\nsign", "“green”"]
    (folder / "metadata.csv").unlink()

    for name, caption in zip(("a", "b", "more/c"), CAPTIONS, strict=True):
        (folder / f"{name}.txt").write_text(f"{caption}\n", encoding="utf-8")
    (folder / "LICENSE.txt").write_text("of no picture")
    assert load(folder).captions == CAPTIONS
    for path in folder.rglob("*.txt"):
        path.unlink()

    write_metadata(folder, [{"path": row["file_name"], "what it is": row["text"]} for row in ROWS])
    assert load(folder, image_column="path", caption_column="what it is").captions == CAPTIONS


def test_metadata_may_lie_in_a_folder_such_as_train(tmp_path):
    write_metadata(write_images(tmp_path / "signs/train", b=BLUE, a=RED, more__c=GREEN), ROWS)
    dataset = load(tmp_path / "signs")
    assert dataset.captions == CAPTIONS and dataset[0, False][0][:, 0, 0].tolist() == list(RED)
    write_metadata(write_images(tmp_path / "signs/test", d=RED), [])
    with pytest.raises(ValueError, match="captions in test/metadata.jsonl and train/metadata.jsonl: leave one"):
        load(tmp_path / "signs")


def test_one_prompt_is_the_caption_of_all(folder):
    (folder / ".hidden.png").write_bytes(b"")
    assert load(folder, prompt="a photo of sks dog").captions == ["a photo of sks dog"] * 3
    write_metadata(folder, ROWS)
    assert load(folder, prompt="a photo of sks dog").captions == ["a photo of sks dog"] * 3


def test_flips_mirror_images(tmp_path):
    write_images(tmp_path, a=RED)
    image = Image.new("RGB", (8, 8), RED)
    image.paste(BLUE, (0, 0, 4, 8))  # blue on the left
    image.save(tmp_path / "a.png")
    images, captions = next(iter(DataLoader(load(tmp_path, prompt="x"), batch_sampler=[[(0, False), (0, True)]])))
    assert captions.tolist() == [0, 0]
    assert images[0, :, 0, 0].tolist() == list(BLUE) and images[1, :, 0, 0].tolist() == list(RED)
    assert torch.equal(images[1], images[0].flip(-1))


def changed(number, **values):
    return [{**row, **(values if number == index else {})} for index, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (ROWS[:2], ValueError, "signs/a.png has no caption: write one, or take the image out"),
        (ROWS[:1], ValueError, "signs/a.png has no caption, nor have 1 more: "),
        (changed(1, file_name="d.png"), FileNotFoundError, "line 2 of .*jsonl names d.png, which is not in .*signs"),
        (changed(1, file_name="../signs/b.png"), ValueError, "line 2 of .* leaves the folder: ../signs/b.png"),
        (changed(1, file_name="/etc/a.png"), ValueError, "line 2 of .* leaves the folder: /etc/a.png"),
        (changed(1, file_name="more/../b.png"), ValueError, "line 2 of .* names b.png, which a line before it has"),
        (changed(1, file_name="a\0b"), FileNotFoundError, "names a b, which is not in"),
        (changed(1, file_name="x" * 5000), FileNotFoundError, "names x{199}…, which is not in"),
        (changed(1, file_name=7), ValueError, "line 2 of .* names no file: file_name is 7"),
        (ROWS[:1] + [{"file_name": "a.png", "caption": "red"}], ValueError, "'text': it has file_name, caption$"),
        (changed(2, text=None), ValueError, "the caption of a.png in line 3 of .* is None: write some words"),
        (changed(2, text=" \n"), ValueError, "the caption of a.png in line 3 of .* is ' .n': write some words"),
        (changed(2, text=["a", "b"]), ValueError, "is \\['a', 'b'\\]: write some words"),
        (changed(2, text="a" * (MOST_CHARACTERS + 1)), ValueError, "of a.png in .* has 10001 characters: 10000 are"),
        (changed(2, text="\ud800"), ValueError, "the caption of a.png in line 3 of .* is no text"),
        ([*ROWS, ["a.png", "red"]], ValueError, 'line 4 of .* is no row of columns: \\["a.png", "red"\\]'),
        ([], ValueError, "metadata.jsonl is empty"),
    ],
)
def test_what_is_wrong_with_metadata_is_one_clear_line(folder, rows, error, message):
    write_metadata(folder, rows)
    with pytest.raises(error, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png"', "line 1 of .*jsonl is no JSON"),
        (
            "metadata.jsonl",
            b'{"file_name": "a.png", "text": "a", "text": "b"}',
            "line 1 of .* no JSON: 'text' is there tw",
        ),
        ("metadata.jsonl", b"[" * 100_000, "line 1 of .*jsonl is no JSON"),
        ("metadata.jsonl", b"\xff\xfe{\0}", "metadata.jsonl is no text in UTF-8"),
        (
            "metadata.csv",
            b"file_name,caption\na.png,red\n",
            "line 2 of .*csv has no column 'text': it has file_name, cap",
        ),
        (
            "metadata.csv",
            b"file_name,text\na.png,a red, bold sign\n",
            "line 2 of .* not one value for each of 2 columns",
        ),
        ("metadata.csv", b"file_name,text\na.png\n", "line 2 of .*csv has not one value for each of 2 columns"),
        ("metadata.csv", b"file_name,text,text\na.png,a,b\n", "two columns of one name: file_name, text, text"),
        ("metadata.csv", b'file_name,text\na.png,"a\n', "line 2 of .*csv is no CSV: unexpected end of data"),
        ("metadata.csv", b"", "metadata.csv is empty"),
        ("a.txt", b"\xff", "a.txt is no text in UTF-8"),
        ("a.txt", b"\n", "the caption in .*a.txt is '.n': write some words"),
        ("more/c.txt", b"green", "signs/a.png has no caption, nor have 1 more"),
        (
            "c.txt",
            b"green",
            "has no captions: put metadata.jsonl or metadata.csv .*, or a .txt or .caption beside .*or give one --pro",
        ),
    ],
)
def test_files_that_cannot_be_read_are_one_clear_line(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_captions_of_kohyas_scripts_are_their_first_lines_and_leave_a_txt_the_last_word(folder):
    (folder / "a.caption").write_text("\ufeffa red sign\r\nof no use\r\n", encoding="utf-8", newline="")
    (folder / "b.TXT").write_text("a blue\nsign\n")
    (folder / "b.caption").write_text("another sign")
    (folder / "more/c.Caption").write_text("“green”", encoding="utf-8")
    dataset = load(folder)
    assert dataset.captions == ["a red sign", "a blue\nsign", "“green”"]
    assert dataset.dataset.source.listing.describe_left_out() == "files of other kinds (.caption 1)"
    (folder / "a.caption").write_text("\na red sign")
    with pytest.raises(ValueError, match=r"the caption in .*a.caption is '': write some words"):
        load(folder)


def test_captions_in_two_places_are_refused(folder):
    write_metadata(folder, ROWS)
    (folder / "a.txt").write_text("a red sign")
    with pytest.raises(ValueError, match="captions in metadata.jsonl and text files beside images: leave one"):
        load(folder)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(images="nowhere"), FileNotFoundError, "no folder .*nowhere: give a folder of images, or hf:NAME"),
        (dict(images="empty"), FileNotFoundError, "no images in .*empty"),
        (dict(images="signs", prompt=" "), ValueError, "the prompt is ' ': write some words"),
        (dict(images="signs", prompt="x", multiple=16), ValueError, "resolution of 8 is no multiple of 16"),
    ],
)
def test_what_is_not_there_is_one_clear_line(folder, arguments, error, message):
    (folder.parent / "empty").mkdir()
    with pytest.raises(error, match=message):
        load_captioned(**{"resolution": 8, "multiple": 8, **arguments, "images": folder.parent / arguments["images"]})


def shaped(folder, **sizes):
    """Images of a colour by their number and of the given (height, width)."""
    folder.mkdir()
    for number, (name, (height, width)) in enumerate(sizes.items()):
        Image.new("RGB", (width, height), (number, 0, 0)).save(folder / f"{name}.png")
    return folder


def test_aspect_buckets_bring_each_image_to_its_shape(tmp_path):
    folder = shaped(tmp_path / "x", a=(40, 40), b=(40, 100), c=(41, 40), d=(100, 41))
    dataset = load_captioned(folder, "x", resolution=32, multiple=4, aspect_buckets=True)
    assert dataset.dataset.buckets.sizes == [(20, 52), (32, 32), (52, 20)]
    assert [tuple(dataset[index, False][0].shape) for index in range(4)] == [
        (3, 32, 32),
        (3, 20, 52),
        (3, 32, 32),
        (3, 52, 20),
    ]
    assert [dataset[index, True][0].unique().tolist() for index in range(4)] == [[0], [0, 1], [0, 2], [0, 3]]


def test_a_crop_is_the_centre_of_the_largest_part_that_has_the_shape(tmp_path):
    # Columns of value 0 to 63 at the bucket's height: only cut. Its nearest shape is 20 by 52.
    (tmp_path / "x").mkdir()
    image = Image.new("L", (64, 20))
    image.putdata([column for _ in range(20) for column in range(64)])
    image.save(tmp_path / "x" / "a.png")
    dataset = load_captioned(tmp_path / "x", "x", resolution=32, multiple=4, aspect_buckets=True)
    expected = torch.arange(6, 58, dtype=torch.uint8).expand(3, 20, 52)
    assert torch.equal(dataset[0, False][0], expected)


def test_images_are_turned_as_their_camera_says(tmp_path):
    image = Image.new("RGB", (40, 16), BLUE)
    image.paste(RED, (0, 0, 20, 16))  # red on the left of what the sensor saw
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: left is then above
    for name in ("a.jpg", "b.png"):
        image.save(tmp_path / name, exif=exif)
    dataset = load_captioned(tmp_path, "x", resolution=32, multiple=4, aspect_buckets=True)
    assert dataset.dataset.source.size(0) == (40, 16) and dataset.dataset.buckets.sizes[0] == (52, 20)
    for index in range(2):
        turned = dataset[index, False][0]
        assert turned[0, 3].float().mean() > 240 and turned[2, -3].float().mean() > 240


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_bytes_make_a_broken_image_or_another_one(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    Image.new("RGB", (24, 16), BLUE).save(tmp_path / "a.jpg", exif=exif)
    whole, generator = (tmp_path / "a.jpg").read_bytes(), random.Random(0)
    pictures = load_captioned(tmp_path, "x").dataset.source
    found = set()
    for _ in range(600):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[generator.randrange(120)] = generator.randrange(256)
        (tmp_path / "a.jpg").write_bytes(damaged)
        for read in (pictures.size, pictures.__getitem__):
            try:
                read(0)
            except BrokenImageError as error:
                found.add("\n" in str(error))
            else:
                found.add("whole")
    assert found == {"whole", False}


def test_a_broken_image_is_named_or_replaced_by_the_next_of_its_bucket(tmp_path, capfd):
    folder = shaped(tmp_path / "x", a=(40, 40), b=(40, 100), c=(40, 100), d=(40, 40), e=(40, 100))
    whole = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(whole[:60])  # its size can be read, its pixels cannot
    arguments = dict(prompt="x", resolution=32, multiple=4, aspect_buckets=True)
    with pytest.raises(BrokenImageError, match="x/b.png is not a readable image"):
        load_captioned(folder, **arguments)[1, False]
    (folder / "e.png").write_bytes(b"cut")  # not even its size
    with pytest.raises(BrokenImageError, match="x/e.png is not a readable image"):
        load_captioned(folder, **arguments)

    dataset = load_captioned(folder, **arguments, broken="skip")
    assert dataset.dataset.buckets.of_image.tolist() == [1, 0, 0, 1, 1]  # e as the next after it, which is a
    assert [dataset[index, False][1] for index in range(5)] == [0, 2, 2, 3, 0]
    assert dataset.dataset.broken.tolist() == [False, True, False, False, True]
    said = "".join(capfd.readouterr())
    assert said.count("skipped: ") == 2 and "x/b.png is not" in said and "x/e.png is not" in said

    (folder / "c.png").write_bytes(whole[:60])
    with pytest.raises(BrokenImageError, match="none of the 2 images of x can be read"):
        load_captioned(folder, **arguments, broken="skip")[1, False]


def test_if_no_size_can_be_read_it_is_said(tmp_path):
    (tmp_path / "a.png").write_bytes(b"cut")
    with pytest.raises(BrokenImageError, match="none of the 1 images can be read"):
        load_captioned(tmp_path, "x", resolution=32, multiple=4, aspect_buckets=True, broken="skip")


# ---------------------------------------------------------------------------------------------------
# The hub: stand-ins for the parts of Hugging Face's library that the code uses.

Feature = type("Image", (), {"__init__": lambda self, decode=True: None})


class Rows:
    def __init__(self, columns):
        self.columns = columns
        self.features = {name: Feature() if name in ("picture", "mask") else "" for name in columns}

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        return {name: column[key] for name, column in self.columns.items()}

    def cast_column(self, column, feature):
        return self

    def select_columns(self, name):
        return Rows({name: self.columns[name]})

    def remove_columns(self, name):
        return Rows({column: values for column, values in self.columns.items() if column != name})


def encoded(size, colour):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    (tmp_path / "red.png").write_bytes(encoded((8, 8), RED))
    pictures = [
        {"bytes": encoded((20, 8), BLUE), "path": None},
        {"bytes": None, "path": str(tmp_path / "red.png")},
        {"bytes": b"cut", "path": None},
    ]
    rows = Rows({"picture": pictures, "text": ["blue", "red ", "broken"], "empty": ["a", "", None]})
    library = types.SimpleNamespace(load_dataset=lambda name, split, cache_dir: rows, Image=Feature)
    monkeypatch.setitem(sys.modules, "datasets", library)


def test_images_and_captions_of_the_hub(hub):
    dataset = load("hf:signs/few")
    assert (dataset.dataset.name, dataset.captions) == ("hf:signs/few", ["blue", "red", "broken"])
    assert [dataset[index, False][0][:, 0, 0].tolist() for index in range(2)] == [list(BLUE), list(RED)]
    assert load("hf:signs/few", prompt="x", caption_column="none").captions == ["x"] * 3
    with pytest.raises(BrokenImageError, match="image 2 of hf:signs/few is not a readable image"):
        dataset[2, False]
    buckets = load_captioned(
        "hf:signs/few", resolution=32, multiple=4, aspect_buckets=True, image_column="picture", broken="skip"
    ).dataset.buckets
    assert (buckets.sizes, buckets.of_image.tolist()) == ([(20, 52), (32, 32)], [0, 1, 0])


def test_masks_and_repeats_of_the_hub(hub, monkeypatch):
    rows = sys.modules["datasets"].load_dataset("signs/few", "train", None)
    masks = {"mask": [None, {"bytes": encoded((8, 8), "white"), "path": None}, None], "times": [1, 3, 1]}
    library = sys.modules["datasets"]
    monkeypatch.setattr(library, "load_dataset", lambda *_, **__: Rows(rows.columns | masks))
    dataset = load("hf:signs/few", mask_column="mask", repeats_column="times")
    assert dataset.notes == ["1 of 3 images have masks", "by their repeats, an epoch has 5 images"]
    (mask,) = dataset.masks.on_grid(dataset.dataset, lambda height, width: (1, 1)).items()
    assert mask == (1, torch.ones(1, 1)) and dataset[0, False][0][:, 0, 0].tolist() == list(BLUE)
    with pytest.raises(ValueError, match="hf:signs/few has no images in its column 'text', but str"):
        load("hf:signs/few", mask_column="text")
    with pytest.raises(ValueError, match="row 0 of hf:signs/few repeats 'blue' times: give a whole number"):
        load("hf:signs/few", mask_column="mask", repeats_column="text")
    masks["mask"] = [None] * 3
    assert load("hf:signs/few", mask_column="mask").notes == ["0 of 3 images have masks"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(caption_column="caption"), "hf:signs/few has no column 'caption': it has picture, text, empty"),
        (dict(image_column="photo"), "hf:signs/few has no column 'photo': it has picture"),
        (dict(image_column="text"), "hf:signs/few has no images in its column 'text', but str"),
        (dict(caption_column="empty"), "the caption in row 1 of hf:signs/few is '': write some words"),
    ],
)
def test_what_the_hub_cannot_give_is_one_clear_line(hub, arguments, message):
    with pytest.raises(ValueError, match=message):
        load("hf:signs/few", **arguments)


def test_without_a_source_there_are_handwritten_digits_in_words():
    captioned = load_captioned(None, resolution=16, multiple=4)
    digits = Digits("train", 16)
    assert captioned.dataset.name == "handwritten digits" and len(captioned) == len(digits)
    for index in (0, 1, 2, 5):
        pixels, number = captioned[index, False]
        pixels_of_digit, digit = digits[index]
        assert torch.equal(pixels, ((pixels_of_digit + 1) * 127.5).round().to(torch.uint8)) and number == index
        assert captioned.captions[index] == f"a handwritten {('zero', 'one', 'two', 'three', 'four', 'five')[digit]}"
    assert set(load_captioned(None, "a digit", resolution=16, multiple=4).captions) == {"a digit"}
