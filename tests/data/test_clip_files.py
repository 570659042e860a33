"""Clips of folders of frames, of animated images and of videos: which frames are taken, how they are shown, and which
are refused."""

import json
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from reading import load_captioned

from onelora_diffusion.data import clips as clip_files
from onelora_diffusion.data.clips import at_rate, write_frames
from onelora_diffusion.data.decoding import BrokenImageError
from onelora_diffusion.data.identity import data_identity
from onelora_diffusion.data.latent_cache import shards_of
from onelora_diffusion.data.listing import describe

STEP = 12  # by which frames grow redder


def frame(number, size=(40, 40)):
    """A frame that is as red as its number, and green on the left."""
    image = Image.new("RGB", size, (STEP * number, 0, 0))
    image.paste((STEP * number, 200, 0), (0, 0, size[0] // 2, size[1]))
    return image


def write_folder(folder, count, first=1):
    folder.mkdir(parents=True)
    for number in range(count):
        frame(number).save(folder / f"{first + number}.png")


def write_video(path, count, rate=16, size=(48, 32), codec="mpeg4"):
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(count):
            container.mux(stream.encode(av.VideoFrame.from_image(frame(number, size))))
        container.mux(stream.encode())


def load(folder, prompt="a clip", frames=5, **changes):
    return load_captioned(folder, prompt, resolution=32, multiple=8, frames=frames, **changes)


def numbers(captioned, name):
    """The numbers of the frames of a clip, by how red they are in their middle on the right."""
    index = captioned.dataset.source.names.index(name)
    clip, caption = captioned[index, False]
    assert caption == index and clip.shape[0] == 3
    return (clip[0, :, 16, 28].numpy() / STEP).round().astype(int).tolist()


def test_the_first_frames_of_each_kind_of_clip_are_taken_in_their_order(tmp_path):
    write_folder(tmp_path / "walk", 12, first=7)  # 9.png comes before 10.png
    pictures = [frame(number) for number in range(9)]
    pictures[0].save(tmp_path / "turn.gif", save_all=True, append_images=pictures[1:], duration=60)
    write_frames(tmp_path / "jump.png", pictures, 10)
    frame(3).save(tmp_path / "still.png")
    captioned = load(tmp_path)
    for name in ("walk", "turn.gif", "jump.png"):
        assert numbers(captioned, name) == [0, 1, 2, 3, 4]
    assert captioned.dataset.buckets.sizes == [
        (32, 32),
        (5, 32, 32),
    ] and captioned.dataset.buckets.of_image.tolist() == [1, 0, 1, 1]
    assert describe(captioned.dataset).endswith("3 clips of 5 frames and 1 single frames")
    assert captioned[1, False][0].shape == (3, 32, 32)
    mirrored, clip = captioned[3, True][0], captioned[3, False][0]
    assert (mirrored.flip(-1) == clip).all() and (clip[1, :, 16, 4] == 200).all() and (clip[1, :, 16, 28] == 0).all()
    assert [part.tolist() for part in shards_of(4, captioned.dataset.buckets)] == [[1], [0, 2, 3]]


def test_a_rate_takes_the_frames_that_are_shown_nearest_to_it(tmp_path):
    def taken(times, rate):
        timed = ((Fraction(str(at)), number) for number, at in enumerate(times))
        return list(at_rate(timed, Fraction(rate)))

    thirty = [Fraction(number, 30) for number in range(31)]
    assert taken(thirty, 30) == list(range(31))
    assert taken(thirty, 10) == list(range(0, 31, 3))
    assert taken(thirty, 16) == [int(30 * k / 16 + 0.5) for k in range(17)]
    assert taken([0, 0.125, 0.25], 16) == [0, 1, 1, 2, 2]  # fewer there: some are taken twice, the last by its time
    assert taken([0, 0.063, 0.125, 0.188], 16) == [0, 1, 2, 3]  # times in whole milliseconds, as .webm has them
    assert taken([], 16) == []
    pictures = [frame(number) for number in range(9)]
    pictures[0].save(tmp_path / "turn.gif", save_all=True, append_images=pictures[1:], duration=50)
    assert numbers(load(tmp_path, frame_rate=10), "turn.gif") == [0, 2, 4, 6, 8]
    with pytest.raises(
        ValueError, match="turn.gif has 5 frames at 10 a second, and 9 are asked for: take the clip out"
    ):
        load(tmp_path, frames=9, frame_rate=10)
    assert data_identity(load(tmp_path).dataset, []) != data_identity(load(tmp_path, frame_rate=10).dataset, [])


def test_videos_are_read_upright_and_refused_by_name(tmp_path):
    write_video(tmp_path / "run.mp4", 12)
    write_video(tmp_path / "run.webm", 12, codec="libvpx")
    content = (tmp_path / "run.mp4").read_bytes()
    upright = bytes.fromhex("00010000" + "00000000" * 3 + "00010000")  # the matrix by which a player turns pictures
    turned = bytes.fromhex("00000000" + "00010000" + "00000000" + "ffff0000" + "00000000")
    at = content.index(upright, content.index(b"tkhd"))
    (tmp_path / "phone.mp4").write_bytes(content[:at] + turned + content[at + len(turned) :])
    captioned = load(tmp_path, aspect_buckets=True)
    assert captioned.dataset.buckets.sizes == [
        (5, 24, 40),
        (5, 40, 24),
    ] and captioned.dataset.buckets.of_image.tolist() == [1, 0, 0]
    phone = captioned[0, False][0]
    assert (phone[1, :, 2] > 150).all() and (phone[1, :, -2] < 50).all()  # what was on the left is on top
    for name in ("run.mp4", "run.webm"):
        assert numbers(load(tmp_path), name) == [0, 1, 2, 3, 4]
        assert numbers(load(tmp_path, frame_rate=8), name) == [0, 2, 4, 6, 8]
    with pytest.raises(ValueError, match="phone.mp4 has 12 frames, and 13 are asked for: take the clip out"):
        load(tmp_path, frames=13)
    (tmp_path / "z.mp4").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n")  # a list of other files
    with pytest.raises(BrokenImageError, match="z.mp4 is not a readable clip: "):
        load(tmp_path)
    (tmp_path / "z.mp4").write_bytes(content[:900])
    with pytest.raises(BrokenImageError, match="z.mp4 is not a readable clip: "):
        load(tmp_path)


def test_a_video_without_pyav_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "run.mp4").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="no images in .*, but videos: give --frames"):
        load(tmp_path, frames=1)
    monkeypatch.setattr(clip_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="run.mp4 is read by PyAV, which is missing: pip install 'onelora-diffusion"):
        load(tmp_path)


