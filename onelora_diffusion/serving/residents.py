"""The adapters that are in the model: read when a request asks for them, the least recently used leave first."""

from collections import OrderedDict
from collections.abc import Iterable

from torch import nn

from onelora_diffusion.injection.verbs import unload_adapter
from onelora_diffusion.serving.library import AdapterEntry, FileKey, without_path
from onelora_diffusion.storage.reading import load_adapter


class Residents:
    """A model's adapters within a limit of memory. Whoever runs the model has them: one thread at a time.

    Args:
        memory_bytes: what their values may take. Those of one batch are in the model together, whatever it is.

    Attributes:
        num_bytes: what their values take now.
        num_reads: how often a file was read.
    """

    def __init__(self, transformer: nn.Module, memory_bytes: int):
        self.transformer, self.memory_bytes = transformer, memory_bytes
        self._by_file: OrderedDict[FileKey, tuple[str, int]] = OrderedDict()  # (name there, bytes), the oldest first
        self.num_bytes = self.num_reads = 0

    def __len__(self) -> int:
        return len(self._by_file)

    def bring(self, entries: Iterable[AdapterEntry]) -> tuple[dict[FileKey, str], dict[FileKey, str]]:
        """Bring the adapters of a batch into the model.

        Returns:
            (file -> the adapter's name in the model, file -> why it cannot be there, in one line).
        """
        needed = {entry.key: entry for entry in entries}
        for key in needed.keys() & self._by_file.keys():
            self._by_file.move_to_end(key)
        problems = {}
        for key, entry in needed.items():
            if key in self._by_file:
                continue
            self._make_room(entry.num_bytes, needed.keys())
            try:
                load_adapter(self.transformer, entry.path, f"file {self.num_reads}")
            except (ValueError, OSError) as error:
                problems[key] = without_path(entry.path, str(error))
                continue
            self._by_file[key] = (f"file {self.num_reads}", entry.num_bytes)
            self.num_bytes += entry.num_bytes
            self.num_reads += 1
        return {key: self._by_file[key][0] for key in needed if key in self._by_file}, problems

    def shrink(self) -> None:
        """Back to the memory that adapters may take, which those of one batch may have gone beyond."""
        self._make_room(0, ())

    def _make_room(self, num_bytes: int, needed) -> None:
        for key in [key for key in self._by_file if key not in needed]:
            if self.num_bytes + num_bytes <= self.memory_bytes:
                return
            adapter_name, freed = self._by_file.pop(key)
            unload_adapter(self.transformer, adapter_name)
            self.num_bytes -= freed
