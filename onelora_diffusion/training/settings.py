"""The settings of a training run: flags, recipe files, and what is wrong with them before anything is loaded."""

import argparse
import dataclasses
import difflib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

import tyro
import yaml

from onelora_diffusion.command_line import check_flags, check_installed, command, typed_as, with_switches
from onelora_diffusion.config import PARTS, AdapterConfig
from onelora_diffusion.data.table import EMBEDDED, check_columns, defaults_of, kind_of
from onelora_diffusion.files import keys_once
from onelora_diffusion.launch import asked_by_launcher
from onelora_diffusion.training.optimizers import learning_rate_factor
from onelora_diffusion.training.randomness import TimestepDensity
from onelora_diffusion.training.stopping import parse_duration
from onelora_diffusion.training.weighting import Weighting


@dataclass
class RunSettings:
    """The settings of every training run."""

    script: ClassVar[str]
    class_learning_rate: ClassVar[float | None] = None  # of the class table, if the base has one
    eval_every: ClassVar[int] = 0  # updates between evaluations; 0 for none
    max_sequence_length: ClassVar[int | None] = None  # tokens of a prompt, for bases with prompts
    training_adapter: ClassVar[str | None] = None  # a frozen adapter that serves in training, for bases with prompts
    prior_weight: ClassVar[float] = 0.0  # of prior preservation, for bases with prompts
    trained_guidance: ClassVar[float] = 1.0  # strength of guidance that is trained in, for bases with classes
    guidance_start: ClassVar[int] = 0  # number of updates before it begins
    guidance_cutoff: ClassVar[float] = 1.0  # share of the timesteps below which it is used
    latent_cache_gb: ClassVar[float] = float("inf")  # larger latents are encoded again in each step
    export_lora: ClassVar[tuple | None] = None  # the namings of the LoRAs that are written at the end
    sample_rows: ClassVar[int] = 1  # rows in a grid of samples
    shows_base: ClassVar[bool] = True  # whether the first row is drawn by the base from the same noise

    config: Path | None = None
    """A recipe, *.yaml, that sets the defaults of all other flags."""
    output_dir: Path = Path("runs/run")
    """Where the adapter, checkpoints, metrics and samples go."""
    subjects: Path | None = None
    """Train an adapter for each of many subjects, in the same batches: a folder with a folder of images for each, or
    a table, *.yaml, that names them with their settings. Each adapter is that of a run of its own into a folder of
    --output-dir; --batch-size and --max-steps are those of each, --max-train-time is that of all together."""
    subjects_at_once: int = 16
    """The most subjects in a batch; others begin as these end."""
    flip: bool = False
    """Mirror half of the images."""
    broken_images: Literal["fatal", "skip"] = "fatal"
    """fatal: an unreadable image ends the run; skip: it is named, counted and replaced by the next one."""
    method: str = "1lora"
    """1lora, bitfit, difffit, mora1, mora6, lora, dora, vera, full, or peft:TUNER for any other tuner of PEFT."""
    rank: int = 1
    """Rank, for methods that have one."""
    peft_config: str | None = None
    """JSON of PEFT's own settings for lora, dora, vera or peft:TUNER: '{"n_frequency": 500}'."""
    targets: tuple[str, ...] | None = None
    """Names of the linear layers to adapt. Default: on a DiT the paper's set, else those of the blocks."""
    fuse_qkv: bool = False
    """Compute q, k and v by one matrix product."""
    sum: bool | None = None
    """--sum, --no-sum: train b, the vector of the feature sum. Default: that of the method (also the next three)."""
    bias: bool | None = None
    """--bias, --no-bias: train a bias."""
    scale: bool | None = None
    """--scale, --no-scale: train a scale of the outputs."""
    norms: bool | None = None
    """--norms, --no-norms: train the affine weights of normalisation layers."""
    compression: str = "sum"
    """What b multiplies: sum, of the layer's inputs; outputs, their sum; singular, products with the directions that
    the layer amplifies most; random, with fixed random vectors. --rank is how many."""

    max_train_time: str | None = "10m"
    """Budget of wall-clock time, over all resumes: 90s, 30m, 24h, 1h30m."""
    max_steps: int | None = 1500
    """Most updates to make."""
    batch_size: int = 64
    """Images an update, over all processes and accumulation steps."""
    gradient_accumulation_steps: int = 1
    """Number of passes into which each process splits its images of an update."""
    optimizer: Literal["adamw", "adamw-8bit", "schedule-free"] = "adamw"
    """adamw-8bit is bitsandbytes', schedule-free is Meta's schedulefree; none of them decays weights."""
    learning_rate: float = 5e-3
    """Learning rate of the optimiser."""
    rates_by_sum: bool = False
    """Multiply the learning rate of b at each layer of k inputs by k^¼ / RMS(Σx), measured in the first update."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """cosine and linear fall to 0 at --max-steps."""
    warmup_steps: int = 0
    """Number of updates in which the learning rate rises from 0."""
    max_grad_norm: float | None = None
    """Clip the norm of the gradient."""
    snr_gamma: float | None = None
    """Weigh the squared error by min(SNR, gamma) / SNR (Hang et al., 2023), of velocity / (SNR + 1)."""
    loss_weighting: Weighting = "none"
    """Weigh the squared error of flow matching by the noise: sigma-sqrt or cosmap (Esser et al., 2024)."""
    timestep_density: Literal["uniform", "logit-normal", "mode"] = "uniform"
    """Distribution from which timesteps are drawn (Esser et al., 2024)."""
    logit_mean: float = 0.0
    """Mean of logit-normal: more than 0 draws less noise, as in diffusers' scripts."""
    logit_std: float = 1.0
    """Standard deviation of logit-normal."""
    mode_scale: float = 1.29
    """Scale of mode, from -1 to 1.75: more than 0 draws the middle more often, less than 0 the ends."""
    ema_decay: tuple[float, ...] = (0.999,)
    """Decays of moving averages of the trained values: the first average is the adapter that is saved, the others
    lie beside it."""
    seed: int = 0
    """Seed of all random numbers."""

    gradient_checkpointing: bool = False
    """Recompute the blocks in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile the transformer's blocks (torch.compile): a slow start, then faster steps."""
    engine: Literal["ddp", "fsdp2"] = "ddp"
    """With several processes: the whole base on each, or a share of it on each (fsdp2)."""

    log_every: int = 20
    """Updates between two lines of metrics."""
    sample_every: int = 500
    """Updates between two grids of samples with the same noise; 0: none."""
    sample_steps: int = 50
    """DDIM steps of those samples."""
    guidance_scale: float = 4.0
    """Classifier-free guidance of those samples."""
    validation_images: int = 0
    """Images that are not trained on, and whose loss is measured by the same noise each time, beside the base's."""
    validation_split: str | None = None
    """Split of the data set that has those images (digits and hf:NAME: test). Default: the training images."""
    validate_every: int = 100
    """Updates between two validations."""
    keep_best: Literal["distance", "recognition", "validation_loss"] | None = None
    """The measure by which the best adapter is kept. Default: distance with --eval-every, or else the last adapter."""
    checkpoint_every: int = 500
    """Updates between two checkpoints."""
    keep_checkpoints: int = 2
    """How many checkpoints to keep."""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """Also send metrics, samples and the plot of distances to TensorBoard or Weights & Biases."""
    push_to_hub: str | None = None
    """At the end upload the adapter with a model card to this repository of the Hugging Face hub, user/name."""
    num_workers: int = 0
    """Processes that load images."""
    latent_cache: Path | None = None
    """Folder of encoded images, shared by all runs. Default: latents/ beside --output-dir."""
    allow_changed_settings: bool = False
    """Resume although settings have changed."""
    fresh: bool = False
    """Start over, and delete the checkpoints and metrics of an earlier run in the output folder."""

    def adapter_config(self, num_classes: int | None = None, targets: tuple[str, ...] | None = None) -> AdapterConfig:
        """The settings of the adapter; `targets` are used if none are chosen. ValueError for a wrong setting."""
        try:
            peft_config = self.peft_config and json.loads(self.peft_config, object_pairs_hook=keys_once)
        except ValueError as error:
            raise ValueError(f"--peft-config {self.peft_config} is no JSON of settings: {error}") from None
        names = ("method", "rank", "fuse_qkv", *PARTS, "compression", "seed")
        chosen = {"targets": self.targets or targets, "num_classes": num_classes, "peft_config": peft_config}
        return AdapterConfig(**chosen, **{name: getattr(self, name) for name in names})

    def drawn_at(self, guidance_scale: float | None) -> float | None:
        """The guidance with which the run draws: none on top of one that is trained in."""
        return 1.0 if self.trained_guidance > 1 else guidance_scale

    def rate_factor(self, step: int) -> float:
        """The factor of the schedule on the learning rate at a step, counted from 0."""
        return learning_rate_factor(step, self.lr_schedule, self.warmup_steps, self.max_steps)

    def density(self) -> TimestepDensity:
        return TimestepDensity(self.timestep_density, self.logit_mean, self.logit_std, self.mode_scale)

    @property
    def best_by(self) -> str | None:
        """The measure by which the best adapter is kept; None keeps the last one."""
        return self.keep_best or ("distance" if self.eval_every else None)

    def as_launched(self) -> "RunSettings":
        """These settings, updated with the options of accelerate's launcher."""
        return dataclasses.replace(self, **asked_by_launcher())

    @property
    def caches(self) -> Path:
        """The folder of the caches of encoded images and prompts, and of what is recorded of bases."""
        return self.latent_cache or self.output_dir.parent / "latents"

    def as_json(self) -> dict:
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


