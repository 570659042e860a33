"""Try what is promised of an adapter on any base that is recorded, on small pipelines of diffusers' classes.

    python -m tools.try_promises                 # of the small pipelines of `tests`, edits too
    python -m tools.try_promises z_image kontext  # of these alone
    python -m tools.try_promises --diffusers-tests ../diffusers  # and of every other class of which its tests make one

A row is a class, a column a promise, tried by the commands' own ways: a run of four updates and one that is resumed
after two, the files that they write, and stock pipelines that load these.

- replayed: the largest relative difference of the stock pipeline's steps and picture, with the adapter, from what is
  recorded; batch: of three images of a batch from the same alone; two: of these with an adapter, another and none,
  from single runs. `refused`: the base does not keep the samples of a batch apart.
- loss: of one fixed batch, before the first and the last of eight updates; vectors: of how many a gradient was seen.
- drawn: the mean change of the stock pipeline's picture, in [0, 1], by the adapter; exported: the largest difference
  of its picture with the exported LoRA, loaded by the stock class or by PEFT.
- resumed: whether the adapter is the same, bit for bit.

Exits with 1 if one is broken, which has a `!`.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from io import StringIO
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.rounding import rounding
from onelora_diffusion import OneLoRALoaderMixin, disable_adapter, route_adapters, save_adapter, set_adapters
from onelora_diffusion.cli.train_text_to_image import prepare_task
from onelora_diffusion.command_line import quieten
from onelora_diffusion.denoisers import BOTH, autoencoder_of, denoiser_of, denoisers_in
from onelora_diffusion.diffusion import model_timesteps
from onelora_diffusion.families import Recorded, choose_references, family_of
from onelora_diffusion.storage.adapter_file import WEIGHTS_NAME
from onelora_diffusion.training import loop
from onelora_diffusion.training.job import prepare
from onelora_diffusion.training.prompt_settings import PromptSettings
from onelora_diffusion.training.stopping import Stop
from tools.stock_calls import (
    PROMPTS,
    REFERENCES,
    STEPS,
    NotMadeError,
    batched,
    conditions_of,
    failed,
    largest,
    stock_call,
    told,
    walk,
)
from tools.try_families import EDITS, pipelines_of, replayed

COLOURS = {"red": (230, 20, 20), "green": (20, 200, 40), "blue": (20, 40, 230), "night": (5, 5, 5)}
UPDATES = 8  # of one fixed batch
WIDTHS = 8, 5, 12, 7, 7, 5, 8, 7  # of the columns
PROMISES = ("replayed", "batch", "loss", "vectors", "two", "drawn", "exported", "resumed")


def draw(pipeline, family: Recorded) -> Tensor:
    """What the stock pipeline's autoencoder makes of a prompt, without guidance; from its own noise of one seed."""
    (condition,) = conditions_of(family, PROMPTS[:1])
    call = stock_call(pipeline, family, condition, apart=False, **family.record.off)
    return call.decoded[0][0] if call.decoded else 2 * torch.as_tensor(call.returned[0][0]) - 1  # of pixels


def routed(pipeline, family: Recorded, names: list[str | None]) -> float | None:
    """The relative difference of a batch, each image with its adapter, from single runs; None: it is refused."""
    model, conditions = denoiser_of(pipeline), conditions_of(family, PROMPTS[: len(names)])
    latents = torch.randn(len(names), *family.latent_shape(pipeline, *family.recorder.square))
    scheduler = family.training_scheduler(pipeline)
    times = model_timesteps(spread(family.timestep_range(scheduler), len(names)), scheduler)
    encoded, alone = family.encode_conditions(pipeline, conditions), []
    for row, name in enumerate(names):
        one = family.encode_conditions(pipeline, [conditions[row]])
        if name:
            set_adapters(model, name)
        with nullcontext() if name else disable_adapter(model):
            alone.append(family.predict(model, latents[row : row + 1], times[row : row + 1], one))
    try:
        with route_adapters(model, names):
            together = family.predict(model, latents, times, encoded)
    except ValueError as error:
        if "keep samples apart" not in str(error):
            raise
        return None
    return largest(together - torch.cat(alone), together)


def frames_of(family: Recorded) -> int:
    """The first of a few small numbers of frames, and the default, that the family learns; 1: it learns no clips."""
    recorder, stride = family.recorder, family.record.stride
    own = recorder.parameters[recorder.counts].default if recorder.counts else None
    for frames in (1 + stride, 1 + 2 * stride, own or 1):
        try:
            family.try_frames(frames)
            return frames
        except ValueError:  # of one number alone, or of none
            continue
    return 1


