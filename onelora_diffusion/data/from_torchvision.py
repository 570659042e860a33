"""torchvision's classification data sets, by the names of their Python classes."""

import difflib
import inspect
from pathlib import Path

import torch

from onelora_diffusion.data.decoding import read_image
from onelora_diffusion.data.images import ClassifiedImages
from onelora_diffusion.files import first_line


def torchvision_images(asked) -> ClassifiedImages:
    """Load `torchvision.datasets.<name>` from a root folder; classes without names are named by their labels.

    `train` is the default split of the class (such as `trainval` of OxfordIIITPet), or all images of a data set that
    has no splits. Any other split is chosen by its own name. ValueError if the class or the split does not exist, or
    the labels are no classes; FileNotFoundError if the files are missing.
    """
    name, root, split = asked.name, asked.root or "data", asked.split
    kind = class_of(name)
    parameters = inspect.signature(kind.__init__).parameters
    part = split if {"train", "split"} & set(parameters) else ""
    arguments = {"root": str(Path(root).absolute())}
    if "train" in parameters:
        if split not in ("train", "test"):
            raise ValueError(f"torchvision:{name} has the splits train and test, not {split!r}")
        arguments["train"] = split == "train"
    elif "split" in parameters:
        if split != "train" or parameters["split"].default is inspect.Parameter.empty:
            arguments["split"] = split
    elif split != "train":
        raise ValueError(f"torchvision:{name} is one set without parts: it has the split train, not {split!r}")
    options = {"download": asked.download, "loader": read_image}
    arguments |= {key: value for key, value in options.items() if key in parameters}
    try:
        source = kind(**arguments)
        _, label = source[0]
    except (RuntimeError, FileNotFoundError) as error:  # torchvision's errors for missing files
        hint = "--download fetches them, or give another --data-root" if "download" in parameters else "--data-root"
        reason = first_line(error).split(" You can use")[0]
        raise FileNotFoundError(f"torchvision:{name} in {root}: {reason} ({hint})") from None
    except (TypeError, ImportError) as error:
        raise ValueError(f"torchvision:{name} cannot be read by its name alone: {error}") from None
    if not isinstance(label, int | torch.Tensor) or torch.as_tensor(label).ndim:
        raise ValueError(f"torchvision:{name} is no classification data set: a label of it is {label!r:.60}")
    names = _class_names(source, name)
    return ClassifiedImages(f"torchvision:{name}", source, names, asked.resolution, asked.broken, part)


def class_of(name: str) -> type:
    """`torchvision.datasets.<name>`; ValueError if there is no such data set."""
    import torchvision

    kinds = {key: kind for key, kind in vars(torchvision.datasets).items() if inspect.isclass(kind)}
    names = [key for key, kind in kinds.items() if "root" in inspect.signature(kind.__init__).parameters]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        raise ValueError(f"torchvision has no data set {name!r}: {', '.join(near or names[:5])} are some of its names")
    return kinds[name]


def _class_names(source, name: str) -> list[str]:
    names = getattr(source, "classes", None) or getattr(source, "categories", None)
    if names is not None:  # each class of ImageNet has several names
        return [each if isinstance(each, str) else each[0] for each in names]
    for attribute in ("targets", "labels", "_labels"):
        if hasattr(source, attribute):
            return [str(label) for label in range(int(max(getattr(source, attribute))) + 1)]
    raise ValueError(f"torchvision:{name} tells neither the names nor the number of its classes")
