"""The command line of eval_fid.py: `gen`, `sweep`, `calc` and `ref`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from torch.utils.data import Dataset

from onelora_diffusion.command_line import typed_as, with_switches
from onelora_diffusion.data import load_dataset
from onelora_diffusion.data.table import Defaults
from onelora_diffusion.devices import ComputeSettings
from onelora_diffusion.evaluation.features import FEATURES
from onelora_diffusion.evaluation.labels import LabelOrder
from onelora_diffusion.evaluation.metrics import REAL, REFERENCE, MetricSettings, needed
from onelora_diffusion.launch import precision_asked_by_launcher
from onelora_diffusion.sampling import SamplerSettings
from onelora_diffusion.sampling.adapted import AdaptedPipeline, in_model
from onelora_diffusion.storage.adapter_file import WEIGHTS_NAME, file_of


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    features: Annotated[tuple[str, ...], tyro.conf.arg(metavar=f"[{{{','.join(FEATURES)}}} [...]]")] = ()
    """Features by which images are compared; only inception gives FID. Default: those of the reference if it is
    statistics, those of the published --metrics; else pixels for digits, dino for prompts, inception for others."""
    inception_weights: Path | None = None
    """torch-fidelity's weights-inception-2015-12-05-6726825d.pth. Default: torch's cache, or a download."""
    dinov2_weights: Path | None = None
    """Folder with config.json and model.safetensors. Default: facebook/dinov2-large, from the hub or its cache, which
    alone gives FD-DINOv2."""
    dino_weights: Path | None = None
    """The same for DINO. Default: facebook/dino-vits16, which alone gives DINO-I."""
    clip_weights: Path | None = None
    """The same for CLIP, with its tokenizer. Default: openai/clip-vit-base-patch32, which alone gives CLIP-I and
    CLIP-T."""
    clip_large_weights: Path | None = None
    """The same for CMMD's network. Default: openai/clip-vit-large-patch14-336, which alone gives CMMD."""
    fashion_weights: Path | None = None
    """The file of the Fashion-MNIST classifier."""
    batch_size: int = 64
    """Images measured at a time in each process; no generated image depends on it."""


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    dataset: str | None = None
    """Data set of real images, named as for training. Default: that on which the adapter was trained, or digits."""
    data_root: Path | None = None
    """Folder of the data set."""
    split: str = "train"
    """Split of the data set: train or test."""
    image_column: str | None = None
    """Column of images, for hf:NAME. Default: its only one."""
    label_column: str | None = None
    """Column of labels (classes, texts or integers), for hf:NAME. Default: its only column of class labels."""

    def load(self, dataset: str, resolution: int, classes: tuple[int, ...] | None = None) -> Dataset:
        columns = {"image_column": self.image_column, "label_column": self.label_column}
        return load_dataset(dataset, self.data_root, self.split, resolution, classes=classes, **columns)


