"""The adapter files below some folders, by name, with the reason for each that cannot be used."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from onelora_diffusion.files import printable
from onelora_diffusion.storage.adapter_file import WEIGHTS_NAME, describe_adapter
from onelora_diffusion.storage.attaching import AdapterFile

MAX_DEPTH = 3  # levels of subfolders that are searched
SKIPPED = {"checkpoints", "latents"}  # folders of training runs that hold no adapters
RESCAN_S = 1.0  # the folders are listed again at most this often, as they may hold thousands of files


Stamp = tuple[int, ...] | None  # of a file: the inode, its times, of which a program may set the first, and the size
FileKey = tuple[Path, Stamp]  # a path with its stamp: a changed file has another key


class UnknownAdapter(ValueError):
    """The library has no adapter of this name."""


@dataclass(eq=False)
class AdapterEntry:
    """What the header of an adapter file says; its values are not read."""

    name: str  # that requests use: the path of the file, or of the run that wrote it, relative to the library
    path: Path
    stamp: Stamp  # changes when the file changes
    problem: str | None = None  # why the adapter cannot be used, in one line
    method: str = ""
    base: str | None = None
    dataset: str | None = None
    classes: dict[int, str] | None = None  # its own class names by label; None if it draws the base's classes
    has_guidance: bool = False  # whether guidance is trained into it
    prompt: str | None = None  # the caption of all its training images, if there is one
    trigger: str | None = None  # the word for what it has learned, if there is one
    num_params: int = 0
    num_bytes: int = 0  # of memory that its values take when loaded
    digest: str | None = None  # SHA-256 of its settings and values, as of the last time that the file was read

    @property
    def key(self) -> FileKey:
        return self.path, self.stamp


@dataclass
class AdapterLibrary:
    """The adapter files below some folders. A requested name is looked up in their list, and never used as a path.

    A file that was added is found by the next listing, and a file that was changed counts as another adapter; those
    that were not changed are not read again. A file that cannot be used is listed with the reason: it is damaged, was
    made for another base, lies too deep, or its name is that of a file before it.
    """

    folders: Sequence[Path]  # to search; if two hold an adapter of the same name, the first one's is used
    fingerprint: str  # of the base
    _entries: dict[str, AdapterEntry] = field(default_factory=dict)
    _scanned_at: float = float("-inf")
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def entries(self) -> list[AdapterEntry]:
        """All adapter files of now, sorted by name, including those that cannot be used."""
        self._scan(at_most_every=RESCAN_S)
        return sorted(self._entries.values(), key=lambda entry: entry.name)

    def entry(self, name: str) -> AdapterEntry:
        """The entry of a name, for its file as it is now; UnknownAdapter, or ValueError with why it cannot be used."""
        known = self.find(name)
        if known is None:
            raise UnknownAdapter(f"no adapter '{printable(name, 60)}': {self._some()}")
        if known.problem:
            raise ValueError(f"adapter '{name}' cannot be drawn with: {known.problem}")
        return known

    def find(self, name: str) -> AdapterEntry | None:
        """The entry of a name, for its file as it is now, even if it cannot be used; None if there is none."""
        known = self._entries.get(name)
        if known is None or _stamp(known.path) != known.stamp:
            self._scan(at_most_every=0 if known else RESCAN_S)
        return self._entries.get(name)

    def rescan(self) -> None:
        """List the files again, after some were written or removed."""
        self._scan(at_most_every=0)

    def check(self, adapter: AdapterFile) -> None:
        """ValueError unless requests can be drawn with an adapter of this content."""
        if adapter.fingerprint not in (self.fingerprint, None):
            raise ValueError(f"was made for another base ({_text(adapter.base) or 'unnamed'})")
        if adapter.training.get("references"):
            raise ValueError("edits reference images, which requests do not have")
        if adapter.config.norms or adapter.config.recipe.is_whole:
            raise ValueError("trains norms or the whole base, which the samples of a batch share: merge it")

    def refuse(self, entry: AdapterEntry, problem: str) -> None:
        """List an adapter as damaged, for a problem that was found when its values were read."""
        with self._lock:
            if self._entries.get(entry.name) is entry:
                self._entries[entry.name] = AdapterEntry(entry.name, entry.path, entry.stamp, problem)

    def _some(self) -> str:
        names = [entry.name for entry in self._entries.values() if not entry.problem]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return f"there is {', '.join(names[:5])}{more}" if names else "there is none"

    def _scan(self, at_most_every: float) -> None:
        with self._lock:
            if time.monotonic() - self._scanned_at < at_most_every:
                return
            found: dict[str, AdapterEntry] = {}
            for folder in map(Path.resolve, self.folders):
                for path, problem in _files(folder):
                    stamp, name = _stamp(path), _name(folder, path)
                    if stamp is None and problem is None:  # it was removed just now
                        continue
                    if name in found:
                        problem = f"has the name of another file, '{name}': rename one of them"
                        name = f"{name} ({path.relative_to(folder).as_posix()})"
                    old = self._entries.get(name)
                    is_same = old is not None and (old.path, old.stamp) == (path, stamp)
                    found[name] = old if is_same else self._described(name, path, stamp, problem)
            self._entries, self._scanned_at = found, time.monotonic()

    def _described(self, name: str, path: Path, stamp: Stamp, problem: str | None) -> AdapterEntry:
        if problem:
            return AdapterEntry(name, path, stamp, problem)
        try:
            adapter = describe_adapter(path)
            self.check(adapter)
        except (ValueError, OSError) as error:
            return AdapterEntry(name, path, stamp, printable(without_path(path, str(error)), 300))
        training, config = adapter.training, adapter.config
        num_params = sum(tensor.numel() for tensor in adapter.tensors.values())
        classes = None
        if config.num_classes is not None:
            classes = {label: adapter.id2label.get(label, str(label)) for label in range(config.num_classes)}
        return AdapterEntry(
            name,
            path,
            stamp,
            method=config.method,
            base=_text(adapter.base),
            classes=classes,
            has_guidance="trained_guidance" in training,
            **{name: _text(training.get(name)) for name in ("dataset", "prompt", "trigger")},
            num_params=num_params,
            num_bytes=4 * num_params,  # a loaded adapter is float32
            digest=adapter.digest,
        )


def without_path(path: Path, message: str) -> str:
    """The message of an error without the path, which a client must not learn."""
    return message.removeprefix(f"{path}: ").replace(str(path), path.name)


def _text(value) -> str | None:
    """A text of a header for clients, in one line; of a path of the machine that wrote it, the last part."""
    if not isinstance(value, str):
        return None
    path = PureWindowsPath(value)  # which splits at slashes of both kinds
    return printable(path.name if path.root or path.drive or value[:1] in (".", "~") else value, 100)


def _files(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """(path, problem) of the files in a folder that may be adapters. Links that lead out of it are left out."""
    for parent, folders, files in os.walk(folder):
        depth = len(Path(parent).relative_to(folder).parts)
        folders[:] = sorted(f for f in folders if depth <= MAX_DEPTH and f not in SKIPPED and not f.startswith("."))
        for file in sorted(files):
            path = Path(parent, file)
            if not file.endswith(".safetensors") or file.startswith("."):
                continue
            try:
                is_inside = not path.is_symlink() or path.resolve(strict=True).is_relative_to(folder)
            except (OSError, RuntimeError):  # before Python 3.13 a loop is a RuntimeError
                yield path, "is a link that leads nowhere"
                continue
            if depth > MAX_DEPTH:
                yield path, f"lies deeper than {MAX_DEPTH} folders"
            elif is_inside:
                yield path, None


def _name(folder: Path, path: Path) -> str:
    """The name of an adapter: the path of its file, or of the folder of the run that wrote it."""
    relative = path.relative_to(folder)
    is_runs = relative.name == WEIGHTS_NAME and len(relative.parts) > 1
    return (relative.parent if is_runs else relative.with_suffix("")).as_posix()


def _stamp(path: Path) -> Stamp:
    """A value that changes when the file changes; None if the file is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size


def shipped_adapters() -> Path:
    """The folder of the adapters that ship with the package, which fit its miniature."""
    return Path(__file__).parent / "adapters"
