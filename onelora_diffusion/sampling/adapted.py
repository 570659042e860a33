"""A base with adapters and the classes or prompts that it draws: loaded for a command line, and drawn from."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from onelora_diffusion.data.caption_texts import MOST_TOKENS, filled_by
from onelora_diffusion.data.digits import CAPTIONED, CAPTIONS
from onelora_diffusion.data.references import edits_of
from onelora_diffusion.data.table import Defaults, defaults_of
from onelora_diffusion.denoisers import choose_denoiser, denoiser_of
from onelora_diffusion.devices import ComputeSettings
from onelora_diffusion.families import Family, choose_references, family_of
from onelora_diffusion.families.classes import by_label, find_class, told_apart
from onelora_diffusion.families.family import Condition
from onelora_diffusion.injection.book import disable_adapter
from onelora_diffusion.injection.verbs import set_adapters
from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.sampling.drawing import adapters_merged, generate_images
from onelora_diffusion.sampling.settings import SamplerSettings
from onelora_diffusion.storage.adapter_file import read_adapter
from onelora_diffusion.storage.attaching import AdapterFile
from onelora_diffusion.storage.reading import load_adapter

PRECISIONS = {"no": "fp32", "bf16": "bf16"}  # in which a base of prompts can be loaded, by --mixed-precision
# The most that an adapter's file may say.
MOST = {"references": 64, "resolution": 16_384, "frames": 10_000, "max_sequence_length": MOST_TOKENS}


@dataclass(frozen=True, kw_only=True)
class AdaptedPipeline:
    """A base with its adapters, and what it draws."""

    pipeline: object  # the base; the adapters in its denoiser are active
    adapters: Mapping[str, AdapterFile] = field(default_factory=dict)  # the content of their files, by their names
    kind: str  # `classes` or `prompts`
    conditions: Sequence[Condition]  # the labels, prompts or edits that are drawn in turns
    names: Sequence[str]  # of these
    # Side of the images in pixels, or height and width; None takes the pipeline's default.
    size: int | tuple[int, int] | None = None
    frames: int = 1  # number of frames of what is drawn
    max_sequence_length: int | None = None  # number of tokens of a prompt; None takes the pipeline's default

    @property
    def family(self) -> Family:
        return family_of(self.pipeline)

    @property
    def denoiser(self) -> nn.Module:
        return denoiser_of(self.pipeline)

    @property
    def resolution(self) -> int | tuple[int, int]:
        return self.size or self.family.resolution(self.pipeline)

    @property
    def dataset(self) -> str | None:
        """The data set on which all adapters were trained, if their files say one."""
        named = {file.training.get("dataset") for file in self.adapters.values()}
        return named.pop() if len(named) == 1 else None

    @property
    def defaults(self) -> Defaults:
        return defaults_of(self.dataset, self.kind)

    def default_guidance(self, own: float | None) -> float:
        """The default strength of the guidance: 1 if it is trained into all adapters, or `own`, or the family's."""
        if self.adapters and all("trained_guidance" in file.training for file in self.adapters.values()):
            return 1.0
        return self.family.guidance_scale(self.pipeline) if own is None else own

    @property
    def num_base_classes(self) -> int | None:
        """The number of classes of the base; None for prompts."""
        return self.denoiser.config.num_embeds_ada_norm if self.kind == "classes" else None

    def place(self, settings: ComputeSettings, device: torch.device) -> None:
        """Move all models to a device, the denoiser and the autoencoder in the precision of the settings."""
        settings.place(self.pipeline.to(device), device)

    def draw(
        self,
        conditions: Sequence[Condition],
        seed: int,
        indices: Sequence[int],
        settings: SamplerSettings,
        *,
        of_base: bool = False,
        **options,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Generate images of conditions, one for each index, with the active adapters; see `generate_images`.

        With `of_base` the base draws alone, from the same noise: the same prompts, or classes of its own.
        """
        family, denoiser = self.family, self.denoiser
        if of_base:  # it draws without an adapter, to which domain guidance would lead
            settings = replace(settings, guidance=SamplerSettings.guidance)
            conditions = [family.of_base(self.pipeline, condition) for condition in conditions]
            serving = disable_adapter(denoiser) if self.adapters else nullcontext()
        else:
            serving = adapters_merged(self.pipeline, settings)
        sizes = {"size": self.size, "frames": self.frames, "max_sequence_length": self.max_sequence_length}
        with serving:
            yield from generate_images(self.pipeline, conditions, seed, indices, settings, **sizes, **options)

    def choose(self, adapter_name: str) -> None:
        if len(self.adapters) > 1:
            set_adapters(self.denoiser, in_model(adapter_name))


def load_adapted(
    base: str | None,
    files: Mapping[str, Path],
    *,
    classes: Sequence[str] = (),
    prompts: Sequence[str] = (),
    references: Sequence[Path] = (),
    resolution: int | tuple[int, int] | None = None,
    mixed_precision: str = "no",
    frames: int | None = 1,
) -> AdaptedPipeline:
    """Load a base with adapters, and find what they draw.

    Args:
        base: a folder or hub id; None takes the one that the adapters name.
        files: the file or folder of each adapter, by the name that it gets.
        classes: names or numbers of the classes to draw; () takes all, of a base that draws classes.
        prompts: prompts to draw, with the adapters' trigger word in place of `{trigger}`; () takes the captions of the
            embedded job, for its adapters.
        references: reference images that the prompts edit: those of all prompts, or of each in turn.
        resolution: side of the images of prompts, or height and width; None takes that of training.
        frames: number of frames of what is drawn of prompts; None takes that of training.

    FileNotFoundError or ValueError if a file is missing or damaged, an adapter does not fit the base, or the base does
    not draw such classes or prompts.
    """
    adapters = {name: read_adapter(path) for name, path in files.items()}
    bases = {file.base or "miniature": name for name, file in adapters.items()}
    if base is None and len(bases) > 1:
        made = " and ".join(f"'{name}' for {named}" for named, name in bases.items())
        raise ValueError(f"adapters of several bases, {made}: measure them one after the other, or give one --base")
    of_prompts = {name for name, file in adapters.items() if "family" in file.training}
    if (prompts or of_prompts) and (of_classes := [name for name in files if name not in of_prompts]):
        raise ValueError(f"the adapter in {files[of_classes[0]]} draws classes, not --prompts: give --classes")
    named_by = None if base else next(iter(files.values()), None)
    base = base or next((file.base for file in adapters.values()), None)
    if prompts or of_prompts:
        asked = prompts, classes, references, resolution, mixed_precision, frames
        loaded = _load_prompts(base, named_by, adapters, files, *asked)
    elif references:
        raise ValueError("--reference is for prompts, and classes are drawn here")
    else:
        loaded = _load_classes(base, named_by, adapters, classes)
    for name, path in files.items():
        load_adapter(loaded.denoiser, path, in_model(name))
    return loaded


def in_model(name: str) -> str:
    """The name in the denoiser of an adapter whose folder or file has this name, where a dot has no place."""
    return name.replace(".", "_")


def _load_classes(base, named_by, adapters: Mapping[str, AdapterFile], chosen: Sequence[str]) -> AdaptedPipeline:
    pipeline = load_base(base, named_by)
    file, *others = adapters.values() or [None]
    for other in others:
        if (other.config.num_classes, other.id2label) != (file.config.num_classes, file.id2label):
            raise ValueError(f"{' and '.join(adapters)} draw different classes: measure them one after the other")
    if file is None or file.config.num_classes is None:  # the classes are those of the base
        owner, num_classes = "the base", denoiser_of(pipeline).config.num_embeds_ada_norm
        classes = by_label(pipeline.labels) or told_apart({}, num_classes)
    else:
        owner, classes = "the adapter", told_apart(file.id2label, file.config.num_classes)
    labels = [find_class(name, classes, owner) for name in chosen] or sorted(classes)
    names = [classes[label] for label in labels]
    return AdaptedPipeline(pipeline=pipeline, adapters=adapters, kind="classes", conditions=labels, names=names)


def _load_prompts(
    base, named_by, adapters, files, prompts, classes, references, resolution, mixed_precision, frames
) -> AdaptedPipeline:
    facts, where = [file.training for file in adapters.values()], " and ".join(map(str, files.values()))
    if facts and all(training.get("dataset") == CAPTIONED for training in facts):
        prompts = prompts or CAPTIONS
    if not prompts or classes:
        raise ValueError(f"the adapter in {where} draws prompts: give --prompts, and no --classes")
    if mixed_precision not in PRECISIONS:
        raise ValueError(f"--mixed-precision {mixed_precision} is for classes: choose bf16 or no")
    prompts = filled_by(prompts, [training.get("trigger") for training in facts])
    each, side, trained, length = (_largest(facts, name) for name in MOST)
    if each and not references:
        raise ValueError(f"the adapter in {where} edits {each} reference images of a prompt: give --reference")
    pipeline = load_base(base, named_by, condition=str, precision=PRECISIONS[mixed_precision])
    choose_references(pipeline, (each or 1) if references else 0)
    if len(denoisers := {training.get("denoiser") for training in facts}) > 1:
        raise ValueError(f"{' and '.join(adapters)} are of different denoisers: measure them one after the other")
    choose_denoiser(pipeline, *denoisers or [None])
    family = family_of(pipeline)
    size = resolution or side or family.resolution(pipeline)
    family.check_resolution(pipeline, *(size if isinstance(size, tuple) else [size]))
    frames = frames or trained or 1
    family.check_frames(frames)
    if frames != (trained or 1):
        family.try_frames(frames)
    if frames > 1:
        rates = [rate for training in facts if isinstance(rate := training.get("frame_rate"), int | float)]
        family.frame_rate = max(rates, default=family.frame_rate)
    conditions = edits_of(prompts, references, each or 1, size, "--reference", frames) if references else prompts
    drawn = {"conditions": conditions, "names": prompts, "size": size, "frames": frames}
    drawn["max_sequence_length"] = length
    return AdaptedPipeline(pipeline=pipeline, adapters=adapters, kind="prompts", **drawn)


def _largest(facts: Sequence[Mapping], name: str) -> int | None:
    """The largest number under this name in the training summaries of adapters, if there is any.

    ValueError for one that no run has, since the files may be anybody's.
    """
    numbers = [value for training in facts if isinstance(value := training.get(name), int)]
    if wrong := [number for number in numbers if not 1 <= number <= MOST[name]]:
        raise ValueError(f"an adapter's file gives {name} as {wrong[0]}: 1 to {MOST[name]:,} are taken")
    return max(numbers, default=None)
