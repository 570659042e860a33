"""Default settings by data set, which all scripts share."""

from onelora_diffusion.data.digits import CAPTIONED
from onelora_diffusion.data.table import DATASETS, Defaults

EMBEDDED = "digits"  # the default data set of all scripts, which needs no files
# The defaults for prompts, of which few are measured, each for itself.
OF_PROMPTS = Defaults(
    features="dino",
    guidance_scale=None,
    eval_guidance_scale=None,
    eval_images=None,
    eval_steps=28,
    compares_base=True,
    has_distance=False,
    metrics=("DINO-I", "CLIP-I", "CLIP-T", "nearest"),
)


def defaults_of(dataset: str | None, kind: str = "classes") -> Defaults:
    """The default settings of a data set, or of what an adapter draws after it: `classes` or `prompts`."""
    if kind == "prompts" and dataset != CAPTIONED:  # any folder or hub data set with captions
        return OF_PROMPTS
    row = DATASETS.get((dataset or "").partition(":")[0])
    return row.defaults if row else Defaults()
