"""Where a base model comes from: the miniature inside the package, a folder, or the hub."""

import json
import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from onelora_diffusion.files import first_line, printable
from onelora_diffusion.remote import HUB_ID, is_in_reach


def miniature_path() -> Path:
    """The pipeline folder that ships with the package: a small DiT of letters and signs."""
    return Path(__file__).parents[1] / "miniature"


def miniature_text_path() -> Path:
    """The text-to-image pipeline folder that ships with the package: a small PixArt of printed letters and signs."""
    return Path(__file__).parents[1] / "miniature_text"


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

    folder = miniature_path() if base is None else _folder_of(base, DiTPipeline, "facebook/DiT-XL-2-256", named_by)
    try:
        index = json.loads((folder / "model_index.json").read_text())
        return DiTPipeline.from_pretrained(folder, id2label=class_names(index))
    except Exception as error:  # whatever the JSON reader, the safetensors reader or a wrong class raises
        raise ValueError(f"base model '{base or folder}' does not load: {first_line(error)}") from error


def class_names(index: dict) -> dict[int, str] | None:
    """`id2label` of a pipeline's `model_index.json` by number; JSON has texts for keys, of which diffusers warns."""
    names = index.get("id2label")
    return names and {int(label): printable(name) for label, name in names.items()}


def load_text_to_image(
    base: str | Path | None, precision: str, check: Callable[[str], object], named_by: Path | None = None
):
    """Load a pipeline of diffusers for text-to-image.

    Args:
        base: a pipeline folder, a hub id, or None for the miniature inside the package.
        precision: of all: `fp32` or `bf16`; or of the transformer `int8` (torchao) or `nf4` (bitsandbytes), quantised
            as it is read, and bf16 of all else.
        check: called with the class name of the transformer before anything is loaded.
        named_by: as in `load_base`.

    Raises:
        FileNotFoundError, ValueError: as `load_base`.
    """
    from diffusers import DiffusionPipeline, PipelineQuantizationConfig

    example = "black-forest-labs/FLUX.1-dev"
    folder = miniature_text_path() if base is None else _folder_of(base, DiffusionPipeline, example, named_by)
    base = base or folder
    check(transformer_class(_index(folder, base)))
    settings = {"torch_dtype": torch.float32 if precision == "fp32" else torch.bfloat16}
    if precision in ("int8", "nf4"):
        settings["quantization_config"] = PipelineQuantizationConfig(quant_mapping={"transformer": _packed(precision)})
    try:
        with warnings.catch_warnings():
            # Newer releases call it dtype, which older ones do not know.
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            return DiffusionPipeline.from_pretrained(folder, **settings)
    except Exception as error:
        raise ValueError(f"base model '{base}' does not load: {first_line(error)}") from error


def _packed(precision: str):
    """diffusers' settings of a quantisation."""
    if precision == "int8":
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from diffusers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def model_index(base: str | Path | None) -> dict:
    """What a pipeline's `model_index.json` says; None is the miniature.

    Raises:
        FileNotFoundError, ValueError: as `load_base`.
    """
    from diffusers import DiffusionPipeline

    folder = miniature_path() if base is None else _folder_of(base, DiffusionPipeline, "facebook/DiT-XL-2-256")
    return _index(folder, base)


def transformer_class(index: dict) -> str:
    """The class of the transformer that a `model_index.json` names."""
    return printable(str((index.get("transformer") or [None, "NoneType"])[1]), 60)


def _index(folder: Path, base: str | Path | None) -> dict:
    try:
        index = json.loads((folder / "model_index.json").read_text())
        transformer_class(index), class_names(index)
        return index
    except Exception as error:  # no JSON, or of another kind
        raise ValueError(f"base model '{base}' has no readable model_index.json: {first_line(error)}") from error


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


def _folder_of(base: str | Path, pipeline_class: type, example: str, named_by: Path | None = None) -> Path:
    """The folder of a pipeline that is one, or is on the hub, from where it is fetched."""
    folder = Path(base).expanduser()
    if not folder.exists() and HUB_ID.fullmatch(str(base)):
        return _fetch(str(base), pipeline_class, named_by)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"base model '{base}': no such folder; give a diffusers pipeline folder or a hub id like {example}"
        )
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"base model '{folder}': the folder has no model_index.json, so it is no diffusers pipeline"
        )
    return folder


def _fetch(hub_id: str, pipeline_class: type, named_by: Path | None) -> Path:
    """The local folder of a pipeline on the hub, downloaded where it is not in the cache."""
    if named_by is not None and os.environ.get("RANK", "0") == "0":
        print(f"base: {hub_id} (named by {named_by})", flush=True)
    try:
        is_online = is_in_reach(hub_id)
    except FileNotFoundError as error:
        raise ValueError(f"base model '{hub_id}': there is no such folder, and {error}") from error
    try:
        return Path(pipeline_class.download(hub_id, local_files_only=not is_online))
    except Exception as error:  # the hub's client raises its own, httpx's and the system's
        reason = first_line(error) if is_online else "the hub is out of reach, and it is not in the cache"
        raise ValueError(f"base model '{hub_id}': there is no such folder, and {reason}") from error