def test_captions_stand_beside_clips_or_in_a_table(tmp_path):
    write_folder(tmp_path / "beside" / "walk.v1", 5)
    pictures = [frame(number) for number in range(5)]
    write_frames(tmp_path / "beside" / "jump.png", pictures)
    with pytest.raises(ValueError, match="has no captions: put metadata.jsonl"):
        load(tmp_path / "beside", None)
    (tmp_path / "beside" / "walk.v1.txt").write_text("one walks")
    with pytest.raises(ValueError, match="jump.png has no caption: write one"):
        load(tmp_path / "beside", None)
    (tmp_path / "beside" / "jump.txt").write_text("one jumps")
    assert load(tmp_path / "beside", None).captions == ["one jumps", "one walks"]

    table = tmp_path / "table" / "train"
    write_folder(table / "walk", 5)
    frame(0).save(table / "still.png")
    rows = [{"file_name": "walk", "text": "one walks"}, {"file_name": "still.png", "text": "one stands"}]
    (table / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    captioned = load(tmp_path / "table", None)
    assert dict(zip(captioned.dataset.source.names, captioned.captions, strict=True)) == {
        "train/walk": "one walks",
        "train/still.png": "one stands",
    }
    assert np.array_equal(
        captioned.dataset.source.is_clip, ["walk" in name for name in captioned.dataset.source.names]
    )


def test_what_is_wrong_with_clips_is_one_line(tmp_path):
    write_folder(tmp_path / "short", 4)
    with pytest.raises(ValueError, match="short has 4 frames, and 5 are asked for: take the clip out"):
        load(tmp_path)
    with pytest.raises(ValueError, match="4000001 frames of 32 by 32 pixels are over 4,294,967,296 bytes"):
        load(tmp_path, frames=4_000_001)
    with pytest.raises(ValueError, match="clips of 5 frames are read from folders, and not from handwritten digits"):
        load(None)
    (tmp_path / "short" / "2.png").write_bytes(b"no picture")
    captioned = load(tmp_path, frames=3)
    with pytest.raises(BrokenImageError, match="2.png is not a readable image"):
        captioned[0, False]


@pytest.mark.parametrize("aspect_buckets", [False, True])
def test_a_damaged_video_is_skipped_as_pictures_are(tmp_path, capsys, aspect_buckets):
    for name in ("a", "c"):
        write_folder(tmp_path / name, 6)
    for name in ("b.mp4", "d.gif"):  # the last one is taken for what the first is
        (tmp_path / name).write_bytes(b"\x00\x00\x00\x18ftypisom no video" * 9)
    with pytest.raises(BrokenImageError, match="b.mp4 is not a readable clip"):
        load(tmp_path, aspect_buckets=aspect_buckets)
    captioned = load(tmp_path, aspect_buckets=aspect_buckets, broken="skip")
    assert captioned.dataset.source.names == ["a", "b.mp4", "c", "d.gif"] and len(captioned.dataset.buckets.sizes) == 1
    replaced = [captioned[index, False] for index in range(4)]
    assert [caption for _, caption in replaced] == [0, 2, 2, 0] and replaced[1][0].shape == (3, 5, 32, 32)
    assert captioned.dataset.broken.tolist() == [False, True, False, True]
    assert [line.count("skipped: ") for line in capsys.readouterr().out.splitlines()] == [1, 1]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "b.mp4").write_bytes(b"no video")
    with pytest.raises(BrokenImageError, match="none of the 1 clips and images can be read"):
        load(tmp_path / "only", broken="skip")


def test_a_clip_has_its_first_frame_or_a_named_picture_as_reference(tmp_path):
    for name, first in (("left", 1), ("right", 3)):
        write_folder(tmp_path / name, 6, first=first)
    captioned = load(tmp_path, first_frames=True)
    for index, (own,) in enumerate(captioned.references):
        clip, _ = captioned[index, False]
        assert np.array_equal(np.array(own.image()), clip[:, 0].movedim(0, -1).numpy())
    (tmp_path / "before").mkdir()
    rows = []
    for name in ("left", "right"):
        frame(9).save(tmp_path / "before" / f"{name}.png")
        rows.append(json.dumps({"file_name": name, "text": f"it goes {name}", "before": f"before/{name}.png"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    captioned = load(tmp_path, None, reference_column=("before",))
    assert captioned.captions == ["it goes left", "it goes right"]
    assert [own[0].path.name for own in captioned.references] == ["left.png", "right.png"]
    frame(1).save(tmp_path / "still.png")
    rows.append(json.dumps({"file_name": "still.png", "text": "it stands", "before": "before/left.png"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match="still.png is a single image, and clips are learned from their first frame"):
        load(tmp_path, None, reference_column=("before",))
