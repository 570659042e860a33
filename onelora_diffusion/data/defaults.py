"""What suits a data set where nothing is chosen: every script asks here."""

from onelora_diffusion.data.table import DATASETS, Defaults

EMBEDDED = "digits"  # the data set that needs no files, and the one of every script without flags
# What adapters say they were trained on that is no data set of classes.
CAPTIONED = {"handwritten digits": Defaults(resolution=16, guidance_scale=2.0)}


def defaults_of(dataset: str | None) -> Defaults:
    """Those of a data set by its name; most have the same."""
    kind = DATASETS.get((dataset or "").partition(":")[0])
    return kind.defaults if kind else CAPTIONED.get(dataset, Defaults())
