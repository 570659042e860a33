"""The subjects of a command: a folder of images for each, or a table with settings of each."""

from dataclasses import replace
from pathlib import Path

from onelora_diffusion.data.listing import OF_A_RUN, RUN_OUTPUT, SYSTEM
from onelora_diffusion.files import printable
from onelora_diffusion.training.settings import RunSettings, read_yaml, with_values

# The settings that a table may give for each subject; all others are those of the batch and of the base.
OF_A_SUBJECT = {
    *("images", "dataset", "data_root", "image_column", "caption_column", "label_column", "prompt"),
    *("mask_column", "repeats_column", "repeats_by_folder", "trigger", "caption_shuffles", "keep_tags"),
    *("validation_images", "validation_split"),
    *("validation_prompt", "flip", "broken_images", "caption_drop", "label_drop", "seed", "max_steps", "batch_size"),
    *("learning_rate", "class_learning_rate", "lr_schedule", "warmup_steps", "max_grad_norm", "ema_decay"),
}


def subjects_of(settings: RunSettings) -> dict[str, RunSettings]:
    """The settings of each subject by its name: those of a run of its own, into a folder of that name.

    OSError or ValueError if there is no such folder or table, it is empty, a name cannot be that of a folder or
    differs from another by capitals alone, or a table has a setting that is no subject's own.
    """
    source = settings.subjects
    found = _of_table(settings, source) if source.suffix in (".yaml", ".yml") else _of_folder(settings, source)
    seen: dict[str, str] = {}
    for name in found:
        check_name(name or "", source)  # which is None in a table without it
        if (other := seen.setdefault(name.casefold(), name)) != name:
            raise ValueError(f"{source}: {other} and {name} are one name where capitals do not count: rename one")
    return {name: _own(settings.output_dir, name, own) for name, own in found.items()}


def _of_folder(settings: RunSettings, folder: Path) -> dict[str, RunSettings]:
    if not folder.is_dir():
        raise NotADirectoryError(
            f"--subjects {folder} is no folder: give one with a folder of images for each subject, or a table, *.yaml"
        )
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    names = [name for name in names if name[0] != "." and name.lower() not in SYSTEM]
    if not names:
        raise FileNotFoundError(f"--subjects {folder} has no folder of images: put one there for each subject")
    return {name: settings.of_folder(folder / name) for name in names}


def _of_table(settings: RunSettings, path: Path) -> dict[str, RunSettings]:
    try:
        table = read_yaml(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"--subjects {path}: there is no such table") from None
    if not table:
        raise ValueError(f"{path} is empty: give each subject as `name:`, with its settings below")
    for name, values in table.items():
        if not isinstance(values, dict):
            raise ValueError(f"{path}: {printable(name)} has no settings: give some, as in `images: folder`")
        for key in values:
            if key not in OF_A_SUBJECT:
                raise ValueError(f"{path}: {key} of {printable(name)} is none of a subject's settings")
    return {name: with_values(settings, values, f"{path}, {name}") for name, values in table.items()}


def check_name(name: str, source: Path) -> None:
    """ValueError for a name that cannot be that of a subject's folder."""
    is_reserved = name.lower() in OF_A_RUN | RUN_OUTPUT
    if not name.strip() or not name.isprintable() or set(name) & set("/\\") or name[0] == "." or is_reserved:
        raise ValueError(f"{source}: {printable(repr(name), 60)} cannot be the name of a subject's folder: rename it")


def _own(parent: Path, name: str, own: RunSettings) -> RunSettings:
    named = {}
    for setting in ("prompt", "trigger"):
        if (text := getattr(own, setting, None)) is not None:
            named[setting] = text.replace("{subject}", name)
    if getattr(own, "validation_prompt", None):
        named["validation_prompt"] = tuple(prompt.replace("{subject}", name) for prompt in own.validation_prompt)
    own = replace(own, **named, output_dir=parent / name, subjects=None, subjects_at_once=16)
    own.check()
    return own