def spread(times: range, number: int) -> Tensor:
    """So many of these timesteps, evenly."""
    return torch.tensor([times[len(times) * (2 * part + 1) // (2 * number)] for part in range(number)])


@dataclass
class Promises:
    """Runs of the product on small pipelines of one class, in a folder.

    Attributes:
        make: a new pipeline, with the same weights each time.
        references: the number of its reference images.
        settings: of its runs, beside the own ones.
    """

    make: Callable
    references: int
    folder: Path
    settings: dict = field(default_factory=dict)

    def new(self):
        pipeline = self.make()
        choose_references(pipeline, self.references)
        return pipeline

    @property
    def is_of_two(self) -> bool:
        return len(denoisers_in(self.make())) > 1

    def kept(self) -> dict[str, tuple[str, bool]]:
        """For each of `PROMISES` what was found, in a few letters, and whether it is kept."""
        quieten()
        with torch.no_grad():
            pipeline = self.new()
            family = family_of(pipeline, self.folder / "caches")
            self.write_pictures(family)
            family.keep()
        first, last, reached, trained = self.learn("fixed")
        self.run("whole"), self.run("halves", max_steps=2), self.run("halves")
        found = {"loss": (f"{first:.2f} > {last:.2f}", last < first)}
        found["vectors"] = (f"{reached}/{trained}", reached == trained)
        found["resumed"] = ("yes", True) if self.is_resumed("whole", "halves") else ("no", False)
        with torch.no_grad():
            found |= self.served(pipeline, family)
        return {name: found[name] for name in PROMISES}

    def write_pictures(self, family: Recorded) -> None:
        """Pictures of one colour with captions; those of edits with others, of clips with a bar."""
        folder, rows, side = self.folder / "pictures", [], family.record.side
        frames = 1 if self.references else frames_of(family)
        (folder / "before").mkdir(parents=True)
        for number, (name, colour) in enumerate(COLOURS.items()):
            rows.append({"file_name": name if frames > 1 else f"{name}.png", "text": f"make it {name}"})
            for frame in range(frames):
                path = folder / name / f"{frame}.png" if frames > 1 else folder / f"{name}.png"
                path.parent.mkdir(exist_ok=True)
                picture = Image.new("RGB", (side, side), colour)
                picture.paste("white", (8 * frame, 0, 8 * frame + 8, side))
                picture.save(path)
            if self.references:
                rows[-1]["before"] = f"before/{name}.png"
                REFERENCES[number % len(REFERENCES)].image().save(folder / rows[-1]["before"])
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        self.settings.update(resolution=side, frames=frames)

    def settings_of(self, name: str, **changes) -> PromptSettings:
        own = {"base": "small", "base_precision": "fp32", "images": str(self.folder / "pictures")}
        own |= {
            "output_dir": self.folder / name,
            "latent_cache": self.folder / "caches",
            "max_steps": 4,
            "batch_size": 4,
        }
        own |= {"log_every": 1, "sample_every": 0, "checkpoint_every": 2, "learning_rate": 0.05}
        own |= {"reference_column": ("before",) * self.references, "denoisers": BOTH if self.is_of_two else None}
        own |= {"export_lora": ()}
        return PromptSettings(**own | self.settings | changes)

    def task(self, settings: PromptSettings, accelerator, pipeline):
        return prepare_task(settings, accelerator, self.new())

    def learn(self, name: str) -> tuple[float, float, int, int]:
        """Update an adapter by one batch several times, whose times are spread out, and save it.

        Returns:
            The first loss and the last one; of how many vectors a gradient has been seen, and their number.
        """
        settings = self.settings_of(name, caption_drop=0.0, learning_rate=0.01)
        with afresh(), ExitStack() as held:
            job = prepare(settings, self.task, None, held)
            (training,), reached = job.trainings, set()
            for path, vector in training.run.trained.items():
                vector.register_hook(lambda gradient, path=path: reached.add(path) if gradient.any() else None)
            with Stop(job.clock, num_processes=1) as stop:
                loop.begin(job, stop)
                part = loop.next_part(job, training, 0)
                times = spread(training.task.timesteps, len(part.moments))
                part = replace(part, draws=part.draws._replace(timesteps=times))
                with mock.patch.object(loop, "next_part", lambda *_: part):
                    for _ in range(UPDATES):
                        loop.update(job)
            losses = [row["loss"] for row in training.run.losses.read(job.accelerator, training.run.step)]
            save_adapter(denoiser_of(training.task.pipeline), self.folder / name)
        return losses[0], losses[-1], len(reached), len(training.run.trained)

    def run(self, name: str, **changes) -> None:
        """A run of the command for training, on the small pipeline."""
        with afresh():
            loop.start(self.settings_of(name, **changes), self.task)

    def is_resumed(self, *names: str) -> bool:
        whole, halves = (load_file(self.folder / name / WEIGHTS_NAME) for name in names)
        return whole.keys() == halves.keys() and all(torch.equal(whole[path], halves[path]) for path in whole)

    def served(self, pipeline, family: Recorded) -> dict[str, tuple[str, bool]]:
        """What the adapters of runs do in stock pipelines."""
        plain = draw(pipeline, family)
        pipeline = OneLoRALoaderMixin.from_pipe(pipeline)
        pipeline.load_lora_weights(self.folder / "whole", "whole")
        own = 10 * rounding(denoiser_of(pipeline))  # as in the table of what was found
        differences = {"replayed": replayed(pipeline, family)}
        differences["batch"] = batched(pipeline, family, conditions_of(family))
        picture = draw(pipeline, family)
        changed = float((picture - plain).abs().mean() / 2)
        pipeline.load_lora_weights(self.folder / "fixed", "fixed")
        differences["two"] = routed(pipeline, family, ["whole", "fixed", None])
        found = {n: ("refused", True) if d is None else (f"{d:.0e}", d < own) for n, d in differences.items()}
        found["drawn"] = (f"{changed:.3f}", bool(picture.isfinite().all()) and changed > 1e-4)
        apart = float((draw(self.stock(), family) - picture).abs().max() / 2)
        return found | {"exported": (f"{apart:.0e}", apart < of_images(pipeline))}

    def stock(self):
        """A stock pipeline with the exported LoRA, loaded by its own verb, or else by PEFT."""
        pipeline, folder = self.new(), self.folder / "whole" / "lora"
        if self.is_of_two:
            for second, name in enumerate(denoisers_in(pipeline)):
                pipeline.load_lora_weights(folder / name, load_into_transformer_2=bool(second))
        elif hasattr(pipeline, "load_lora_weights") and hasattr(denoiser_of(pipeline), "load_lora_adapter"):
            pipeline.load_lora_weights(folder)
        else:  # diffusers has no such verb for some
            PeftModel.from_pretrained(denoiser_of(pipeline), folder)
        return pipeline


def of_images(pipeline) -> float:
    """The error that rounding may bring into pictures: into each step's prediction, and into decoding."""
    autoencoder = autoencoder_of(pipeline)
    return STEPS * rounding(denoiser_of(pipeline)) + rounding(getattr(autoencoder, "decoder", autoencoder))


@contextmanager
def afresh() -> Iterator[None]:
    """Context manager without what runs print, and with the state of accelerate of none before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of the small pipelines of `tests`")
    parser.add_argument("--diffusers-tests", type=Path, help="a checkout of diffusers' repository")
    asked = parser.parse_args(arguments)
    print(line_of("pipeline", PROMISES))
    print(line_of(":---", ["---:"] * len(PROMISES)))
    verdicts = Counter()
    for edits in (False, True):
        names = [name for name in asked.names if (name in EDITS) == edits]
        with redirect_stdout(StringIO()):  # which classes are not tried is said by the other walk
            found = list(pipelines_of(names, asked.diffusers_tests, edits)) if names or not asked.names else []
        rows = ((title.replace("`", "").replace("Pipeline", ""), make) for title, make in found)
        verdicts += walk(rows, partial(tried, references=int(edits)), len(PROMISES) + 1)
    print(told(verdicts))
    return 1 if any(verdict not in ("keep all", "not recorded") for verdict in verdicts) else 0


def line_of(title: str, cells: Iterable[str]) -> str:
    """A row, which fits 120 columns."""
    return f"| {title:<32} | {' | '.join(f'{c:>{w}}' for c, w in zip(cells, WIDTHS, strict=True))} |"


def tried(make: Callable, title: str, references: int) -> tuple[str, str]:
    """The row of what `make` makes, if it is recorded, and the verdict."""
    try:
        choose_references(pipeline := make(), references)
        with torch.no_grad():
            Recorded(pipeline)
    except (NotMadeError, ValueError):
        return "", "not recorded"
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = Promises(make, references, Path(folder)).kept()
        except (Exception, SystemExit) as error:
            return failed(title, error)
    broken = [name for name, (_, is_kept) in found.items() if not is_kept]
    row = line_of(title, (text + "!" * (not is_kept) for text, is_kept in found.values()))
    return row, f"break {' and '.join(broken)}" if broken else "keep all"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
