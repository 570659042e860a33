"""Load a base model: the miniature inside the package, a folder, or a model of the hub."""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from onelora_diffusion.denoisers import DENOISERS
from onelora_diffusion.families import FAMILIES, Family
from onelora_diffusion.families.modular import load_modular
from onelora_diffusion.files import first_line, printable
from onelora_diffusion.remote import HUB_ID, is_in_reach

INDICES = ("model_index.json", "modular_model_index.json")  # of a pipeline, and of one of blocks alone


def miniature_path() -> Path:
    """The pipeline folder that ships with the package: a small DiT of letters and signs."""
    return Path(__file__).parents[1] / "miniature"


def miniature_text_path() -> Path:
    """The text-to-image pipeline folder that ships with the package: a small PixArt of printed letters and signs."""
    return Path(__file__).parents[1] / "miniature_text"


def load_base(
    base: str | Path | None = None,
    named_by: Path | None = None,
    *,
    condition: type = int,
    precision: Literal["fp32", "bf16", "int8", "nf4"] = "fp32",
):
    """Load a base model as its pipeline of diffusers.

    Args:
        base: a pipeline folder (with `model_index.json`, or `modular_model_index.json`), a hub id
            (`facebook/DiT-XL-2-256`), or None for the miniature inside the package.
        named_by: the adapter file that names the base; if it causes a download, this is printed first.
        condition: the required kind of condition, checked before anything is loaded: `int` for classes, `str` for
            prompts, or `object` for either.
        precision: `fp32` or `bf16` for all models; or `int8` (torchao) or `nf4` (bitsandbytes) for the denoiser,
            which is quantised while it is loaded, with bf16 for all else.

    FileNotFoundError if `base` is neither a pipeline folder nor shaped like a hub id; ValueError if it is damaged, of
    another kind, not on the hub, or there is no network.
    """
    import diffusers

    folder, index = _read_index(base, named_by, condition)
    class_name = transformer_class(index)
    if class_name == "NoneType":
        raise ValueError(f"base model '{base or folder}' has no {' or '.join(DENOISERS)}, and adapters are in these")
    known = {family.transformer_class: family for family in FAMILIES}
    family = known.get(class_name, Family())  # another is of prompts, and is recorded once it is loaded
    if not issubclass(family.condition, condition):
        draws = "prompts and no classes" if family.condition is str else "classes and no prompts"
        raise ValueError(f"base model '{base or folder}' is a {class_name}, which draws {draws}")
    settings = {"torch_dtype": torch.float32 if precision == "fp32" else torch.bfloat16}
    is_modular = not (folder / "model_index.json").is_file()
    kinds = {*_denoisers(index).values()}  # of which a model that guides is, too
    large = [name for name, part in index.items() if isinstance(part, list) and len(part) > 1 and part[1] in kinds]
    packed = dict.fromkeys(large, _packed(precision)) if precision in ("int8", "nf4") else {}
    if packed and is_modular:
        settings["quantization_config"] = packed
    elif packed:
        settings["quantization_config"] = diffusers.PipelineQuantizationConfig(quant_mapping=packed)
    if "id2label" in index:
        settings["id2label"] = class_names(index)
    try:
        with warnings.catch_warnings(), _drawn_anew(index) as anew:
            # Newer releases name this argument dtype, which older ones do not have.
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            if is_modular:
                pipeline = load_modular(folder, **settings)
            else:
                pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(folder, **settings)
        _check_weights(pipeline, anew)
        return pipeline
    except Exception as error:  # the safetensors reader or a wrong class may raise any error
        reason = first_line(error)
        if not is_modular and (lost := _lost(folder, index)):
            reason = f"its {INDICES[0]} names {', '.join(lost)}, of which it has no folder: copy or download it again"
        raise ValueError(f"base model '{base or folder}' does not load: {reason}") from error


@contextmanager
def _drawn_anew(index: dict) -> Iterator[list]:
    """Context manager that yields (model, names of the weights that its files lack) of each model of transformers.

    Transformers draws these at random, with a warning alone.
    """
    anew = []
    if not any(isinstance(part, list) and part[0] == "transformers" for part in index.values()):
        yield anew
        return
    from transformers import PreTrainedModel

    stock = vars(PreTrainedModel)["from_pretrained"]

    def loaded(cls, *arguments, **settings):
        model, report = stock.__func__(cls, *arguments, **settings, output_loading_info=True)
        anew.append((model, report["missing_keys"]))
        return model

    PreTrainedModel.from_pretrained = classmethod(loaded)
    try:
        yield anew
    finally:
        PreTrainedModel.from_pretrained = stock


