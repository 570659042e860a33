"""Find the checkpoint to resume from, check that settings and data fit, and tell whether the run is finished."""

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from onelora_diffusion.data.identity import DataIdentity
from onelora_diffusion.processes import told_by_main
from onelora_diffusion.storage.adapter_file import WEIGHTS_NAME, read_adapter
from onelora_diffusion.training.checkpoints import Checkpoint, load_newest_checkpoint
from onelora_diffusion.training.run import STATE
from onelora_diffusion.training.settings import FREE_SETTINGS, RunSettings
from onelora_diffusion.training.stopping import Clock

REMEDY = "Resume all the same with --allow-changed-settings, start over with --fresh, or choose another --output-dir"


def agree_on_checkpoint(
    settings: RunSettings, clock: Clock, accelerator: Accelerator
) -> tuple[Checkpoint | None, bool]:
    """(the newest undamaged checkpoint of the run or None, sent to all processes; whether the run is finished).

    Only the main process needs access to the folder. The clock is set to the checkpoint's seconds. ValueError, on
    every process, if it was trained with other settings, or if all checkpoints are damaged.
    """
    found: list[Checkpoint | None] = [None]

    def find() -> tuple[Checkpoint | None, bool]:
        if settings.fresh:
            return None, False
        found[0] = checkpoint = load_newest_checkpoint(settings.output_dir / "checkpoints", print, STATE)
        if checkpoint:
            check_same_settings(settings, checkpoint)
            clock.resume(checkpoint.state["seconds"])
            shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in checkpoint.tensors.items()}
            checkpoint = replace(checkpoint, tensors=shapes)
        return checkpoint, is_finished(settings, found[0], clock)

    checkpoint, finished = told_by_main(accelerator, find)
    if checkpoint is None or accelerator.num_processes == 1:
        return found[0], finished
    clock.resume(checkpoint.state["seconds"])
    tensors = {}
    for name, shape in checkpoint.tensors.items():
        # Tensors are sent one by one, since those of full fine-tuning are several times the size of the base.
        tensor = torch.empty_like(shape, device=accelerator.device)
        if found[0]:
            tensor.copy_(found[0].tensors[name])
        torch.distributed.broadcast(tensor, 0)
        tensors[name] = tensor.cpu()
    return replace(checkpoint, tensors=tensors), finished


def check_same_settings(settings: RunSettings, checkpoint: Checkpoint) -> None:
    if settings.allow_changed_settings:
        return
    # A setting that the checkpoint does not know yet had its default value.
    then, now = type(settings)().as_json() | checkpoint.state["settings"], settings.as_json()
    free = FREE_SETTINGS - ({"max_steps"} if settings.lr_schedule != "constant" else set())
    changed = [name for name in now if name not in free and then[name] != now[name]]
    if changed:
        listed = ", ".join(f"{name} was {then[name]} and is {now[name]}" for name in changed)
        raise ValueError(f"{checkpoint.path} was trained with other settings: {listed}. {REMEDY}")


def check_same_data(settings: RunSettings, checkpoint: Checkpoint, data: DataIdentity, report) -> None:
    """ValueError if the checkpoint is of other data, unless changes are allowed; an old one does not tell."""
    if settings.allow_changed_settings:
        return
    if "data" not in checkpoint.state:
        report(f"{checkpoint.path} does not say which data it was trained on: it goes on with {data.describe()}")
        return
    try:
        then = DataIdentity(**checkpoint.state["data"])
        described = then.describe()
    except (TypeError, AttributeError, ValueError):
        raise ValueError(f"{checkpoint.path} is no record of a run (data): remove it, or use --fresh") from None
    if then.fingerprint == data.fingerprint:
        return
    if described == data.describe():
        described, now = f"other {described}", "these: names, sizes, contents or captions of images have changed"
    else:
        now = data.describe()
    raise ValueError(f"{checkpoint.path} was trained on other data: on {described}, and not on {now}. {REMEDY}")


def check_same_weights(settings: RunSettings, checkpoint: Checkpoint, base: str, now: str | None) -> None:
    """ValueError if `base`, a hash of its values, or `now`, that of the training adapter, is not that of before."""
    if settings.allow_changed_settings:
        return
    if checkpoint.state.get("base", base) != base:  # a checkpoint of an earlier version does not tell
        named = settings.base or "the miniature"
        raise ValueError(f"{checkpoint.path} was trained on other weights than {named} has now. {REMEDY}")
    if (then := checkpoint.state.get("training_adapter")) != now:
        told = "with another --training-adapter" if then and now else f"{'with' if then else 'without'} one"
        given = settings.training_adapter or "none"
        raise ValueError(f"{checkpoint.path} was trained {told}, and --training-adapter is {given}. {REMEDY}")


def is_finished(settings: RunSettings, checkpoint: Checkpoint | None, clock: Clock) -> bool:
    """Whether the checkpoint is that of the last step and the adapters of that step are written.

    If an adapter is missing or damaged, this is reported, and the run goes on in order to write it again.
    """
    steps = float("inf") if settings.max_steps is None else settings.max_steps
    if checkpoint is None or (checkpoint.step < steps and clock.left > 0):
        return False
    for name in adapter_names(settings, is_measured=checkpoint.state["best"] is not None):
        try:
            if read_adapter(settings.output_dir / name).training["steps"] != checkpoint.step:
                return False
        except FileNotFoundError:
            return False
        except ValueError as error:
            print(f"{error}: it is written anew from {checkpoint.path}")
            return False
    return True


def is_elsewhere(settings: RunSettings, checkpoint: Checkpoint) -> bool:
    """Whether the settings name another source of data than the checkpoint."""
    now = settings.as_json()
    return any(now.get(name) != checkpoint.state["settings"].get(name) for name in ("data_root", "images"))


def adapter_names(settings: RunSettings, is_measured: bool) -> list[str]:
    """The files of a finished run: the adapter, the last average (if evaluations chose another), other averages."""
    stem = Path(WEIGHTS_NAME).stem
    averages = [f"{stem}_ema_{decay}.safetensors" for decay in settings.ema_decay[1:]]
    return [WEIGHTS_NAME, *([f"{stem}_last.safetensors"] if is_measured else []), *averages]
