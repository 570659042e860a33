"""Upload an adapter to the Hugging Face hub: its file, a model card and pictures."""

import re
from collections.abc import Sequence
from pathlib import Path

from onelora_diffusion.files import first_line
from onelora_diffusion.remote import HUB_ID
from onelora_diffusion.storage.adapter_file import WEIGHTS_NAME, file_of, read_adapter
from onelora_diffusion.storage.attaching import AdapterFile

CARD = """---
{yaml}
---

# {title}

A 1LoRA adapter (Quercia et al., "1LoRA: Summation Compression for Very Low-Rank Adaptation") of {base}:
method `{method}`, {num_weights:,} trained weights.

{pictures}## Use

```python
{use}
```

{sections}"""

USE_CLASSES = """from onelora_diffusion import OneLoRADiTPipeline

pipe = OneLoRADiTPipeline.from_pretrained("{base}")
pipe.load_lora_weights("{repo_id}")
image = pipe(class_labels=[{example!r}], guidance_scale=4.0).images[0]"""

USE_PROMPTS = """from diffusers import DiffusionPipeline
from onelora_diffusion import OneLoRALoaderMixin

pipe = OneLoRALoaderMixin.from_pipe(DiffusionPipeline.from_pretrained("{base}"))
pipe.load_lora_weights("{repo_id}")
image = pipe({example!r}).images[0]"""


def push_to_hub(
    path: str | Path,
    repo_id: str,
    *,
    base: str | None = None,
    dataset: str | None = None,
    metrics: dict[str, float] | None = None,
    sample_grid: str | Path | None = None,
    gallery: Sequence[tuple[str, str | Path]] = (),
    license: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload 1LoRA adapter",
) -> str:
    """Upload an adapter with its model card, and return the address of the repository.

    Args:
        path: the adapter file, or its folder.
        repo_id: `user/name`; the repository is created if it does not exist.
        base: hub id of the base model; None takes the one in the adapter's file.
        dataset: hub id or name of the training data.
        metrics: measured values by name; if `dataset` is given, the hub shows them as evaluation results.
        sample_grid: path of a PNG.
        gallery: (class name or prompt, path of a PNG) of each picture that the hub shows first.
        license: the adapter's licence as the hub writes it (`cc-by-nc-4.0`); the base's licence applies too.

    Raises:
        FileNotFoundError, ValueError: a file is missing, the adapter is damaged, or the hub refuses. Files are
            checked before the hub is contacted.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    file, weights = read_adapter(path), file_of(path)
    pictures = {f"images/{number}.png": Path(picture) for number, (_, picture) in enumerate(gallery)}
    if sample_grid is not None:
        pictures["sample.png"] = Path(sample_grid)
    for name, picture in pictures.items():
        if not picture.is_file():
            raise FileNotFoundError(f"no {'sample grid' if name == 'sample.png' else 'picture'} at '{picture}'")
    shown = [(text, name) for (text, _), name in zip(gallery, pictures, strict=False)]
    sample = "![samples](sample.png)\n\n" if sample_grid else ""
    card = model_card(file, repo_id, base or file.base, dataset, metrics or {}, sample, shown, license)
    contents = {WEIGHTS_NAME: weights, "README.md": card.encode(), **pictures}
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        files = [CommitOperationAdd(name, content) for name, content in contents.items()]
        api.create_commit(repo_id, files, commit_message=commit_message)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"'{repo_id}' cannot be pushed to: {first_line(error)}") from error
    return str(url)


def model_card(
    file: AdapterFile,
    repo_id: str,
    base: str | None,
    dataset: str | None,
    metrics: dict[str, float],
    sample: str,
    gallery: list[tuple[str, str]],
    license: str | None,
) -> str:
    """The text of a model card: the hub's header, pictures, a snippet, metrics, classes and settings."""
    from huggingface_hub import EvalResult, ModelCardData

    if base is None:
        raise ValueError("the adapter's file names no base model: give its hub id as base")
    title, family = repo_id.split("/")[-1], file.training.get("family")
    task = "text-to-image" if family else "unconditional-image-generation"
    trigger = file.training.get("trigger")
    prompt = file.training.get("prompt") or (gallery[0][0] if gallery else trigger or "what is to be drawn")
    use = USE_PROMPTS if family else USE_CLASSES
    measured_on = dataset or file.training.get("dataset")
    kinds = {name: re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") for name in metrics if measured_on}
    results = [
        EvalResult(task, measured_on, measured_on, metric_type=kind, metric_name=name, metric_value=metrics[name])
        for name, kind in kinds.items()
    ]
    is_on_hub = HUB_ID.fullmatch(base) is not None
    header = ModelCardData(
        base_model=base if is_on_hub else None,
        base_model_relation="adapter" if is_on_hub else None,
        datasets=[dataset] if dataset else None,
        eval_results=results or None,
        model_name=title if results else None,
        instance_prompt=trigger or file.training.get("prompt") if family else None,
        library_name="diffusers",
        license=license,
        metrics=sorted(metrics) or None,
        pipeline_tag=task,
        tags=["lora", "onelora", "1lora", family or "dit", task if family else "class-conditional"],
        widget=[{"text": text, "output": {"url": path}} for text, path in gallery] or None,
    )
    sections = {
        "Results": _table(("metric", "value"), metrics),
        "Classes": ", ".join(file.id2label[label] for label in sorted(file.id2label)),
        "Training": _table(("setting", "value"), ({"dataset": dataset} if dataset else {}) | file.training),
    }
    return CARD.format(
        yaml=header.to_yaml(),
        title=title,
        method=file.config.method,
        base=base,
        num_weights=sum(tensor.numel() for tensor in file.tensors.values()),
        pictures=("<Gallery />\n\n" if gallery else "") + sample,
        use=use.format(base=base, repo_id=repo_id, example=prompt if family else file.id2label.get(0, 0)),
        sections="\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text) + "\n",
    )


def _table(columns: tuple[str, str], rows: dict) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"| {columns[0]} | {columns[1]} |", "|---|---|", *lines]) if rows else ""
