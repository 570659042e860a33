"""Write 1LoRA's experiments for PEFT's method comparisons, and rehearse the one of images on a small stand-in.

    python -m tools.peft_suite runs/peft-suite    # half a minute on one core; needs no weights

Under the folder are `MetaMathQA/experiments/` and `image-gen/experiments/`, to be copied into `method_comparison/` of
a checkout of PEFT. The rehearsal trains with the written files; its numbers are of random networks and say nothing
about the base of the comparison.
"""

import sys
from pathlib import Path

from tools.peft_suite.experiments import EXPERIMENTS, write
from tools.peft_suite.rehearsal import rehearse


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise SystemExit("usage: python -m tools.peft_suite OUTPUT")
    output = Path(arguments[0])
    for experiment in EXPERIMENTS:
        print(f"{write(experiment, output)}: {experiment}")
    folder = EXPERIMENTS[0].folder(output)
    print(f"rehearsal of {folder.name} on a random Flux2KleinPipeline a few numbers wide, no published network:")
    for name, value in rehearse(folder, output / "rehearsal").items():
        print(f"  {name:48} {value:.4g}")


if __name__ == "__main__":
    main(sys.argv[1:])