@dataclass(frozen=True, kw_only=True)
class Generate(SamplerSettings, ComputeSettings, FeatureSettings, MetricSettings, DatasetSettings):
    """Generate images from adapters and their base, and measure them against real ones and their prompts."""

    adapter: tuple[Path, ...] | None = (Path("runs/digits"),)
    """Adapter files, or folders of training runs, of one base; None measures the base alone."""
    base: str | None = None
    """Base model: a folder or a hub id. Default: the one the adapter was trained on."""
    compare_base: bool | None = None
    """--compare-base, --no-compare-base: also measure the base without an adapter, from the same noise. Default: for
    digits and prompts only."""
    prompts: Path | None = None
    """Prompts for text-to-image adapters: a text file of one a line, or a .csv or .jsonl with a column prompt and, if
    wanted, image (reference images: a file or folder) and group. Default: the captions of the embedded job."""
    unrelated_prompts: Path | None = None
    """Prompts that have nothing to do with the training, in such a file: drift is how far their images have moved.
    Default: letters, for the embedded job."""
    reference: tuple[Path, ...] = ()
    """Statistics that `ref` or ADM's tools wrote, a file for each of --features; or images, for prompts of any kind
    and size. Default: the images of --prompts, or those of the data set."""
    resolution: int | None = None
    """Side in pixels of the images of prompts. Default: that of training."""
    num_images: int | None = None
    """Images to generate. Default: 500 for digits, four for each prompt, else 10,000."""
    labels: LabelOrder = "turns"
    """Classes or prompts of the images: one after the other (turns); drawn at random with equal probability (random,
    as in DiT's and SiT's scripts); or with their frequencies in --split of --dataset (dataset)."""
    num_inference_steps: int | None = None
    """Steps of the sampler. Default: 25 for digits, 28 for prompts, else 50."""
    guidance_scale: float | None = None
    """Strength of the guidance; 1 is none. Pictures like more of it (4) than distances do. Default: 1 if guidance
    is trained into the adapters, 2 for digits, the pipeline's own for prompts, else 1.5."""
    seed: int = 0
    """Seed of all noise."""
    images_at_once: int | None = None
    """Number of images in each batch of the networks; the last batch is padded. So each image is the same, bit for
    bit, whatever the other images of its batch and the number of processes. Default: 16, or 1 for prompts."""
    output: Path | None = None
    """JSON file; sheets of pictures are beside it, as .png. Default: evaluation.json beside the first adapter, or
    here."""

    report_name: ClassVar[str] = "evaluation.json"

    @property
    def adapter_files(self) -> dict[str, Path]:
        """The adapters' files by their names; ValueError if two have one name."""
        files: dict[str, Path] = {}
        base = {"base": "the base"} if len(self.adapter or ()) > 1 else {}
        for path in self.adapter or ():
            file = file_of(path)
            name = (file.parent if file.name == WEIGHTS_NAME else file.with_suffix("")).resolve().name
            others = base | {in_model(other): file for other, file in files.items()}
            if other := others.get(in_model(name)):
                raise ValueError(f"--adapter {path} has the name '{name}', as has {other}: rename its folder or file")
            files[name] = file
        return files

    @property
    def report_path(self) -> Path:
        folder = next((file.parent for file in self.adapter_files.values()), Path())
        return self.output or folder / self.report_name

    def with_defaults(self, own: Defaults, drawn: AdaptedPipeline, has_real: bool, drifts: bool) -> "Generate":
        """The same with the defaults of what is drawn where no values are given; ValueError for nothing to measure.

        `has_real`, `drifts`: whether there are real images, and unrelated prompts.
        """
        values = {
            "num_images": own.eval_images or 4 * len(drawn.conditions),
            "num_inference_steps": own.eval_steps,
            "guidance_scale": drawn.default_guidance(own.eval_guidance_scale),
            "compare_base": own.compares_base,
            "images_at_once": own.images_at_once or drawn.family.images_at_once,
        }
        given = replace(self, **{name: value for name, value in values.items() if getattr(self, name) is None})
        default = replace(self, metrics=("fd",) * own.has_distance + own.metrics * (not self.metrics))
        rows = zip(default.metrics, default.asked, strict=True)
        always = [name for name, (row, _) in rows if has_real or not {REAL, REFERENCE} & needed([row])]
        metrics = tuple(dict.fromkeys([*always, *self.metrics, *["drift"] * drifts]))
        if not metrics:
            raise ValueError(
                "nothing to measure without real images: give --reference, an image column in --prompts, "
                "--unrelated-prompts or --metrics clip-t"
            )
        given = replace(given, metrics=metrics)
        return given.for_scheduler(drawn.pipeline.scheduler.config) if drawn.family.takes_samplers else given


@dataclass(frozen=True, kw_only=True)
class Sweep(Generate):
    """Generate at several strengths of the guidance, from the same noise, and find the best of each metric."""

    guidance_scales: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
    """The strengths of guidance to compare."""
    guidance_scale: tyro.conf.Suppress[float | None] = None
    compare_base: tyro.conf.Suppress[bool | None] = False
    output: Path | None = None
    """JSON file; the plot is beside it, as .png. Default: sweep.json beside the adapter, or here."""

    report_name: ClassVar[str] = "sweep.json"


@dataclass(frozen=True, kw_only=True)
class Calculate(FeatureSettings, MetricSettings, DatasetSettings):
    """Measure images on disk: a folder of PNG files, an .npz (arr_0, uint8 NHWC), or statistics (.safetensors, or an
    .npz with mu and sigma)."""

    images: Path
    """The images to measure."""
    reference: tuple[Path, ...] = ()
    """Images or statistics to compare with; one file of statistics for each of --features. Default: --dataset."""
    output: Path | None = None
    """JSON file. Default: the table only."""


@dataclass(frozen=True, kw_only=True)
class Reference(FeatureSettings, DatasetSettings):
    """Write the statistics of real images to a file, for --reference."""

    output: tuple[Path, ...]
    """The file, *.safetensors, or *.npz in the layout of ADM's evaluator; one for each of --features."""
    keep_features: bool = False
    """Keep the features one by one in the file, for kid, precision-recall and density-coverage."""
    images: Path | None = None
    """A folder of PNG files or an .npz. Default: the data set, with the crop that training uses."""
    resolution: int | None = None
    """Side in pixels to which images of a data set are cropped and resized. Default: 16 for digits, 256 for others."""


def commands(**asked) -> type:
    """The settings of `gen`, `sweep`, `calc` or `ref`, with what is asked for as defaults of those that generate."""
    return (
        Annotated[Generate, tyro.conf.subcommand("gen", default=Generate(**asked))]
        | Annotated[Sweep, tyro.conf.subcommand("sweep", default=Sweep(**asked))]
        | Annotated[Calculate, tyro.conf.subcommand("calc")]
        | Annotated[Reference, tyro.conf.subcommand("ref")]
    )


Command = commands()


def parse(arguments: list[str], description: str | None) -> Generate | Sweep | Calculate | Reference:
    """`ref`, `calc`, `sweep` or `gen`; `gen` where none is named."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["gen", *arguments]
    return tyro.cli(
        commands(**precision_asked_by_launcher()),
        args=with_switches(arguments, Generate),
        description=description,
        prog=typed_as("eval_fid.py"),
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
