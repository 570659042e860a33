"""Measure what adapters cost, beside their peers.

    python benchmark.py speed                                   # DiT-XL/2's width, 4 layers, batch 4
    python benchmark.py speed --layers 28 --peers 1LoRA BitFit "PEFT LoRA r=1"
    python benchmark.py speed --family flux --precisions fp32   # a few blocks of FLUX.1 at its full width
    python benchmark.py memory                                  # on paper: SD3.5-Large, FLUX.1-dev and SANA
    python benchmark.py examples                                # beside diffusers' own training examples
    python benchmark.py scale                                   # against tokens, layers and resident adapters
    python benchmark.py adapters                                # load and switch; many adapters in one batch
    python benchmark.py generate --layers 4                     # images a second, beside the stock pipeline
    python benchmark.py serve                                   # many clients, each with its own adapter
    python benchmark.py measure-cache --images 4 --batch-size 2 # images per second, latents cached and not
    python benchmark.py compare                                 # train every method for an equal time: digits
    python benchmark.py compare --preset fashion-mnist          # the same on clothes; food101: days on a GPU
    python benchmark.py subjects                                # many subjects in one run, and in runs of their own
    python benchmark.py guidance                                # guidance that is trained in, beside others
    python benchmark.py compression                             # along which direction a layer's input is read

`benchmark.py speed --help` shows the settings of one.
"""

import sys
from typing import Annotated, Union

import tyro

from benchmarks.adapters import AdaptersSettings, adapters
from benchmarks.cache import CacheSettings, measure_cache
from benchmarks.compare import CompareSettings, compare, preset_asked_for
from benchmarks.compression import CompressionSettings, compression
from benchmarks.examples import ExamplesSettings, examples
from benchmarks.families import MemorySettings, memory
from benchmarks.generate import GenerateSettings, generate
from benchmarks.guidance import GuidanceSettings, guidance
from benchmarks.scale import ScaleSettings, scale
from benchmarks.serve import ServeSettings, serve
from benchmarks.speed import SpeedSettings, speed
from benchmarks.subjects import SubjectsSettings, subjects
from onelora_diffusion.command_line import one_line_errors, quieten

# Settings, whose docstring is the help, and what runs them.
SUBCOMMANDS = {
    SpeedSettings: speed,
    MemorySettings: memory,
    ExamplesSettings: examples,
    ScaleSettings: scale,
    AdaptersSettings: adapters,
    GenerateSettings: generate,
    ServeSettings: serve,
    CacheSettings: measure_cache,
    CompareSettings: compare,
    CompressionSettings: compression,
    SubjectsSettings: subjects,
    GuidanceSettings: guidance,
}


def parse(arguments: list[str]):
    """The settings of the subcommand that is asked for, of one of the classes in `SUBCOMMANDS`."""
    defaults = [preset_asked_for(arguments) if kind is CompareSettings else kind() for kind in SUBCOMMANDS]
    names = {kind: command.__name__.replace("_", "-") for kind, command in SUBCOMMANDS.items()}
    commands = [
        Annotated[type(default), tyro.conf.subcommand(names[type(default)], default=default)] for default in defaults
    ]
    config = (tyro.conf.OmitSubcommandPrefixes,)
    return tyro.cli(Union[tuple(commands)], args=arguments, description=__doc__, config=config)  # noqa: UP007


@one_line_errors("benchmark.py")
def main() -> None:
    quieten()
    settings = parse(sys.argv[1:])
    SUBCOMMANDS[type(settings)](settings)


if __name__ == "__main__":
    main()
