"""An LRU cache of adapters in the model: read when a request needs them, the least recently used unloaded first."""

from collections import OrderedDict
from collections.abc import Iterable

from torch import nn

from onelora_diffusion.injection.verbs import unload_adapter
from onelora_diffusion.serving.library import AdapterEntry, FileKey, without_path
from onelora_diffusion.storage.adapter_file import read_adapter
from onelora_diffusion.storage.attaching import attach_adapter_file


class AdapterCache:
    """The adapters that are loaded into a model, within a limit of memory. Only the thread that runs it may use this.

    The adapters of one batch are loaded even if they exceed `memory_bytes`.
    """

    def __init__(self, transformer: nn.Module, memory_bytes: int):
        self.transformer, self.memory_bytes = transformer, memory_bytes
        # (name in the model, bytes), least recently used first
        self._by_file: OrderedDict[FileKey, tuple[str, int]] = OrderedDict()
        self.num_bytes = self.num_reads = 0  # the memory that they take now; the files that were read so far

    def __len__(self) -> int:
        return len(self._by_file)

    def will_change(self, entries: Iterable[AdapterEntry]) -> bool:
        """Whether `load` of these would load or unload adapters."""
        needed, loaded = {entry.key for entry in entries}, self._by_file.keys()
        return not needed <= loaded or self.num_bytes > self.memory_bytes and not loaded <= needed

    def load(self, entries: Iterable[AdapterEntry]) -> tuple[dict[FileKey, str], dict[FileKey, str]]:
        """Load the adapters of a batch into the model, and unload others that exceed the limit of memory.

        Returns (file -> the adapter's name in the model, file -> why it could not be loaded, in one line).
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
                file = read_adapter(entry.path)
                attach_adapter_file(self.transformer, file, f"file {self.num_reads}", str(entry.path))
            except (ValueError, OSError) as error:
                problems[key] = without_path(entry.path, str(error))
                continue
            entry.digest = file.digest  # another than that of the listing if the file was replaced meanwhile
            self._by_file[key] = (f"file {self.num_reads}", entry.num_bytes)
            self.num_bytes += entry.num_bytes
            self.num_reads += 1
        self._make_room(0, needed.keys())
        return {key: self._by_file[key][0] for key in needed if key in self._by_file}, problems

    def _make_room(self, num_bytes: int, needed) -> None:
        for key in [key for key in self._by_file if key not in needed]:
            if self.num_bytes + num_bytes <= self.memory_bytes:
                return
            adapter_name, freed = self._by_file.pop(key)
            unload_adapter(self.transformer, adapter_name)
            self.num_bytes -= freed
