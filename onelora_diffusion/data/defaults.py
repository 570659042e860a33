"""Default settings by data set, which all scripts share."""

from onelora_diffusion.data.table import DATASETS, Defaults

EMBEDDED = "digits"  # the default data set of all scripts, which needs no files
# Defaults for training data with captions, by the name in an adapter file.
CAPTIONED = {"handwritten digits": Defaults(resolution=16, guidance_scale=2.0)}


def defaults_of(dataset: str | None) -> Defaults:
    """The default settings of a data set."""
    kind = DATASETS.get((dataset or "").partition(":")[0])
    return kind.defaults if kind else CAPTIONED.get(dataset, Defaults())
