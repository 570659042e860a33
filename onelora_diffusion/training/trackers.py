"""Follow a run at TensorBoard or Weights & Biases; a resumed run continues there."""

import io
import secrets
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from onelora_diffusion.files import write_bytes
from onelora_diffusion.training.settings import RunSettings

PROJECT = "onelora-diffusion"
WANDB_ID = "wandb-id"  # a file in the run's folder


def start_trackers(accelerator: Accelerator, settings: RunSettings, step: int) -> None:
    """Open the trackers with which `accelerator` logs, at a step; every process must call it.

    TensorBoard's entries of later steps, which a killed run may have left, are removed. At Weights & Biases the run
    whose id is in the folder is continued.
    """
    flat = {name: str(value) for name, value in settings.as_json().items()}
    options = {"tensorboard": {"purge_step": step + 1}}
    if settings.track == "wandb" and accelerator.is_main_process:
        identity = wandb_id(settings.output_dir / WANDB_ID, is_new=step == 0)
        options["wandb"] = {"id": identity, "resume": "allow", "dir": str(settings.output_dir)}
    # TensorBoard shows each written set of settings as another run, so they are written once.
    is_shown = settings.track == "tensorboard" and step > 0 and (settings.output_dir / PROJECT).is_dir()
    accelerator.init_trackers(PROJECT, None if is_shown else flat, options)


def wandb_id(path: Path, is_new: bool) -> str:
    """The id of a run at Weights & Biases, which is kept in a file; a new run gets a new id."""
    if is_new or not path.is_file():
        write_bytes(path, secrets.token_hex(4).encode())
    return path.read_text()


def show_picture(accelerator: Accelerator, name: str, png: bytes, step: int) -> None:
    """Send a PNG to all trackers."""
    for tracker in accelerator.trackers:
        # Other trackers accept only their default layout.
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        tracker.log_images({name: picture[None]}, step, **layout)