def _check_weights(pipeline, anew: list) -> None:
    """ValueError for a weight that the files of a component lack.

    Those of `anew` are random; diffusers leaves its own on the meta device.
    """
    for part, module in pipeline.components.items():
        if not isinstance(module, nn.Module):
            continue
        lacks = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
        random = {name for model, names in anew if model is module for name in names}
        lacks += [name for name, _ in module.named_parameters() if name in random]  # a tied one is here but once
        if lacks:
            raise ValueError(f"the files of its {part} lack {lacks[0]} (of {len(lacks)}): copy or download it again")


def _lost(folder: Path, index: dict) -> list[str]:
    """The components that the index of a pipeline names and its folder lacks, as half a copy does."""
    parts = {name for name, value in index.items() if isinstance(value, list) and any(value) and name[0] != "_"}
    return sorted(name for name in parts if not (folder / name).is_dir())


def class_names(index: dict) -> dict[int, str] | None:
    """`id2label` of a pipeline's `model_index.json` by number; JSON has texts for keys, of which diffusers warns."""
    names = index.get("id2label")
    return names and {int(label): printable(name) for label, name in names.items()}


def _packed(precision: str):
    """diffusers' settings for a quantised precision."""
    if precision == "int8":
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from diffusers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def model_index(base: str | Path | None) -> dict:
    """Read a pipeline's `model_index.json`; None is the miniature. Errors are those of `load_base`."""
    return _read_index(base)[1]


def transformer_class(index: dict) -> str:
    """The class of the transformer or UNet that a `model_index.json` names."""
    return printable(str(next(iter(_denoisers(index).values()), "NoneType")), 60)


def _denoisers(index: dict) -> dict[str, str]:
    """Component -> the name of its class; a component that a pipeline may lack is there without one."""
    return {name: index[name][1] for name in DENOISERS if index.get(name) and index[name][1]}


def _read_index(base: str | Path | None, named_by: Path | None = None, condition: type = int) -> tuple[Path, dict]:
    """(a pipeline's folder, the content of its `model_index.json`); None is the miniature of classes or of prompts."""
    if base is None:
        folder = miniature_text_path() if condition is str else miniature_path()
    else:
        example = "black-forest-labs/FLUX.1-dev" if condition is str else "facebook/DiT-XL-2-256"
        folder = _folder_of(base, example, named_by)
    name = next(name for name in INDICES if (folder / name).is_file())
    try:
        index = json.loads((folder / name).read_text())
        transformer_class(index), class_names(index)
        return folder, index
    except Exception as error:  # the file is no JSON, or has other content
        reason = first_line(error)
        raise ValueError(f"base model '{base or folder}' has no readable {name}: {reason}") from error


@contextmanager
def eval_mode(model: nn.Module):
    """Context manager that puts every submodule into eval mode, and afterwards each back into its own mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _folder_of(base: str | Path, example: str, named_by: Path | None) -> Path:
    """The folder of a pipeline, downloaded from the hub if `base` is a hub id."""
    folder = Path(base).expanduser()
    if not folder.exists() and HUB_ID.fullmatch(str(base)):
        return _fetch(str(base), named_by)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"base model '{base}': no such folder; give a diffusers pipeline folder or a hub id like {example}"
        )
    if not any((folder / name).is_file() for name in INDICES):
        raise FileNotFoundError(f"base model '{folder}' has no model_index.json, so it is no diffusers pipeline")
    return folder


def _fetch(hub_id: str, named_by: Path | None) -> Path:
    """The local folder of a pipeline on the hub, downloaded if it is not in the cache."""
    if named_by is not None and os.environ.get("RANK", "0") == "0":
        print(f"base: {hub_id} (named by {named_by})", flush=True)
    try:
        is_online = is_in_reach(hub_id)
    except FileNotFoundError as error:
        raise ValueError(f"base model '{hub_id}': there is no such folder, and {error}") from error
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        try:
            hf_hub_download(hub_id, INDICES[0], local_files_only=not is_online)
        except EntryNotFoundError:  # or else one of blocks, whose components are fetched where its index says
            return Path(hf_hub_download(hub_id, INDICES[1], local_files_only=not is_online)).parent
        return Path(DiffusionPipeline.download(hub_id, local_files_only=not is_online))
    except Exception as error:  # errors of the hub's client, httpx or the system
        reason = first_line(error) if is_online else "the hub is out of reach, and it is not in the cache"
        raise ValueError(f"base model '{hub_id}': there is no such folder, and {reason}") from error
