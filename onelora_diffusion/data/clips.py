"""Clips: the first frames of video files, of animated images and of folders of frames; and single images among them.

Frames are decoded one after the other, as images are (`data.decoding`), and cropped before the next one is decoded.
"""

import importlib.util
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from onelora_diffusion.data.decoding import BrokenImageError, decoded, of_readable, opened
from onelora_diffusion.data.images import Pictures
from onelora_diffusion.data.listing import Listing
from onelora_diffusion.files import printable

VIDEOS = {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi"}
ANIMATED = {".gif", ".webp", ".png", ".avif"}
# A file is read as what it is, whatever its name, and none of these formats names other files.
READ_AS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi", "protocol_whitelist": "file"}
FRAME_RATE = 16.0  # frames a second, at which drawn clips are shown where nothing says another rate
MOST_BYTES = 2**32  # most bytes of the pixels of a clip

Timed = tuple[Fraction, Image.Image]
"""A frame and the second at which it is shown."""


class Clips(Pictures):
    """The clips and single images of a folder: `frames(index)` are the frames of a clip, one after the other.

    Args:
        items: the files by the name of each item: a video, an image, or the frames of a folder.
        number: the frames of a clip that are taken, from its first one on; ValueError if it has fewer.
        rate: frames a second that are taken of a video or an animated image; None takes each one.
        broken: what to do about a file whose frames cannot be counted (see `data.decoding.of_readable`).
    """

    def __init__(
        self, listing: Listing, items: dict[str, list[str]], number: int, rate: float | None, broken: str = "fatal"
    ):
        self.root, self.listing, self.number, self.rate = listing.root, listing, number, rate
        self.paths = [[listing.root / file for file in files[:number]] for files in items.values()]
        self.names = list(items)
        videos = [name for name in items if is_video(name)]
        if videos and importlib.util.find_spec("av") is None:
            raise ValueError(
                f"{self.named(self.names.index(videos[0]))} is read by PyAV, which is missing: "
                "pip install 'onelora-diffusion[video]'; or save its frames as images in a folder"
            )
        numbers = list(map(len, items.values()))
        self.is_clip = np.array(
            of_readable(len(items), lambda i: self._has_frames(i, numbers[i]), broken, "clips and images")
        )

    def __len__(self) -> int:
        return len(self.paths)

    def named(self, index: int) -> str:
        return printable(str(self.root / self.names[index]))

    def _has_frames(self, index: int, files: int) -> bool:
        """Whether an item is a clip; ValueError if one is too short."""
        file, named = self.paths[index][0], self.named(index)
        if files > 1 or file != self.root / self.names[index]:
            there, unit = files, "frames"
        elif is_video(file.name) or is_animated(file, named):
            with self._timed(index, are_decoded=False) as timed:
                there = self._number_of(second for second, _ in timed)
            unit = "frames" + (f" at {self.rate:g} a second" if self.rate else "")
        else:
            return False
        if there < self.number:
            raise ValueError(f"{named} has {there} {unit}, and {self.number} are asked for: take the clip out")
        return True

    def _number_of(self, times: Iterable[Fraction]) -> int:
        """How many frames those at these seconds, in any order, make, counted until there are enough."""
        first, there, seen = None, 0, Fraction(0)
        for number, second in enumerate(times, 1):
            first = second if first is None else min(first, second)
            seen = max(seen, second - first)
            there = number if self.rate is None else int(seen * Fraction(str(self.rate)) + Fraction(3, 2))
            if there >= self.number:
                break
        return there

    def opened(self, index: int):
        return opened(self.paths[index][0], self.named(index))

    def size(self, index: int) -> tuple[int, int]:
        if not is_video(self.paths[index][0].name):
            return super().size(index)
        with self._timed(index) as frames:
            _, first = next(frames)
            return first.height, first.width

    @contextmanager
    def _timed(self, index: int, are_decoded: bool = True) -> Iterator[Iterator[Timed]]:
        """Context manager: the frames of a file; unless `are_decoded`, those of a video are packets, in any order."""
        path, named = self.paths[index][0], self.named(index)
        if is_video(path.name):
            with opened_video(path, named) as (container, stream):
                packets = (packet for packet in container.demux(stream) if packet.size and packet.pts is not None)
                timed = ((packet.pts * stream.time_base, packet) for packet in packets)
                yield frames_of_video(container, stream) if are_decoded else timed
        else:
            with opened(path, named) as image:
                yield frames_of_image(image)

    def frames(self, index: int) -> Iterator[Image.Image]:
        """The frames of a clip, upright and in RGB; BrokenImageError if one is not readable, or too few are there."""
        if self.paths[index][0] != self.root / self.names[index]:
            for path in self.paths[index]:
                with opened(path, printable(str(path))) as image:
                    yield decoded(image)
            return
        with self._timed(index) as timed:
            chosen = (frame for _, frame in timed) if self.rate is None else at_rate(timed, Fraction(str(self.rate)))
            for number in range(self.number):
                frame = next(chosen, None)
                if frame is None:
                    raise BrokenImageError(f"{self.named(index)} ends after {number} of {self.number} frames")
                yield frame


def items_of(listing: Listing, captioned: Iterable[str], but: Collection[str] = ()) -> dict[str, list[str]]:
    """The clips and images of a folder by name, each with its files.

    A video file is a clip, and so are the images of a subfolder together, in the order of the numbers in their names.
    Images in the folder itself, and those that have a caption of their own, are each by themselves. Those of `but` are
    none of these, such as reference images.
    """
    own = set(captioned)
    items = {name: [name] for name in listing.others if is_video(name)}
    for name in (name for name in listing.images if name not in but):
        folder = os.path.dirname(name)
        items.setdefault(name if not folder or name in own else folder, []).append(name)
    return {name: sorted(items[name], key=by_number) for name in sorted(items)}


def by_number(name: str) -> list:
    """A key by which `2.png` comes before `10.png`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def is_video(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in VIDEOS


def is_animated(path: Path, named: str) -> bool:
    """Whether an image file has several frames."""
    if path.suffix.lower() not in ANIMATED:
        return False
    with opened(path, named) as image:
        return getattr(image, "n_frames", 1) > 1


@contextmanager
def opened_video(path: Path, named: str) -> Iterator[tuple]:
    """Context manager: PyAV's container of a file, and its stream of pictures; errors become a BrokenImageError."""
    import av

    try:
        with av.open(os.fspath(path), options=READ_AS) as container:
            stream = next((stream for stream in container.streams.video if stream.codec_context), None)
            if stream is None:
                raise BrokenImageError(f"{named} is not a readable clip: it has no pictures")
            size, most = stream.codec_context.width * stream.codec_context.height, 2 * Image.MAX_IMAGE_PIXELS
            if size > most:
                raise BrokenImageError(f"{named} has {size:,} pixels a frame, and {most:,} is the most")
            yield container, stream
    except (av.FFmpegError, StopIteration) as error:
        raise BrokenImageError(f"{named} is not a readable clip: {error or 'it has no frames'}") from error


def frames_of_video(container, stream) -> Iterator[Timed]:
    """The frames of a video, turned and widened as its file says they are to be shown."""
    start = None
    for number, frame in enumerate(container.decode(stream)):
        second = number / stream.average_rate if frame.pts is None else frame.pts * stream.time_base
        start = second if start is None else start
        image, shape = frame.to_image(), stream.sample_aspect_ratio
        if shape and shape != 1:
            image = image.resize((round(image.width * shape), image.height), Image.Resampling.BICUBIC)
        yield second - start, image.rotate(frame.rotation, expand=True) if frame.rotation else image


def frames_of_image(image: Image.Image) -> Iterator[Timed]:
    """The frames of an animated image; one without a duration is shown for a tenth of a second, as in browsers."""
    second = Fraction(0)
    for number in range(image.n_frames):
        image.seek(number)
        frame = decoded(image)
        yield second, frame.copy() if frame is image else frame
        second += Fraction(image.info.get("duration") or 100) / 1000


def at_rate(timed: Iterator[Timed], rate: Fraction) -> Iterator[Image.Image]:
    """For each second 0, 1/rate, 2/rate, ... the frame that is shown nearest to it, up to the last one."""
    before = None
    wanted = (number / rate for number in count())
    second = next(wanted)
    for at, frame in timed:
        while at >= second:
            is_before = before is not None and second - before[0] < at - second
            yield before[1] if is_before else frame
            second = next(wanted)
        before = at, frame
    if before is not None and second - before[0] <= 1 / (2 * rate):
        yield before[1]


def check_bytes(resolution: int, frames: int) -> None:
    """ValueError for clips of which one would not fit into memory."""
    if 3 * frames * resolution**2 > MOST_BYTES:
        raise ValueError(f"{frames} frames of {resolution} by {resolution} pixels are over {MOST_BYTES:,} bytes")


def write_frames(file, frames: Sequence[Image.Image], rate: float | None = None, **options) -> None:
    """Write a PNG of one image, or an animated PNG of several, which lose nothing and are shown in turns."""
    more = {"save_all": True, "append_images": frames[1:], "duration": 1000 / (rate or FRAME_RATE), "loop": 0}
    frames[0].save(file, format="PNG", **(more if len(frames) > 1 else {}), **options)
