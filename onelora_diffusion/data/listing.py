"""List the images in a folder and its subfolders, with what is left out; all data sets of files use this."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from onelora_diffusion.files import printable

IMAGES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif"),
    *(".jp2", ".heic", ".heif", ".jxl"),
}
# Files and folders of operating systems, in addition to all names that begin with a dot.
SYSTEM = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
# A folder with one of these files is that of a training run; and its outputs, which may contain images.
OF_A_RUN = {"clock.json", "clock.lock", "onelora_weights.safetensors"}
RUN_OUTPUT = {"samples", "checkpoints", "latents", "lora", "wandb", "onelora-diffusion", "distance.png"}
RUN_OUTPUT |= {"evaluation.png", "evaluation-nearest.png"}
MASK_ENDINGS = (".mask", "-masklabel")  # cat.mask.png; OneTrainer's cat-masklabel.png
LABELS = ("labels", "targets", "_labels")  # attributes with the labels, of data sets here and in torchvision


@dataclass
class Listing:
    """The content of a folder and its subfolders: paths relative to `root`, separated by /.

    Hidden files and folders (`.ipynb_checkpoints`, `._1.png`) and those of operating systems (`__MACOSX`, `Thumbs.db`)
    are ignored. Links to folders are followed.
    """

    root: Path  # absolute
    folders: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)  # see `is_mask`
    others: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # the number of files that were left out, by reason
    used: set[str] = field(default_factory=set)  # the masks and other files that are read, such as captions

    def describe_left_out(self) -> str:
        """The files that were left out and the reasons, as text; "" if there are none."""
        reasons = [f"{reason} ({count:,})" for reason, count in sorted(self.left_out.items())]
        if masks := len(set(self.masks) - self.used):
            reasons.append(f"masks of images ({masks:,})")
        others = [name for name in self.others if name not in self.used]
        kinds = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in others)
        if kinds:
            listed = ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common(5))
            reasons.append(f"files of other kinds ({printable(listed, 200)}{', ...' if len(kinds) > 5 else ''})")
        return "; ".join(reasons)


def list_images(root: str | Path) -> Listing:
    """List the images below a folder, sorted by their folder and then by name; OSError names an unreadable folder."""
    found, runs = Listing(Path(root).absolute()), []
    extensions = Image.registered_extensions()
    readable = {suffix for suffix in IMAGES if extensions.get(suffix) in Image.OPEN}
    for name, entry in _entries(found, runs, str(found.root), "", ()):
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix in readable and is_mask(name):
            found.masks.append(name)  # also a broken link: its image is not to be learned as a whole
        elif not entry.is_file():
            found.left_out["broken links"] += 1
        elif suffix in readable:
            found.images.append(name)
        elif suffix in IMAGES:
            found.left_out[f"{suffix}, which this Pillow does not read"] += 1
        else:
            found.others.append(name)
    found.images.sort(key=os.path.split)
    for run in runs:  # a folder that holds only runs and their caches is not part of the data
        parent = os.path.dirname(run)
        if parent and not any(name.startswith(f"{parent}/") for name in found.images):
            found.folders = [name for name in found.folders if not f"{name}/".startswith(f"{parent}/")]
            found.others = [name for name in found.others if not name.startswith(f"{parent}/")]
    return found


def is_mask(name: str) -> bool:
    """Whether a file is the mask of an image by its name, as cat.mask.png is that of cat.jpg."""
    return os.path.splitext(name)[0].lower().endswith(MASK_ENDINGS)


def masked_by(mask: str) -> str:
    """The name, without its ending, of the image to which a mask belongs."""
    stem = os.path.splitext(mask)[0]
    (ending,) = (each for each in MASK_ENDINGS if stem.lower().endswith(each))
    return stem[: -len(ending)]


def labels_of(dataset) -> Sequence[int] | None:
    """The label of each image if the data set or its source lists them, else None."""
    source = getattr(dataset, "source", dataset)
    return next((vars(each)[key] for each in (dataset, source) for key in LABELS if key in vars(each)), None)


def counted(dataset) -> str:
    """The number of images, or of clips and of the images among them."""
    source = getattr(dataset, "source", dataset)
    if not hasattr(source, "is_clip"):
        return f"{len(dataset):,} images"
    clips = int(source.is_clip.sum())
    others = f" and {len(dataset) - clips:,} single frames" if len(dataset) > clips else ""
    return f"{clips:,} clips of {source.number} frames{others}"


def describe(dataset) -> str:
    """One line about a data set: the number of images, in all and of each class if known, and what was left out."""
    source, words = getattr(dataset, "source", dataset), f"{dataset.name}: {counted(dataset)}"
    if names := getattr(dataset, "id2label", None):
        words += f" of {len(names)} classes"
        if (labels := labels_of(dataset)) is not None:
            counts = Counter(map(int, labels))
            each = [counts[label] for label in names]
            listed = ", ".join(f"{name} {counts[label]:,}" for label, name in names.items())
            words += f" ({listed if len(names) <= 10 else f'{min(each):,} to {max(each):,} images a class'})"
    listing = getattr(source, "listing", None)
    left_out = listing.describe_left_out() if listing else ""
    return f"{words}; left out: {left_out}" if left_out else words


def _entries(
    found: Listing, runs: list[str], folder: str, prefix: str, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, os.DirEntry]]:
    """Yield (path relative to the root, entry) of files; `runs` gets the folders of runs, `above` are the parents."""
    status = os.stat(folder)
    above = (*above, (status.st_dev, status.st_ino))
    with os.scandir(folder) as scanned:
        entries = [each for each in scanned if each.name[0] != "." and each.name.lower() not in SYSTEM]
    if OF_A_RUN & {each.name for each in entries}:
        if prefix:
            found.left_out["folders of training runs"] += 1
            runs.append(prefix[:-1])
            return
        own = [each for each in entries if each.name in RUN_OUTPUT]
        found.left_out.update(["outputs of a training run"] * len(own))
        entries = [each for each in entries if each not in own]
    if prefix:
        found.folders.append(prefix[:-1])
    for entry in entries:
        if not entry.is_dir():
            yield f"{prefix}{entry.name}", entry
        elif (status := entry.stat()) and (status.st_dev, status.st_ino) in above:  # a link that leads back
            found.left_out["links to a folder that they are in"] += 1
        else:
            yield from _entries(found, runs, entry.path, f"{prefix}{entry.name}/", above)