@dataclass
class Settings(RunSettings):
    """Fine-tune a frozen DiT on new classes. The defaults are those of the chosen --config or --dataset; what
    accelerate's launcher asks for (precision, compilation, accumulation, clipping) goes before them, and a flag before
    that."""

    script: ClassVar[str] = "train_dit.py"
    sample_rows: ClassVar[int] = 4
    shows_base: ClassVar[bool] = False

    config: Path | None = None
    """A recipe, *.yaml, that sets the defaults of all other flags. Default: the one of --dataset."""
    dataset: str = EMBEDDED
    """What to learn: digits, fashion-mnist, food101, imagefolder, torchvision:CLASS (torchvision:Flowers102, any of
    its classification sets) or hf:NAME (with Hugging Face's `datasets`)."""
    data_root: Path | None = None
    """Folder of the data set: the one that contains food-101/, or one folder for each class."""
    image_column: str | None = None
    """Column of images, for hf:NAME. Default: its only one."""
    label_column: str | None = None
    """Column of labels (classes, texts or integers), for hf:NAME. Default: its only column of class labels."""
    download: bool = False
    """Download the data set (Food-101: 5 GB) if it is missing."""
    base: str | None = None
    """Base model: a folder or a hub id. Default: the miniature inside the package."""
    output_dir: Path = Path("runs/digits")
    """Where the adapter, checkpoints, metrics and samples go."""
    class_learning_rate: float | None = None
    """Learning rate of the class table. Default: --learning-rate."""
    label_drop: float = 0.1
    """Share of samples that train the null label, for classifier-free guidance."""
    trained_guidance: float = 1.0
    """Train domain guidance in (DogFit, 2026), so that one pass draws what guidance draws in two. Of w, below 2, it
    becomes that of 1 / (2 - w); 1: none. A step then takes the base's prediction, too, and samples and evaluations of
    the run have no guidance."""
    guidance_start: int = 0
    """Number of updates before --trained-guidance begins; the paper takes a quarter to a half of all."""
    guidance_cutoff: float = 1.0
    """Use --trained-guidance below this share of the timesteps alone: with 0.5 not in the noisier half."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the frozen base and of its products; trained values stay float32."""
    eval_every: int = 0
    """Updates between two evaluations, which keep the best adapter instead of the last; 0: none."""
    eval_images: int = 500
    """Images to generate for an evaluation."""
    eval_steps: int = 50
    """DDIM steps of those images."""
    eval_guidance_scale: float = 1.5
    """Classifier-free guidance of those images."""
    eval_features: str | None = None
    """Features: pixels, inception (FID), or others of eval_fid.py. Default: pixels for digits, or inception."""
    eval_weights: Path | None = None
    """Weights of those features, as eval_fid.py takes them."""
    eval_reference: Path | None = None
    """Statistics that `eval_fid.py ref` wrote. Default: those of the training images, computed at the start."""
    latent_cache_gb: float = 10.0
    """Encode all images once, to disk, if their latents take no more than this; 0: encode them at every step."""

    def of_folder(self, folder: Path) -> "Settings":
        """These settings for the classes in a folder."""
        return dataclasses.replace(self, dataset="imagefolder", data_root=folder)

    def condition_drop(self, is_guided: bool) -> float:
        """Share of samples that train without their condition."""
        return self.label_drop

    @property
    def guidance_facts(self) -> dict:
        """Entries for the adapter's header, if guidance is trained in."""
        names = ("trained_guidance", "guidance_start", "guidance_cutoff") if self.trained_guidance > 1 else ()
        return {name: getattr(self, name) for name in names}

    def check(self) -> None:
        """ValueError for settings that are known to be wrong before any file is read."""
        kind_of(self.dataset)
        check_columns(self.dataset, self.image_column, self.label_column)
        check_settings(self)
        if self.trained_guidance == 1 and (self.guidance_start or self.guidance_cutoff < 1):
            raise ValueError("--guidance-start and --guidance-cutoff are not used: give --trained-guidance")

    def next_steps(self, references: int = 0) -> list[str]:
        """Commands to run with the adapter of a finished run, whose base draws from so many pictures."""
        adapter = [] if self.output_dir == Settings.output_dir else ["--adapter", self.output_dir]
        data = [] if self.data_root is None else ["--data-root", self.data_root]
        return [command("sample.py", *adapter), command("eval_fid.py", *adapter, *data)]


