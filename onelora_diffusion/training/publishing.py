"""Upload the adapter of a finished run to the Hugging Face hub, with its metrics and samples."""

import tempfile
from pathlib import Path

from onelora_diffusion.remote import HUB_ID
from onelora_diffusion.storage.adapter_file import read_adapter
from onelora_diffusion.storage.hub import push_to_hub
from onelora_diffusion.training.samples import last_row
from onelora_diffusion.training.settings import RunSettings


def publish(settings: RunSettings) -> str:
    """Upload the adapter in the run's folder to `push_to_hub`, and return the repository's address.

    The model card has the distance of the best evaluation and the newest samples up to the adapter's step, if there
    are any. ValueError if the hub refuses; the run's folder is not changed.
    """
    folder = settings.output_dir
    training = read_adapter(folder).training
    best, dataset = training.get("best") or {}, str(training.get("dataset", ""))
    metrics = {training.get("distance_name", "distance"): best.get("distance"), "recognition": best.get("recognition")}
    with tempfile.TemporaryDirectory() as drawn:
        gallery = []
        grids = folder.glob("samples/step-*.png")
        up_to = f"step-{best.get('step', training['steps']):08}"
        for grid in sorted(path for path in grids if path.stem <= up_to)[-1:]:
            for number, (text, picture) in enumerate(last_row(grid)):
                picture.save(Path(drawn) / f"{number}.png")
                gallery.append((text, Path(drawn) / f"{number}.png"))
        try:
            return push_to_hub(
                folder,
                settings.push_to_hub,
                dataset=dataset.removeprefix("hf:") if dataset.startswith("hf:") else None,
                metrics={name: value for name, value in metrics.items() if value is not None},
                gallery=gallery,
            )
        except ValueError as error:
            raise ValueError(f"{error}; the adapter is in {folder}, and the same command tries again") from error


def check_hub(settings: RunSettings) -> None:
    """ValueError for an upload that is known to fail before the hub is contacted."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    hub_id, base = settings.push_to_hub, settings.base
    try:
        validate_repo_id(hub_id)
    except HFValidationError:
        hub_id = ""
    if not HUB_ID.fullmatch(hub_id):
        raise ValueError(f"--push-to-hub {settings.push_to_hub} is no id of the hub: give one like user/name")
    if base is None or not HUB_ID.fullmatch(base):
        whose = "the miniature" if base is None else base
        raise ValueError(f"--push-to-hub is of use to those who have the base, by its hub id, and {whose} is none")
    if get_token() is None:
        raise ValueError("--push-to-hub needs a token of the hub: run `hf auth login`, or set HF_TOKEN")
