"""Files of statistics: our own .safetensors, and the .npz of other tools.

Those of ADM's evaluator and of pytorch-fid contain mu and sigma, ADM's also mu_s and sigma_s; those of dgm-eval
contain the features of each image (reps). They do not name their features, which are inferred from their number: 2,048
are taken for Inception's and 1,024 for DINOv2's.
"""

import dataclasses
import json
from dataclasses import fields
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from onelora_diffusion.command_line import typed_as
from onelora_diffusion.evaluation.features import UNTOLD, kind_of_width
from onelora_diffusion.evaluation.npz import Header, read_headers
from onelora_diffusion.evaluation.statistics import FeatureStatistics, Measured, Origin
from onelora_diffusion.files import printable, write_bytes, write_tensors

LARGEST_WIDTH = 8192  # most features; the covariance of more takes over half a gigabyte
PICKLES = (".pkl", ".pickle")
# Names of means and covariances, then of spatial ones: in our files and in ADM's.
OURS = ("mean", "covariance"), ("spatial_mean", "spatial_covariance")
ADMS = ("mu", "sigma"), ("mu_s", "sigma_s")


def is_statistics(path: Path) -> bool:
    """Whether a file contains statistics, by its suffix and, for an .npz, by its arrays; ValueError for a pickle."""
    check_no_pickle(path)
    if path.suffix == ".npz" and path.is_file():
        return not read_headers(path).keys().isdisjoint(("mu", "reps"))
    return path.suffix == ".safetensors"


def check_no_pickle(path: Path) -> None:
    if path.suffix in PICKLES:
        raise ValueError(
            f"'{path}' is a pickle, as EDM2 writes statistics, and is not read, for it may run anything: where you "
            "trust it, save the mu and sigma in it by numpy.savez('NAME.npz', mu=..., sigma=...)"
        )


def save_statistics(path: str | Path, measured: Measured) -> Path:
    """Write statistics and their origin atomically; an .npz has ADM's layout, without the features of each image."""
    path, count, origin = Path(path), measured.statistics.count, json.dumps(dataclasses.asdict(measured.origin))
    names = ADMS if path.suffix == ".npz" else OURS
    tensors = dict(zip(names[0], (measured.statistics.mean, measured.statistics.covariance), strict=True))
    if measured.spatial:
        tensors |= dict(zip(names[1], (measured.spatial.mean, measured.spatial.covariance), strict=True))
    if names is OURS:
        features = {} if measured.kept is None else {"features": measured.kept}
        write_tensors(path, tensors | {"count": torch.tensor(count)} | features, {"statistics": origin})
    else:
        content = BytesIO()
        np.savez(content, **tensors, count=count, origin=origin)  # other tools ignore the last two
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content.getvalue())
    return path


def load_statistics(path: str | Path, keep: bool = False) -> Measured:
    """Read statistics, with `keep` also each image's features, if there; FileNotFoundError, ValueError if damaged."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no statistics at '{path}': make them by `{typed_as('eval_fid.py')} ref --output {path}`"
        )
    check_no_pickle(path)
    return _from_npz(path, keep) if path.suffix == ".npz" else _from_safetensors(path, keep)


def _from_safetensors(path: Path, keep: bool) -> Measured:
    try:
        with safe_open(path, framework="pt") as file:
            header, names = (file.metadata() or {}).get("statistics"), set(file.keys())
            if header is None:
                raise ValueError(f"'{path}' holds no feature statistics: make them by `{typed_as('eval_fid.py')} ref`")
            origin = _origin(path, header)
            count = int(file.get_tensor("count"))
            statistics, spatial = (
                FeatureStatistics(*_moments(path, file.get_tensor(mean), file.get_tensor(covariance)), count)
                if mean in names
                else None
                for mean, covariance in OURS
            )
            kept = file.get_tensor("features") if keep and "features" in names else None
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"'{path}' is damaged or no file of statistics: {error}") from error
    if statistics is None or (kept is not None and kept.shape != (count, statistics.num_features)):
        again = f"{typed_as('eval_fid.py')} ref"
        raise ValueError(f"'{path}' is damaged: its arrays do not fit together; make it again by `{again}`")
    return Measured(statistics, origin, kept, spatial)


def _from_npz(path: Path, keep: bool) -> Measured:
    headers, kept = read_headers(path), None
    if "reps" in headers and "mu" not in headers:
        rows = _array(path, headers, "reps").double()
        if rows.ndim != 2 or len(rows) < 2:
            raise ValueError(f"'{path}': reps is {tuple(rows.shape)}, not (images, d) of two images or more")
        mean, covariance, count, kept = rows.mean(0), torch.cov(rows.T), len(rows), rows.float()
    else:
        mean, covariance = (_array(path, headers, name) for name in ADMS[0])
        count = int(_array(path, headers, "count")) if "count" in headers else None
    statistics, spatial = FeatureStatistics(*_moments(path, mean, covariance), count), None
    if "mu_s" in headers:
        spatial = FeatureStatistics(*_moments(path, *(_array(path, headers, name) for name in ADMS[1])), count)
    if "origin" in headers:
        if headers["origin"].dtype.kind != "U" or headers["origin"].num_bytes > 100_000:
            raise ValueError(f"'{path}': origin is {headers['origin'].dtype} {headers['origin'].shape}, not a text")
        origin = _origin(path, str(np.load(path, allow_pickle=False)["origin"]))
    else:
        origin = Origin(kind_of_width(statistics.num_features), UNTOLD, UNTOLD, None, str(path), crop=UNTOLD)
    return Measured(statistics, origin, kept if keep else None, spatial)


def _array(path: Path, headers: dict[str, Header], name: str) -> Tensor:
    """Read an array of floating-point or whole numbers; ValueError if it is larger than a covariance may be."""
    header = headers.get(name)
    if header is None or header.dtype.kind not in "fiu" or header.num_bytes > LARGEST_WIDTH**2 * 8:
        found = f"is {header.dtype} {header.shape}" if header else "is missing"
        raise ValueError(
            f"'{path}': {name} {found}; statistics are mu (d,) and sigma (d, d), float, d up to 8192, or features "
            "one by one, reps (images, d), of up to 512 MiB"
        )
    return torch.from_numpy(np.load(path, allow_pickle=False)[name])


def _moments(path: Path, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Convert to float64; ValueError unless the arrays are a mean and a covariance."""
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"'{path}': a mean {tuple(mean.shape)} and a covariance {tuple(covariance.shape)} do not fit")
    mean, covariance = mean.double(), covariance.double()
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError(f"'{path}': its statistics are not finite: make them again")
    return mean, covariance


def _origin(path: Path, text: str) -> Origin:
    """The origin that a file contains, without control characters, since it is printed."""
    kinds = {field.name: (int, type(None)) if field.name == "resolution" else str for field in fields(Origin)}
    try:
        told = json.loads(text)
        if unknown := [name for name in told if name not in kinds]:
            raise ValueError(f"'{unknown[0]!r:.50}' is unknown: a newer version may have written it")
        if wrong := [name for name, value in told.items() if not isinstance(value, kinds[name])]:
            raise ValueError(f"its {wrong[0]} is {told[wrong[0]]!r:.50}")
        return Origin(**printable(told, 500))
    except (TypeError, AttributeError, RecursionError, ValueError) as error:
        raise ValueError(f"'{path}' is damaged or no file of statistics: {error}") from error
