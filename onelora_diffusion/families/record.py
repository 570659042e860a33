"""What is recorded of a pipeline: one run, and what is known of it from several."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from types import SimpleNamespace

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from onelora_diffusion.families.arguments import Arrangement, is_meta


@dataclass
class Run:
    """What one call of a stock pipeline has shown.

    Attributes:
        calls: arguments of the denoiser by name, those in dictionaries as `dictionary.name`.
        called: the component that is the denoiser in that call.
        beside: the components of the denoiser's class that were called beside.
        times, outputs, samples: what `scheduler.step` got.
        schedule: arguments of `scheduler.set_timesteps`.
        attributes: what the pipeline set on the scheduler before that.
        changed: tensors of the scheduler that the pipeline has changed after that.
        scheduler: it, as it was in the first step.
        stepped: the number of the denoiser's calls before the last step.
        is_over: whether that was the last step that is asked for.
        encoded: what each call of a method that encodes prompts returned, and `encodes`, whether one is under way.
        begin: the standard deviation of the first sample, and `spread`, over that of the scheduler's noise.
        drawn: the sample after the last step.
        decoded: what the autoencoder's `decode` got; where there is none, what was drawn.
        decoding: `args` and `kwargs` that it got beside.
        images: what the pipeline returned, where it has no autoencoder.
    """

    calls: list[dict] = field(default_factory=list)
    called: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    schedule: dict = field(default_factory=dict)
    attributes: dict = field(default_factory=dict)
    changed: dict = field(default_factory=dict)
    scheduler: object = None
    stepped: int = 0
    is_over: bool = False
    encoded: list = field(default_factory=list)
    encodes: bool = False
    begin: float = 1.0
    spread: float = 1.0
    drawn: Tensor | None = None
    decoded: Tensor | None = None
    decoding: dict = field(default_factory=lambda: {"args": [], "kwargs": {}})
    images: Tensor | None = None

    def set_timesteps(self, scheduler) -> None:
        """Set those of a scheduler as the pipeline has set its own."""
        vars(scheduler).update(self.attributes)
        scheduler.set_timesteps(**self.schedule)


@dataclass(frozen=True)
class Prompted:
    """An argument that follows the prompt.

    Attributes:
        kind: `rows` with a row for each image, `list` with an entry for each, `shared` by all images of a batch.
        ragged: the dimension of a row that is as long as the prompt; None: all are of one shape.
    """

    kind: str
    ragged: int | None


@dataclass(frozen=True, eq=False)
class Place:
    """What the pipeline says of images of one size, or of clips of one size and number of frames.

    Attributes:
        shape: of their latents, (C, h, w), or (C, f, h, w) of clips.
        argument: the shape of the noisy argument, without the batch.
        order: for each latent, its place in the scheduler's sample; -1 for one that is given clean.
        packed: for each place of the noisy argument, the number of the latent that stands there; where reference
            images or constants do, numbers from that of latents on, in the order of the places.
        unpacked: for each latent, its place in the denoiser's output.
        sign: of the output, by which it is a prediction.
        scale, shift: latents of the autoencoder are `scale · latents + shift`, of `shape`.
        frames: whether the autoencoder has a dimension of frames.
        decoding: what it is given beside latents to decode, `args` and `kwargs`.
        constants: the arguments of a call, of which those that follow neither noise, time nor prompt are used; those
            that follow the prompt are shapes alone, on the meta device.
        still: by argument, the places (1, ...) of the time that keep their numbers, which are those of `constants`.
        odds: s of the times T·τ that the denoiser is told of, τ / (1 - τ) = σ / (1 - σ) / s, at the time T·σ.
    """

    shape: tuple[int, ...]
    argument: tuple[int, ...]
    order: Tensor
    packed: Tensor
    unpacked: Tensor
    sign: int
    scale: Tensor
    shift: Tensor
    frames: bool
    decoding: dict
    constants: dict
    still: dict[str, Tensor] = field(default_factory=dict)
    odds: float = 1.0

    def told(self, times: Tensor, most: int) -> Tensor:
        """The times of which the denoiser is told at times of `most`, (batch,)."""
        return times if self.odds == 1 else times / (times / most * (1 - self.odds) + self.odds)

    def __post_init__(self):
        vars(self)["_on_devices"] = {}

    @property
    def given(self) -> Tensor:
        """Which latents are given clean, of `shape`, bool."""
        return (self.order < 0).reshape(self.shape)

    @property
    def beside(self) -> Tensor:
        """The places of the noisy argument that are no latents but constant, bool."""
        return self.packed >= len(self.order)

    def leave_out(self, names: Iterable[str]) -> "Place":
        """This, with the shapes alone of these constants."""
        shapes = {name: send_to_device(self.constants[name], "meta") for name in names if name in self.constants}
        self.constants.update(shapes)
        return self

    @torch.inference_mode(False)  # tensors of inference mode cannot be saved for a backward
    def on(self, device: torch.device, noisy: str) -> SimpleNamespace:
        """What a call on a device needs of it, moved there once; `noisy` is the name of the noisy argument.

        `unpacked` is None where the output is in the order of the latents, and `given` where no latent is given clean;
        `beside` is what is constant beside the noise in its argument, (numbers,), or None.
        """
        if device not in self._on_devices:
            in_order = torch.equal(self.unpacked, torch.arange(len(self.unpacked)))
            moved = {
                "packed": self.packed,
                "unpacked": None if in_order else self.unpacked,
                "beside": self.constants[noisy][0].flatten()[self.beside] if self.beside.any() else None,
                "constants": {n: v for n, v in self.constants.items() if n != noisy and not is_meta(v)},
                "still": self.still,
                "given": self.given if self.given.any() else None,
            }
            self._on_devices[device] = SimpleNamespace(**send_to_device(moved, device))
        return self._on_devices[device]


@dataclass
class Record:
    """What is known of a pipeline.

    Attributes:
        side: pixels of the sides of the images that it was recorded with.
        references: the number of reference images.
        frames: of what it is recorded with: 1, or several of clips that begin with their reference image.
        pictured: the arguments that follow what is in them, of the noisy one a part.
        off: settings of its call without guidance.
        arrangement: how the arguments of the denoiser become values by name.
        noisy: the argument of the denoiser that is the noise.
        others: those that are further noises, as of sound beside a clip, which are zeros here.
        switched: the arguments, if any, by which the denoiser's output does not depend on `others`.
        takes_lists, gives_lists: whether that argument and the output are lists with an entry for each image.
        factors: sizes of the output over those of the noisy argument.
        encoded: what `encode_prompt` returned of the short prompt, `thinned`.
        times: by argument, a and b of a·t + b of the scheduler's time t, or where steps are of `flow`, of σ as such.
        share: the times t from which and below which this one of two denoisers computes.
        prompted: the arguments that follow the prompt, or what is in the reference images.
        sized, together: the arguments that follow the size, and those that follow the prompt and the size.
        masks: for two prompts, the masks of their tokens that are given where prompts are of unequal length alone.
        batched: by argument, whether there is one for each image.
        pads: whether prompts of unequal length share a batch.
        pixels: of a latent, along one side.
        stride: frames of a clip that become one of its latents, after the first; 0: the pipeline draws no clips.
        multiple: pixels of which sides are multiples.
        spread: the standard deviation of the noise that the pipeline begins with, of flow matching.
        unit: a latent's 1 in the scheduler's samples; scales of places have it as a factor.
        steps: what its steps mean, if not what its scheduler alone means by them: `flow` where they are those of flow
            matching in other coordinates, `image` where the denoiser predicts the image, and the scheduler steps by
            the velocity of that, `edm` where they are those of EDM.
        least: of `image`, the σ that the pipeline divides by at least.
        guided: settings of its call, the scale first, by which images are guided from the empty prompt; {}: none are.
        guiding: the component that computes what is guided from, which is not trained; "": the denoiser itself.
        offset: what is added to the scale in ε(∅) + w (ε(y) − ε(∅)); None: the pipeline guides by another formula.
        told: the argument of the denoiser that is told a strength w of guidance instead, and a and b of a·w + b;
            without those, an embedding of w.
        targets: patterns of the layers that are adapted by default.
    """

    side: int = 0
    references: int = 0
    frames: int = 1
    pictured: list[str] = field(default_factory=list)
    off: dict = field(default_factory=dict)
    arrangement: Arrangement = field(default_factory=Arrangement)
    noisy: str = ""
    others: list[str] = field(default_factory=list)
    switched: dict[str, bool | None] = field(default_factory=dict)
    takes_lists: bool = False
    gives_lists: bool = False
    factors: tuple[float, ...] = ()
    encoded: list | None = None
    times: dict[str, tuple[float, float]] = field(default_factory=dict)
    share: tuple[float, float] = (-inf, inf)
    prompted: dict[str, Prompted] = field(default_factory=dict)
    sized: list[str] = field(default_factory=list)
    together: list[str] = field(default_factory=list)
    masks: dict[str, Tensor] = field(default_factory=dict)
    batched: dict[str, bool] = field(default_factory=dict)
    pads: bool = False
    pixels: int = 1
    stride: int = 0
    multiple: int = 1
    spread: float = 1.0
    unit: float = 1.0
    steps: str = ""
    least: float = 0.0
    guided: dict = field(default_factory=dict)
    guiding: str = ""
    offset: int | None = 0
    told: tuple[str, float | None, float | None] | None = None
    targets: tuple[str, ...] = ()

    @property
    def guide(self) -> str | None:
        """The argument of the pipeline that is the scale of guidance from the empty prompt."""
        return next(iter(self.guided), None)

    def output_shape(self, argument: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an image's output for that of its noisy argument."""
        return tuple(round(size * factor) for size, factor in zip(argument, self.factors, strict=True))