# Settings that may change between a run and its resume: they do not alter what an update computes.
FREE_SETTINGS = {
    *("config", "data_root", "download", "output_dir", "max_train_time", "max_steps", "gradient_accumulation_steps"),
    *("gradient_checkpointing", "compile", "engine", "log_every", "sample_every", "sample_steps", "guidance_scale"),
    *("sample_size", "checkpoint_every", "keep_checkpoints", "track", "num_workers", "latent_cache"),
    *("allow_changed_settings", "fresh", "validation_prompt", "validation_reference", "export_lora", "push_to_hub"),
    "training_adapter",  # whose values are compared
    *("latent_cache_gb", "subjects", "subjects_at_once"),
}

# Settings that may differ between the machines of one run: where things lie there, and how many processes load them.
OF_A_MACHINE = {
    *("config", "output_dir", "subjects", "data_root", "images", "latent_cache", "eval_weights", "eval_reference"),
    *("validation_reference", "training_adapter"),
    *("download", "num_workers"),
}

LARGER_IS_BETTER = {"recognition"}

FROM_0 = ("seed", "warmup_steps", "sample_every", "eval_every", "num_workers", "latent_cache_gb", "validation_images")
FROM_0 += ("caption_shuffles", "keep_tags", "guidance_start")
FROM_1 = ("batch_size", "gradient_accumulation_steps", "log_every", "checkpoint_every", "validate_every", "max_steps")
FROM_1 += ("subjects_at_once", "keep_checkpoints", "sample_steps", "eval_steps", "resolution", "frames")
# What a number has to be, whether one is, and the settings of which that is true.
RANGES = (
    ("must be at least 0", lambda number: number >= 0, FROM_0),
    ("must be at least 1", lambda number: number >= 1, FROM_1),
    ("must be at least 2", lambda number: number >= 2, ("eval_images",)),
    ("must be at least 0 and finite", lambda number: 0 <= number < math.inf, ("prior_weight",)),
    (
        "must be more than 0 and finite",
        lambda number: 0 < number < math.inf,
        ("logit_std", "learning_rate", "class_learning_rate", "max_grad_norm", "snr_gamma"),
    ),
    ("must be finite", math.isfinite, ("guidance_scale", "eval_guidance_scale", "logit_mean")),
    ("is a share from 0 to 1", lambda number: 0 <= number <= 1, ("label_drop", "caption_drop")),
    ("is a share above 0, at most 1", lambda number: 0 < number <= 1, ("guidance_cutoff",)),
    # At 2 the target runs away from the prediction.
    ("must be at least 1 and below 2", lambda number: 1 <= number < 2, ("trained_guidance",)),
    ("is from -1 to 1.75", lambda number: -1 <= number <= 1.75, ("mode_scale",)),
)

