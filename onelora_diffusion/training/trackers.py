"""Where a run is followed: TensorBoard or Weights & Biases, which go on where a resumed run goes on."""

import io
import secrets
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from onelora_diffusion.files import write_bytes
from onelora_diffusion.training.run import Run

PROJECT = "onelora-diffusion"
WANDB_ID = "wandb-id"  # in the run's folder


def start_trackers(accelerator: Accelerator, run: Run) -> None:
    """Opens the trackers that `accelerator` logs with, at the step that the run is at; every process must call it.

    TensorBoard forgets what it was told of later steps, by a run that was killed or is started over. Weights & Biases
    goes on with the run whose id lies in the folder.
    """
    settings = run.settings
    flat = {name: str(value) for name, value in settings.as_json().items()}
    options = {"tensorboard": {"purge_step": run.step + 1}}
    if settings.track == "wandb" and accelerator.is_main_process:
        identity = wandb_id(settings.output_dir / WANDB_ID, is_new=run.step == 0)
        options["wandb"] = {"id": identity, "resume": "allow", "dir": str(settings.output_dir)}
    # TensorBoard shows each set of settings as a run of its own: one is enough.
    is_shown = settings.track == "tensorboard" and run.step > 0 and (settings.output_dir / PROJECT).is_dir()
    accelerator.init_trackers(PROJECT, None if is_shown else flat, options)


def wandb_id(path: Path, is_new: bool) -> str:
    """The id of a run at Weights & Biases, kept in a file; a new run has a new one."""
    if is_new or not path.is_file():
        write_bytes(path, secrets.token_hex(4).encode())
    return path.read_text()


def show_picture(accelerator: Accelerator, name: str, png: bytes, step: int) -> None:
    """A PNG, for the trackers there are."""
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}  # the others take no other
        picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        tracker.log_images({name: picture[None]}, step, **layout)
