"""Where a base model comes from: the miniature inside the package, a folder, or the hub."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from onelora_diffusion.files import printable
from onelora_diffusion.remote import HUB_ID, is_in_reach


def miniature_path() -> Path:
    """The pipeline folder that ships with the package: a small DiT of handwritten digits 0-4."""
    return Path(__file__).parents[1] / "miniature"


def load_base(base: str | Path | None = None, named_by: Path | None = None):
    """Load a base model as diffusers' `DiTPipeline`, in float32.

    Args:
        base: a pipeline folder (with `model_index.json`), a hub id (`facebook/DiT-XL-2-256`), or None for
            the miniature inside the package.
        named_by: the adapter file that named it; what a file wants fetched is printed before it is.

    Raises:
        FileNotFoundError: `base` is neither a pipeline folder nor shaped like a hub id.
        ValueError: it is one, but does not load as a DiT: damaged, of another kind, not on the hub, no network.
    """
    from diffusers import DiTPipeline

    folder = miniature_path() if base is None else Path(base).expanduser()
    if not folder.exists() and HUB_ID.fullmatch(str(base)):
        folder = _fetch(str(base), named_by)
    elif not folder.is_dir():
        raise FileNotFoundError(
            f"base model '{base}': no such folder; give a diffusers pipeline folder or a hub id like "
            "facebook/DiT-XL-2-256"
        )
    elif not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"base model '{folder}': the folder has no model_index.json, so it is no diffusers pipeline"
        )
    try:
        index = json.loads((folder / "model_index.json").read_text())
        return DiTPipeline.from_pretrained(folder, id2label=class_names(index))
    except Exception as error:  # whatever the JSON reader, the safetensors reader or a wrong class raises
        raise ValueError(f"base model '{base or folder}' does not load: {_first_line(error)}") from error


def class_names(index: dict) -> dict[int, str] | None:
    """`id2label` of a pipeline's `model_index.json` by number; JSON has texts for keys, of which diffusers warns."""
    names = index.get("id2label")
    return names and {int(label): printable(name) for label, name in names.items()}


def resolution_of(pipeline) -> int:
    """The width of a `DiTPipeline`'s images in pixels."""
    return pipeline.transformer.config.sample_size * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)


@contextmanager
def eval_mode(model: nn.Module):
    """Put every submodule in eval mode, and each back in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _fetch(hub_id: str, named_by: Path | None) -> Path:
    """The local folder of a pipeline on the hub, downloaded where it is not in the cache."""
    from diffusers import DiTPipeline

    if named_by is not None and os.environ.get("RANK", "0") == "0":
        print(f"base: {hub_id} (named by {named_by})", flush=True)
    try:
        is_online = is_in_reach(hub_id)
    except FileNotFoundError as error:
        raise ValueError(f"base model '{hub_id}': there is no such folder, and {error}") from error
    try:
        return Path(DiTPipeline.download(hub_id, local_files_only=not is_online))
    except Exception as error:  # the hub's client raises its own, httpx's and the system's
        reason = _first_line(error) if is_online else "the hub is out of reach, and it is not in the cache"
        raise ValueError(f"base model '{hub_id}': there is no such folder, and {reason}") from error


def _first_line(error: Exception) -> str:
    return printable(str(error).strip().split("\n")[0], 400) or type(error).__name__
