"""Which checkpoint a run goes on from, and whether its settings allow it."""

from onelora_diffusion.storage.adapter_file import WEIGHTS_NAME, read_adapter
from onelora_diffusion.training.checkpoints import Checkpoint, load_newest_checkpoint
from onelora_diffusion.training.settings import FREE_SETTINGS, Settings
from onelora_diffusion.training.stopping import parse_duration


def find_checkpoint(settings: Settings, report) -> Checkpoint | None:
    """The newest whole checkpoint of the run, or None at its start.

    ValueError if it was trained with other settings, or if there are only damaged ones.
    """
    if settings.fresh:
        return None
    checkpoint = load_newest_checkpoint(settings.output_dir / "checkpoints", report)
    if checkpoint and not settings.allow_changed_settings:
        check_same_settings(settings, checkpoint)
    return checkpoint


def check_same_settings(settings: Settings, checkpoint: Checkpoint) -> None:
    then, now = checkpoint.state["settings"], settings.as_json()
    free = FREE_SETTINGS - ({"max_steps"} if settings.lr_schedule != "constant" else set())
    changed = [name for name in now if name not in free and then.get(name) != now[name]]
    if changed:
        listed = ", ".join(f"{name} was {then.get(name)} and is {now[name]}" for name in changed)
        raise ValueError(
            f"{checkpoint.path} was trained with other settings: {listed}. Resume all the same with "
            "--allow-changed-settings, start over with --fresh, or choose another --output-dir"
        )


def is_finished(settings: Settings, checkpoint: Checkpoint | None) -> bool:
    """Whether the checkpoint is the last of its run, and the adapter of that step has been written."""
    adapter = settings.output_dir / WEIGHTS_NAME
    if checkpoint is None or not adapter.exists():
        return False
    budget = float("inf") if settings.max_train_time is None else parse_duration(settings.max_train_time)
    steps = float("inf") if settings.max_steps is None else settings.max_steps
    is_last = checkpoint.step >= steps or checkpoint.state["seconds"] >= budget
    return is_last and read_adapter(adapter).training["steps"] == checkpoint.step
