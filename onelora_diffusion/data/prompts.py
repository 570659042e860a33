"""Files of prompts: one prompt a line, or a table with groups and reference images."""

from dataclasses import dataclass
from pathlib import Path

from onelora_diffusion.data.captions import checked
from onelora_diffusion.data.listing import list_images
from onelora_diffusion.data.metadata import rows_of
from onelora_diffusion.files import printable

COLUMNS = {"prompt", "group", "image"}


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file."""

    prompts: tuple[str, ...]
    groups: tuple[str, ...]  # of each prompt; its images are compared with the reference images of this group
    images: tuple[tuple[Path, str], ...] = ()  # the reference images: (path, group)


def read_prompts(path: Path) -> PromptFile:
    """Read a file of prompts.

    A `.csv` or `.jsonl` has a column `prompt`. Its column `image` names a reference image, or a folder of them,
    relative to the file; its column `group` says which prompts share their reference images. Any other file has one
    prompt a line. FileNotFoundError if the file, or an image that it names, is missing; ValueError if it is no text or
    has no prompt, a prompt is empty or too long, or some rows have no image.
    """
    prompts, groups, images = [], [], {}
    for line, row in rows_of(path):
        named = printable(f"line {line} of {path}")
        if "prompt" not in row or not row.keys() <= COLUMNS:
            listed = printable(", ".join(map(str, row)), 200)
            raise ValueError(f"{named} has the columns {listed}: there are prompt, group and image, the first in all")
        prompts.append(checked(row["prompt"], f"the prompt in {named}"))
        image = row.get("image") or ""
        groups.append(str(row.get("group") or image or prompts[-1]))
        if image:
            found = path.parent / str(image)
            if not found.exists():
                raise FileNotFoundError(f"{named} names {printable(str(image), 200)}, which is not in {path.parent}")
            images |= dict.fromkeys((file, groups[-1]) for file in files_of(found))
    if not prompts:
        raise ValueError(f"{path} has no prompt: write one a line")
    with_images = {group for _, group in images}
    if images and (without := [p for p, group in zip(prompts, groups, strict=True) if group not in with_images]):
        raise ValueError(f"{path} has images, but none for {printable(without[0], 60)!r}: name one for all, or none")
    return PromptFile(tuple(prompts), tuple(groups), tuple(images))


def files_of(path: Path) -> list[Path]:
    """An image, or all images of a folder."""
    if not path.is_dir():
        return [path]
    listing = list_images(path)
    if not listing.images:
        raise FileNotFoundError(f"no images in {path}")
    return [listing.root / name for name in listing.images]
