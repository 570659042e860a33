"""Masks: white is learned; cropped as their images, and the mean of each latent's cell; or refused by name."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from reading import load_captioned

from onelora_diffusion.data.decoding import BrokenImageError
from onelora_diffusion.data.identity import data_identity, fingerprint
from onelora_diffusion.data.listing import describe
from onelora_diffusion.diffusion import training_losses
from onelora_diffusion.training.task import TrainingData

HALF = np.repeat([[0, 255]], 8, axis=0).repeat(4, axis=1).astype(np.uint8)  # 8 by 8 pixels, the right ones white


@pytest.fixture
def folder(tmp_path):
    """Two images of 8 by 8 pixels, a.jpg and b.png."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.jpg")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "b.png")
    return tmp_path


def load(folder, prompt="x", **arguments):
    return load_captioned(folder, prompt, **dict(resolution=8, multiple=2) | arguments)


def on_grid(captioned):
    """The masks on cells of 2 by 2 pixels."""
    return captioned.masks.on_grid(captioned.dataset, lambda height, width: (height // 2, width // 2))


def in_16_bits(values):
    return Image.fromarray(values.astype(np.uint16) * 257)


def with_alpha(values):
    """White and opaque where the mask is white, and transparent elsewhere."""
    return Image.merge("LA", [Image.new("L", values.shape[::-1], 255), Image.fromarray(values)]).convert("RGBA")


def of_palette(values):
    """Classes 0 and 1 of a palette of black and white."""
    image = Image.fromarray(values // 255)
    image.putpalette([0, 0, 0, 255, 255, 255])
    return image


@pytest.mark.parametrize(
    "made",
    [
        Image.fromarray,
        in_16_bits,
        with_alpha,
        of_palette,
        lambda values: Image.fromarray(values).convert("RGB"),
        lambda values: Image.fromarray(values).convert("RGBA"),
        lambda values: Image.fromarray(values).convert("1"),
        lambda values: Image.fromarray(values.astype(np.float32) / 255),
    ],
    ids=["grey", "16 bits", "alpha", "palette", "RGB", "RGBA", "1 bit", "floating point"],
)
def test_masks_of_all_kinds_of_files_are_the_same(folder, made):
    image = made(HALF)
    name = "a.mask.tif" if image.mode == "F" else "a.mask.png"
    image.save(folder / name)
    captioned = load(folder)
    (mask,) = on_grid(captioned).items()
    assert mask[0] == 0 and torch.equal(mask[1], torch.tensor([0.0, 0, 1, 1]).expand(4, 4))
    assert len(captioned) == 2 and captioned.notes == ["1 of 2 images have masks"]
    assert describe(captioned.dataset).endswith(": 2 images")


def test_a_mask_in_jpeg_and_one_of_onetrainer_are_read(folder):
    Image.fromarray(HALF).save(folder / "a.mask.jpg", quality=95)
    Image.fromarray(HALF).save(folder / "b-masklabel.png")
    masks = on_grid(load(folder))
    torch.testing.assert_close(masks[0], masks[1], rtol=0, atol=0.02)


def test_a_mask_is_cropped_and_scaled_as_its_image_and_averaged_over_the_latents(tmp_path):
    # 20 by 8 pixels, cropped to columns 6 to 13; grey values by column.
    columns = np.arange(20, dtype=np.uint8) * 13
    Image.fromarray(np.tile(columns, (8, 1))).convert("RGB").save(tmp_path / "a.png")
    Image.fromarray(np.tile(columns, (8, 1))).save(tmp_path / "a.mask.png")
    captioned = load(tmp_path)
    pixels = captioned.dataset[0][0][0].float() / 255
    assert pixels[0].mul(255).tolist() == columns[6:14].tolist()
    expected = pixels.reshape(4, 2, 4, 2).mean((1, 3))
    torch.testing.assert_close(on_grid(captioned)[0], expected, rtol=0, atol=1e-6)

    # Resized by a third, each in its own bucket: a mask that looks like its image is what that becomes.
    noise = np.random.default_rng(0).integers(0, 256, (24, 60), dtype=np.uint8)
    Image.fromarray(noise).convert("RGB").save(tmp_path / "a.png")
    Image.fromarray(noise).save(tmp_path / "a.mask.png")
    captioned = load(tmp_path, resolution=16, aspect_buckets=True)
    pixels = captioned.dataset[0][0][0].float() / 255
    assert pixels.shape[0] < 16 < pixels.shape[1]
    expected = pixels.reshape(pixels.shape[0] // 2, 2, -1, 2).mean((1, 3))
    torch.testing.assert_close(on_grid(captioned)[0], expected, rtol=0, atol=1e-6)


def test_a_mask_is_turned_as_its_own_camera_says(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the right side is then below
    Image.fromarray(HALF).save(folder / "a.mask.png", exif=exif)
    assert torch.equal(on_grid(load(folder))[0], torch.tensor([0.0, 0, 1, 1])[:, None].expand(4, 4))


def test_a_clip_has_one_mask_for_all_its_frames(folder):
    (folder / "v1.walk").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8)).save(folder / f"v1.walk/{number}.png")
    Image.fromarray(HALF).save(folder / "v1.walk.mask.png")
    captioned = load(folder, frames=3)
    masks = on_grid(captioned)
    assert [captioned.dataset.source.names[index] for index in masks] == ["v1.walk"]
    (clip,) = masks
    own = TrainingData.masks_of(
        SimpleNamespace(masks=masks), torch.tensor([clip, clip, 0]), [False, True, False], (2, 4, 4)
    )
    assert own.shape == (3, 1, 2, 4, 4)
    error = torch.zeros(3, 1, 2, 4, 4)
    error[..., 0, :, :2], error[..., 1, :, 2:] = 1, 3  # on the left of the first frame, on the right of the second
    scheduler = FlowMatchEulerDiscreteScheduler()
    losses = training_losses(
        error, torch.zeros_like(error), torch.zeros_like(error), torch.tensor([5] * 3), scheduler, own
    )
    assert losses["loss"].tolist() == [9 / 2, 1 / 2, (1 + 9) / 4]


@pytest.mark.parametrize("made", ["walk.mask", "walk.mask.gif"])
def test_masks_of_single_frames_are_refused(folder, made):
    frames = [Image.fromarray(HALF)] * 3
    for number, frame in enumerate(frames):
        (folder / "walk").mkdir(exist_ok=True)
        frame.save(folder / f"walk/{number}.png")
        if made == "walk.mask":
            (folder / made).mkdir(exist_ok=True)
            frame.save(folder / made / f"{number}.png")
    if made == "walk.mask.gif":
        frames[0].save(folder / made, save_all=True, append_images=[frames[1].transpose(Image.Transpose.ROTATE_90)])
    with pytest.raises(
        ValueError, match=f"{made} (is a mask of many frames: a clip has one|has 2 frames: all frames of)"
    ):
        on_grid(load(folder, frames=3))


def write_table(folder, *rows):
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_a_column_names_masks_which_are_no_images(folder):
    (folder / "masks").mkdir()
    Image.fromarray(HALF).save(folder / "masks/a.png")
    assert "images in a folder of masks are trained on: name these NAME.mask.png" in load(folder).notes[0]
    rows = [{"file_name": "a.jpg", "text": "a", "m": "masks/a.png"}, {"file_name": "b.png", "text": "b", "m": ""}]
    write_table(folder, *rows)
    for prompt, captions in ((None, ["a", "b"]), ("x", ["x", "x"])):
        captioned = load(folder, prompt, mask_column="m")
        assert captioned.captions == captions and [*on_grid(captioned)] == [0] and len(captioned.notes) == 1
    write_table(folder, {"file_name": "a.jpg", "text": "a", "m": None}, rows[1])
    with pytest.raises(ValueError, match="masks/a.png has no caption: write one"):
        load(folder, None, mask_column="m")
    write_table(folder, {"file_name": "a.jpg", "text": "a", "m": "masks/../masks/a.png"}, rows[1])
    named = "masks/a.png has no caption: metadata.jsonl names it in 'm', which is not read: give --mask-column m if it"
    with pytest.raises(ValueError, match=named):
        load(folder, None)
    write_table(folder, {"file_name": "a.jpg", "text": "a", "m": None}, rows[1])
    (folder / "masks/a.png").unlink()
    assert load(folder, None, mask_column="m").notes == ["0 of 2 images have masks"]


def save(name, values, **options):
    return lambda folder: Image.fromarray(values).save(folder / name, **options)


COLOURED = np.zeros((8, 8, 3), np.uint8)
COLOURED[2:, :, 1] = 255


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (save("a.mask.png", np.full((4, 8), 255, np.uint8)), "a.mask.png has 8x4 pixels, and its image 8x8: make"),
        (save("a.mask.png", 0 * HALF), "a.mask.png is dark, 0 of 255 at its brightest: a mask is white where"),
        (save("a.mask.png", HALF // 255), "a.mask.png is dark, 1 of 255 at its brightest"),
        (
            save("a.mask.png", COLOURED),
            "a.mask.png has colours: a mask is white where its image is learned, and black",
        ),
        (save("c.mask.png", HALF), "c.mask.png is the mask of no image: there is none of the name c"),
        (save("a.png.mask.png", HALF), "a.png.mask.png is the mask of no image: there is none of the name a.png"),
        (lambda folder: (folder / "a.mask.png").write_bytes(b"cut"), "a.mask.png is not a readable image"),
        (
            lambda folder: (folder / "a.mask.png").symlink_to("nowhere.png"),
            "a.mask.png is not .*No such file",
        ),
    ],
)
def test_what_is_no_mask_is_one_line(folder, change, message):
    change(folder)
    with pytest.raises((ValueError, BrokenImageError), match=message) as caught:
        on_grid(load(folder))
    assert "\n" not in str(caught.value)


def test_two_masks_of_an_image_and_masks_beside_a_column_are_refused(folder):
    for name in ("a.mask.png", "a-masklabel.png"):
        Image.fromarray(HALF).save(folder / name)
    with pytest.raises(ValueError, match="a.jpg has two masks, a-masklabel.png and a.mask.png"):
        load(folder)
    write_table(folder, {"file_name": "a.jpg", "m": "a.mask.png"}, {"file_name": "b.png", "m": ""})
    with pytest.raises(ValueError, match="a-masklabel.png is a mask that the table does not name"):
        load(folder, mask_column="m")
    write_table(folder, {"file_name": "a.mask.png", "text": "a"})
    with pytest.raises(ValueError, match="line 1 of .* names a.mask.png as an image: by its name it is a mask"):
        load(folder, None)
    with pytest.raises(ValueError, match=r"'m' is a column of a table, metadata.jsonl or .*, and .* has none"):
        (folder / "metadata.jsonl").unlink()
        load(folder, mask_column="m")


def test_a_mask_that_is_white_outside_of_the_crop_alone_is_refused(tmp_path):
    values = np.zeros((8, 20), np.uint8)
    values[:, :3] = 255
    Image.new("RGB", (20, 8)).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "a.mask.png")
    with pytest.raises(ValueError, match=re.escape("is black within the 8x8 pixels to which its image is cropped")):
        on_grid(load(tmp_path))


def test_a_broken_image_has_no_mask_where_such_images_are_skipped(folder):
    for name in ("a", "b"):
        Image.fromarray(HALF).save(folder / f"{name}.mask.png")
    (folder / "a.jpg").write_bytes(b"cut")
    with pytest.raises(BrokenImageError, match="a.jpg is not a readable image"):
        on_grid(load(folder))
    assert [*on_grid(load(folder, broken="skip"))] == [1]


def test_masks_are_part_of_the_identity_and_of_no_cache_of_latents(folder):
    def known():
        captioned = load(folder)
        masks = [captioned.masks] if captioned.masks else []
        return data_identity(captioned.dataset, captioned.captions, *masks), fingerprint(captioned.dataset)

    found = [known()]
    for values in (HALF, HALF[:, ::-1]):
        Image.fromarray(values).save(folder / "a.mask.png")
        found.append(known())
    (folder / "a.mask.png").rename(folder / "b.mask.png")
    found.append(known())
    assert len({identity for identity, _ in found}) == 4 and len({latents for _, latents in found}) == 1