# Flags of diffusers' training scripts that have another name here.
DIFFUSERS_FLAGS = {
    "pretrained_model_name_or_path": "--base",
    "pretrained_vae_model_name_or_path": "--base, a pipeline with its own VAE",
    "dataset_name": "--dataset hf:NAME",
    "train_data_dir": "--dataset imagefolder --data-root FOLDER",
    "instance_data_dir": "--dataset imagefolder --data-root FOLDER",
    "resolution": "the resolution of the base, and no flag for another",
    "random_flip": "--flip",
    "train_batch_size": "--batch-size, the images of an update over all processes",
    "max_train_steps": "--max-steps",
    "num_train_epochs": "--max-steps or --max-train-time, and no epochs",
    "weighting_scheme": "--timestep-density, or --loss-weighting",
    "lr_scheduler": "--lr-schedule",
    "lr_warmup_steps": "--warmup-steps",
    "use_8bit_adam": "--optimizer adamw-8bit",
    "use_ema": "--ema-decay, and always an average",
    "dataloader_num_workers": "--num-workers",
    "checkpointing_steps": "--checkpoint-every",
    "checkpoints_total_limit": "--keep-checkpoints",
    "resume_from_checkpoint": "no need of it: the same command resumes",
    "validation_epochs": "--sample-every",
    "validation_steps": "--sample-every",
    "report_to": "--track",
    "logging_dir": "--output-dir",
    "hub_model_id": "--push-to-hub user/name",
    "hub_token": "`hf auth login`, or HF_TOKEN in the environment",
}


