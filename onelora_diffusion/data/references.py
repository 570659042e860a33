"""Reference images, which a prompt says how to edit, or how a clip goes on from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from onelora_diffusion.data.decoding import opened, read_image, upright_size
from onelora_diffusion.data.identity import file_digest
from onelora_diffusion.families.family import Edit, sides_of
from onelora_diffusion.files import printable


@dataclass(frozen=True)
class ReferenceImage:
    """A file with a picture, and a hash of its content (`data.identity.file_digest`)."""

    path: Path
    digest: str

    def image(self) -> Image.Image:
        """The picture, upright and in RGB; BrokenImageError if it can be read no more."""
        return read_image(self.path)


@dataclass(frozen=True)
class FirstFrame:
    """The first frame of a clip, as it is learned: cropped, and of another clip where it is skipped as unreadable."""

    clips: Dataset = field(compare=False)  # `[index] -> (pixels (3, frames, height, width), number)`
    index: int = field(compare=False)
    digest: str  # a hash of the clip's file

    def image(self) -> Image.Image:
        pixels, _ = self.clips[self.index]
        return Image.fromarray(pixels[:, 0].movedim(0, -1).numpy())


def reference_image(path: Path, named: str) -> ReferenceImage:
    """The reference image in a file, `named` in errors: FileNotFoundError, or BrokenImageError if it is no image."""
    if not path.is_file():
        raise FileNotFoundError(f"{named} is {printable(str(path), 200)}, and there is no such file")
    with opened(path, f"{named}, {printable(str(path), 200)},") as image:
        upright_size(image)
    return ReferenceImage(path, file_digest(str(path), times=False).hex())


def edits_of(
    prompts: Sequence[str], files: Sequence[Path], each: int, size: int | tuple[int, int], flag: str, frames: int = 1
) -> list[Edit]:
    """Edits of reference images by prompts.

    Args:
        files: those of all prompts, or of each in turn; an error if one is missing or no image (`reference_image`).
        each: number of reference images of a prompt; ValueError if there are other than so many for all, or for each.
        size: side of the edits in pixels, or height and width.
        flag: what gives the files, for errors.
        frames: of the clips that begin with them; 1: images are drawn.
    """
    if prompts and len(files) not in (each, each * len(prompts)):
        raise ValueError(
            f"{flag} has {len(files)} files: give {each} for all prompts, or {each} for each of the {len(prompts)}"
        )
    images = tuple(reference_image(Path(file), flag) for file in files)
    rows = [images[first : first + each] for first in range(0, len(images), each)]
    return [Edit(prompt, rows[number % len(rows)], sides_of(size), frames) for number, prompt in enumerate(prompts)]
