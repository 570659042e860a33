"""Find the file of an adapter on disk or on the Hugging Face hub."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onelora_diffusion.files import first_line
from onelora_diffusion.remote import HUB_ID, is_in_reach
from onelora_diffusion.storage.adapter_file import WEIGHTS_NAME
from onelora_diffusion.storage.lora import DIFFUSERS_LORA, PEFT_CONFIG, PEFT_LORA

KNOWN_NAMES = (WEIGHTS_NAME, DIFFUSERS_LORA, PEFT_LORA)

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


@dataclass(frozen=True)
class FileLocation:
    """Where a file is in a folder or hub repository, under the names of diffusers' keyword arguments."""

    weight_name: str | None = None  # of the file
    subfolder: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike | None = None
    force_download: bool = False
    local_files_only: bool | None = None
    use_safetensors: bool | None = None  # True or None, since pickles are never read
    proxies: dict[str, str] | None = None  # must be None: the hub's client reads them from the environment

    def __post_init__(self):
        for name in ("weight_name", "subfolder"):
            value = getattr(self, name)
            if value and (Path(value).is_absolute() or ".." in Path(value).parts):
                raise ValueError(f"{name} '{value}' leads out of the folder or repository: give a path inside it")
        if self.use_safetensors not in (True, None):
            raise ValueError("use_safetensors=False asks for a pickle, which could run any code: leave it out")
        if self.proxies is not None:
            raise ValueError("proxies: the hub's client reads HTTP_PROXY and HTTPS_PROXY of the environment instead")


def find_weights(source: str | os.PathLike, location: FileLocation = FileLocation()) -> Path:
    """Find the file of an adapter: `source` itself, or the file in that folder or hub repository.

    FileNotFoundError if there is none; ValueError if the folder holds several, or the file is a pickle.
    """
    local = Path(source).expanduser()
    folder = local / location.subfolder if location.subfolder else local
    if local.is_file():
        if location.weight_name not in (None, local.name):
            raise ValueError(f"'{source}' is a file, and weight_name '{location.weight_name}' is another in a folder")
        return _no_pickle(local)
    if folder.is_dir():
        return _file_in(folder, location.weight_name)
    if not HUB_ID.fullmatch(str(source)) or local.is_dir():
        raise FileNotFoundError(f"no adapter at '{folder}': there is no such file or folder, and it is no hub id")
    names = [location.weight_name] if location.weight_name else KNOWN_NAMES
    _no_pickle(Path(names[0]))
    return _download(str(source), names, location)


def _no_pickle(path: Path) -> Path:
    if path.suffix in PICKLES:
        raise ValueError(f"'{path}' is a pickle, which could run any code; only .safetensors files are read")
    return path


def _file_in(folder: Path, weight_name: str | None) -> Path:
    if weight_name is not None:
        if not (folder / weight_name).is_file():
            raise FileNotFoundError(f"no file '{weight_name}' in '{folder}'; there is {_listed(folder)}")
        return _no_pickle(folder / weight_name)
    for name in KNOWN_NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        raise ValueError(f"'{folder}' holds {', '.join(path.name for path in found)}: give the weight_name to load")
    if not found:
        raise FileNotFoundError(f"no adapter in '{folder}': it holds {_listed(folder)}")
    return found[0]


def _listed(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"


def _download(repo_id: str, names: Sequence[str], location: FileLocation) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        is_online = not location.local_files_only and is_in_reach(repo_id, location.token)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no adapter: there is no folder '{repo_id}', and {error}") from error
    names_of_hub = ("subfolder", "revision", "token", "cache_dir", "force_download")
    settings = {name: getattr(location, name) for name in names_of_hub} | {"local_files_only": not is_online}
    failure = None
    for name in names:
        try:
            path = Path(hf_hub_download(repo_id, name, **settings))
        except LocalEntryNotFoundError as error:  # the file is not in the cache, and the hub cannot be reached
            failure = f"'{repo_id}' is not in the cache, and the hub cannot be reached or is not to be used", error
        except EntryNotFoundError as error:
            failure = f"'{repo_id}' has no {' or '.join(names)}; give the weight_name", error
        except (HfHubHTTPError, OSError, ValueError) as error:
            failure = f"'{repo_id}' cannot be had from the hub: {first_line(error)}", error
            break
        else:
            if name == PEFT_LORA:  # PEFT keeps the settings in a file of their own
                with contextlib.suppress(EntryNotFoundError, LocalEntryNotFoundError):
                    hf_hub_download(repo_id, PEFT_CONFIG, **settings)
            return path
    message, error = failure
    raise FileNotFoundError(f"no adapter: {message}") from error