def parse_command_line(arguments: list[str], recipes: Path) -> Settings:
    """Parse flags; their defaults are from the recipe of --config, or else that of --dataset in the folder `recipes`.

    FileNotFoundError or ValueError if the recipe is missing, a setting in it is unknown, or a flag is diffusers'.
    """
    check_flags(arguments, DIFFUSERS_FLAGS)
    chosen = first_flags(arguments, "dataset", "config", "subjects")
    if chosen["config"]:
        default = read_recipe(Path(chosen["config"]))
    else:
        default = recipe(chosen["dataset"] or ("imagefolder" if chosen["subjects"] else EMBEDDED), recipes)
    flags, name = with_switches(arguments, Settings), typed_as(Settings.script)
    return tyro.cli(Settings, args=flags, default=default.as_launched(), prog=name)


def first_flags(arguments: list[str], *names: str) -> dict[str, str | None]:
    """The values of flags that are parsed before all others, so that defaults and --help show the recipe's."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        first.add_argument(f"--{name}", nargs="?")
    return vars(first.parse_known_args(arguments)[0])


def recipe(dataset: str, recipes: Path) -> Settings:
    """The recipe of a data set in the folder `recipes`; a data set without one uses that of Food-101."""
    settings = read_recipe(recipes / defaults_of(dataset).recipe)
    if dataset == settings.dataset:
        return settings
    name = dataset.replace(":", "/").split("/")[-1].lower()  # torchvision:Flowers102, hf:owner/name
    return dataclasses.replace(settings, dataset=dataset, output_dir=settings.output_dir.with_name(name))


def read_recipe(path: Path, settings: type[RunSettings] = Settings) -> RunSettings:
    """Read settings from a YAML file; names are those of the flags with _ for -, and others keep their defaults."""
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no recipe {path}: give one by --config") from None
    if "config" in values:
        raise ValueError(f"{path}: config names a recipe from outside; write the settings of both into one file")
    return with_values(settings(), values, str(path))


def read_yaml(path: Path) -> dict:
    """Read a YAML file of `name: value`, with all values as texts, lists or further such tables."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_RecipeLoader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error.reason}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a list of `name: value`")
    return values


def with_values(settings: RunSettings, values: dict, source: str) -> RunSettings:
    """Change settings to values that were read from YAML; ValueError for an unknown name or a wrong value."""
    fields = {field.name: field for field in dataclasses.fields(settings)}
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise ValueError(f"{source}: unknown setting {name}{hint}")
    # The values are parsed as flags, so that both are read in the same way.
    try:
        flags = [word for name, value in values.items() for word in _as_flag(fields[name], value)]
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    kind = type(settings)
    try:
        return tyro.cli(kind, args=with_switches(flags, kind), default=settings)
    except SystemExit:
        print(f"in {source}", file=sys.stderr)
        raise


