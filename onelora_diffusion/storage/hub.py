"""Share an adapter: its file, a model card and a sample grid in a repository of the Hugging Face hub."""

import shutil
import tempfile
from pathlib import Path

from onelora_diffusion.injection.attaching import AdapterFile
from onelora_diffusion.remote import HUB_ID
from onelora_diffusion.storage.adapter_file import WEIGHTS_NAME, read_adapter

CARD = """---
{yaml}
---

# {title}

A 1LoRA adapter (Quercia et al., "1LoRA: Summation Compression for Very Low-Rank Adaptation") of {base}:
method `{method}`, {num_weights:,} trained weights.

{sample}## Use

```python
from onelora_diffusion import OneLoRADiTPipeline

pipe = OneLoRADiTPipeline.from_pretrained("{base}")
pipe.load_lora_weights("{repo_id}")
image = pipe(class_labels=[{example!r}], guidance_scale=4.0).images[0]
```

{sections}"""


def push_to_hub(
    path: str | Path,
    repo_id: str,
    *,
    base: str | None = None,
    dataset: str | None = None,
    metrics: dict[str, float] | None = None,
    sample_grid: str | Path | None = None,
    license: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload 1LoRA adapter",
) -> str:
    """Upload an adapter with its model card, and return the address of the repository.

    Args:
        path: the adapter file, or its folder.
        repo_id: `user/name`; made if there is none.
        base: hub id of the base model; None: what the adapter's file says.
        dataset: hub id or name of what it was trained on.
        metrics: figures for the card, by name.
        sample_grid: a PNG.
        license: of the adapter, as the hub writes it (`cc-by-nc-4.0`); that of the base binds it too.

    Raises:
        FileNotFoundError, ValueError: no such file, a damaged adapter, or the hub refuses. Files are checked
            before the hub is asked for anything.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    file = read_adapter(path)
    path = Path(path)
    weights = path if path.suffix == ".safetensors" else path / WEIGHTS_NAME
    if sample_grid is not None and not Path(sample_grid).is_file():
        raise FileNotFoundError(f"no sample grid at '{sample_grid}'")
    card = model_card(
        file,
        repo_id,
        base=base,
        dataset=dataset,
        metrics=metrics,
        sample="sample.png" if sample_grid else None,
        license=license,
    )
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(weights, Path(folder) / WEIGHTS_NAME)
        (Path(folder) / "README.md").write_text(card, encoding="utf-8")
        if sample_grid is not None:
            shutil.copyfile(sample_grid, Path(folder) / "sample.png")
        api = HfApi(token=token)
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ValueError(f"'{repo_id}' cannot be pushed to: {str(error).strip().splitlines()[0]}") from error
    return str(url)


def model_card(
    file: AdapterFile,
    repo_id: str,
    *,
    base: str | None = None,
    dataset: str | None = None,
    metrics: dict[str, float] | None = None,
    sample: str | None = None,
    license: str | None = None,
) -> str:
    """The text of a model card: the hub's header, a sample grid, a snippet, metrics, classes and settings.

    Raises:
        ValueError: neither `base` nor the file names the base model.
    """
    from huggingface_hub import ModelCardData

    base = base or file.base
    if base is None:
        raise ValueError("the adapter's file names no base model: give its hub id as base")
    header = ModelCardData(
        base_model=base if HUB_ID.fullmatch(base) else None,
        datasets=[dataset] if dataset else None,
        library_name="diffusers",
        license=license,
        metrics=sorted(metrics) if metrics else None,
        pipeline_tag="unconditional-image-generation",
        tags=["onelora", "1lora", "dit", "class-conditional"],
    )
    sections = {
        "Results": _table(("metric", "value"), metrics or {}),
        "Classes": ", ".join(file.id2label[label] for label in sorted(file.id2label)),
        "Training": _table(("setting", "value"), ({"dataset": dataset} if dataset else {}) | file.training),
    }
    return CARD.format(
        yaml=header.to_yaml(),
        title=repo_id.split("/")[-1],
        method=file.config.method,
        base=base,
        num_weights=sum(tensor.numel() for tensor in file.tensors.values()),
        sample=f"![samples]({sample})\n\n" if sample else "",
        repo_id=repo_id,
        example=file.id2label.get(0, 0),
        sections="\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text) + "\n",
    )


def _table(columns: tuple[str, str], rows: dict) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"| {columns[0]} | {columns[1]} |", "|---|---|", *lines]) if rows else ""