class _RecipeLoader(yaml.SafeLoader):
    """Loads YAML with all values as texts or null, since the type of a setting determines the meaning of its value.

    By YAML's own rules 0123 is 83, 12:30:45 is 45045, and `no` is false.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if key.value in names[:place]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands there twice", key.start_mark)
        return super().construct_mapping(node, deep)


SWITCH = {**dict.fromkeys(("true", "yes", "on"), True), **dict.fromkeys(("false", "no", "off"), False)}


def _as_flag(field: dataclasses.Field, value) -> list[str]:
    name, flag = field.name, f"--{field.name.replace('_', '-')}"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return [flag, *value]
    if value is None and type(None) not in get_args(field.type):
        raise ValueError(f"{name} has to have a value, and is null")
    if value is None:
        return [flag, "None"]
    if not isinstance(value, str):
        raise ValueError(f"{name} is neither a value nor a list of values: put what is one text into quotes")
    if field.type in (bool, bool | None):
        if value.lower() not in SWITCH:
            raise ValueError(f"{name} is true or false, not {value}")
        return [flag if SWITCH[value.lower()] else f"--no-{flag[2:]}"]
    return [f"{flag}={value}"]


def check_settings(settings: RunSettings) -> None:
    """ValueError for settings of any run that are known to be wrong before any file is read."""
    settings.adapter_config()
    for must, is_right, names in RANGES:
        for name in names:
            value = getattr(settings, name, None)
            if isinstance(value, int | float) and not is_right(value):
                raise ValueError(f"--{name.replace('_', '-')} {must}, not {value}")
    if settings.max_train_time is None and settings.max_steps is None:
        raise ValueError("training would never end: give --max-train-time or --max-steps")
    if settings.max_train_time is not None and not parse_duration(settings.max_train_time):
        raise ValueError(f"--max-train-time must be more than 0, not {settings.max_train_time}")
    if settings.lr_schedule != "constant" and settings.max_steps is None:
        raise ValueError(f"the {settings.lr_schedule} schedule ends at --max-steps: give one")
    if not settings.ema_decay or not all(0 <= decay < 1 for decay in settings.ema_decay):
        raise ValueError(f"--ema-decay is at least 0 and below 1, not {settings.ema_decay}")
    if settings.engine == "fsdp2" and (settings.method == "full" or settings.norms):
        raise ValueError(
            "--engine fsdp2 shares out the frozen base: --method full and --norms put weights in its place"
        )
    needed = "validation_images" if settings.keep_best == "validation_loss" else "eval_every"
    if settings.keep_best and not getattr(settings, needed):
        raise ValueError(f"--keep-best {settings.keep_best} is never measured: give --{needed.replace('_', '-')}")
    if settings.validation_split is not None and not settings.validation_images:
        raise ValueError(f"--validation-split {settings.validation_split} is not used: give --validation-images")
    if settings.subjects is not None:
        check_subjects(settings)
    optimizers = {"adamw-8bit": "bitsandbytes", "schedule-free": "schedulefree"}
    check_installed(f"--optimizer {settings.optimizer}", optimizers.get(settings.optimizer))
    check_installed(f"--track {settings.track}", None if settings.track == "none" else settings.track)


def refuse(others: dict[str, bool], flag: str) -> None:
    """ValueError for the first of other flags that is given, none of which goes with a flag."""
    for other, is_given in others.items():
        if is_given:
            raise ValueError(f"{other} does not go with {flag}")


def check_subjects(settings: RunSettings) -> None:
    """ValueError for settings that do not go with --subjects."""
    config = settings.adapter_config()
    others = {
        f"--method {settings.method}": config.recipe.is_whole,
        "training norms (--no-norms), which all samples of a batch share,": config.norms,
        "--engine fsdp2": settings.engine == "fsdp2",
        "--mixed-precision fp16": settings.mixed_precision == "fp16",
        "--track wandb": settings.track == "wandb",
        "--push-to-hub": settings.push_to_hub is not None,
    }
    refuse(others, "--subjects")
    for name in ("images", "data_root"):
        if getattr(settings, name, None) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is each subject's own: leave it out beside --subjects")
