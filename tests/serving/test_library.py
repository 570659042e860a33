"""Adapters in a folder: found by name, never outside it, damaged ones with their reason, and in memory by need."""

import os
import time

import pytest
import torch
from serving.servers import CLASSES, CONFIGS, make_pipeline, write_adapter, write_adapters
from tiny_models import dit_inputs

from onelora_diffusion import inject_adapter, read_adapter, save_adapter, unload_adapter
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.injection.book import adapters_of, fingerprint
from onelora_diffusion.injection.routing import route_adapters
from onelora_diffusion.serving import library as library_module
from onelora_diffusion.serving.adapter_cache import AdapterCache
from onelora_diffusion.serving.library import AdapterLibrary, UnknownAdapter
from onelora_diffusion.storage.reading import load_adapter


@pytest.fixture
def transformer():
    return make_pipeline().transformer


@pytest.fixture(autouse=True)
def always_rescanned(monkeypatch):
    monkeypatch.setattr(library_module, "RESCAN_S", 0.0)


def names(library) -> list[str]:
    return [entry.name for entry in library.entries() if not entry.problem]


def test_adapters_are_named_by_their_files_and_runs_and_say_what_they_draw(tmp_path, transformer):
    write_adapter(transformer, tmp_path / "deep/run", CONFIGS["food"], 0, CLASSES["food"])
    write_adapter(transformer, tmp_path / "plain.safetensors", CONFIGS["plain"], 0)
    write_adapter(transformer, tmp_path / "deep/run/best.safetensors", CONFIGS["plain"], 0)
    write_adapter(transformer, tmp_path / "deep/run/checkpoints/step-1/tensors.safetensors", CONFIGS["plain"], 0)
    library = AdapterLibrary([tmp_path], fingerprint(transformer))
    assert names(library) == ["deep/run", "deep/run/best", "plain"]
    food = library.entry("deep/run")
    assert food.classes == {0: "pizza", 1: "sushi", 2: "soup"}
    assert (food.method, food.dataset) == ("1lora", "toys")
    assert food.num_bytes == 4 * food.num_params
    model = load_adapter(transformer, food.path)
    assert food.num_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert library.entry("plain").classes is None


def test_a_new_file_appears_a_changed_one_is_another_and_a_removed_one_is_gone(tmp_path, transformer):
    library = AdapterLibrary([tmp_path], fingerprint(transformer))
    assert names(library) == []
    write_adapter(transformer, tmp_path / "one.safetensors", CONFIGS["plain"], 0)
    first = library.entry("one")
    write_adapter(transformer, tmp_path / "one.safetensors", CONFIGS["plain"], 1)
    second = library.entry("one")
    assert first.key != second.key
    assert library.entry("one") is second
    (tmp_path / "one.safetensors").unlink()
    with pytest.raises(UnknownAdapter, match="no adapter 'one': there is none"):
        library.entry("one")


def test_damaged_files_are_listed_with_their_reason_and_without_their_path(tmp_path, transformer):
    write_adapters(tmp_path, transformer, ["plain"])
    whole = (tmp_path / "plain.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    (tmp_path / "text.safetensors").write_text("no weights")
    other = make_pipeline().transformer
    other.pos_embed.proj = torch.nn.Conv2d(4, 16, 2)
    library = AdapterLibrary([tmp_path], fingerprint(transformer))
    problems = {entry.name: entry.problem for entry in library.entries()}
    assert problems["plain"] is None
    for name in ("cut", "text"):
        assert "is damaged or no safetensors file" in problems[name]
        assert str(tmp_path) not in problems[name] and "\n" not in problems[name]
        with pytest.raises(ValueError, match=f"adapter '{name}' cannot be drawn with: is damaged"):
            library.entry(name)
    foreign = AdapterLibrary([tmp_path], fingerprint(other)).entries()
    assert all("another base" in entry.problem or "damaged" in entry.problem for entry in foreign)


def test_what_a_batch_would_share_is_not_served(tmp_path, transformer):
    write_adapter(transformer, tmp_path / "whole.safetensors", AdapterConfig(method="full"), 0)
    library = AdapterLibrary([tmp_path], fingerprint(transformer))
    with pytest.raises(ValueError, match="'whole' cannot be drawn with: trains norms or the whole base"):
        library.entry("whole")


def test_no_name_leads_out_of_the_folder(tmp_path, transformer):
    write_adapter(transformer, tmp_path / "secret.safetensors", CONFIGS["plain"], 0)
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "linked").symlink_to(tmp_path)
    library = AdapterLibrary([folder], fingerprint(transformer))
    assert library.entries() == []
    for name in ("../secret", str(tmp_path / "secret"), "link", "linked/secret", "..\\secret", "", ".", "\0"):
        with pytest.raises(UnknownAdapter, match="no adapter"):
            library.entry(name)


def test_files_that_cannot_be_reached_by_a_name_are_listed_with_their_reason(tmp_path, transformer):
    """Of two files of one name the first is drawn with, in the earlier folder; links in a circle end nothing."""
    first, second = tmp_path / "a", tmp_path / "b"
    write_adapter(transformer, first / "one.safetensors", CONFIGS["plain"], 0)
    for path in (
        first / "one/onelora_weights.safetensors",
        second / "one.safetensors",
        first / "1/2/3/4/deep.safetensors",
    ):
        write_adapter(transformer, path, CONFIGS["food"], 0)
    (first / "loop.safetensors").symlink_to("loop.safetensors")
    (first / "circle").symlink_to(first)
    os.mkfifo(first / "pipe.safetensors")
    library = AdapterLibrary([first, second], fingerprint(transformer))
    problems = {entry.name: entry.problem for entry in library.entries()}
    assert problems == {
        "one": None,
        "one (one/onelora_weights.safetensors)": "has the name of another file, 'one': rename one of them",
        "one (one.safetensors)": "has the name of another file, 'one': rename one of them",
        "1/2/3/4/deep": "lies deeper than 3 folders",
        "loop": "is a link that leads nowhere",
        "pipe": "no adapter at 'pipe.safetensors'",
    }
    assert library.entry("one").path == first / "one.safetensors"


def test_a_file_that_was_not_changed_is_not_read_again(tmp_path, transformer, monkeypatch):
    for seed in range(3):
        write_adapter(transformer, tmp_path / f"{seed}.safetensors", CONFIGS["plain"], seed)
    library, read = AdapterLibrary([tmp_path], fingerprint(transformer)), []
    describe = library_module.describe_adapter
    monkeypatch.setattr(library_module, "describe_adapter", lambda path: read.append(path.name) or describe(path))
    assert names(library) == ["0", "1", "2"] and len(read) == 3
    write_adapter(transformer, tmp_path / "1.safetensors", CONFIGS["plain"], 7)
    assert names(library) == ["0", "1", "2"] and read[3:] == ["1.safetensors"]


def test_paths_of_the_machine_that_wrote_an_adapter_are_not_shown(tmp_path, transformer):
    for name, base in (("a", "/home/ann/bases/dit"), ("b", "C:\\Users\\ann\\dit"), ("c", "facebook/DiT-XL-2-256")):
        inject_adapter(transformer, CONFIGS["plain"])
        save_adapter(transformer, tmp_path / f"{name}.safetensors", base=base, training={"dataset": base})
        unload_adapter(transformer)
    entries = AdapterLibrary([tmp_path], fingerprint(transformer)).entries()
    assert [entry.base for entry in entries] == ["dit", "dit", "facebook/DiT-XL-2-256"]
    assert [entry.dataset for entry in entries] == ["dit", "dit", "facebook/DiT-XL-2-256"]


def test_a_folder_is_not_listed_for_every_request(tmp_path, transformer, monkeypatch):
    monkeypatch.setattr(library_module, "RESCAN_S", 3600.0)
    write_adapter(transformer, tmp_path / "one.safetensors", CONFIGS["plain"], 0)
    library = AdapterLibrary([tmp_path], fingerprint(transformer))
    library.entry("one")
    monkeypatch.setattr(library_module, "_files", lambda folder: pytest.fail("listed again"))
    library.entry("one")
    with pytest.raises(UnknownAdapter):
        library.entry("two")


def test_a_changed_file_is_read_again_at_once_within_the_time_between_two_listings(tmp_path, transformer, monkeypatch):
    """Also where it is written in place, has the old size and was given its old time, as by `rsync --inplace -t`."""
    monkeypatch.setattr(library_module, "RESCAN_S", 3600.0)
    path = tmp_path / "one.safetensors"
    write_adapter(transformer, path, CONFIGS["plain"], 0)
    library = AdapterLibrary([tmp_path], fingerprint(transformer))
    first, status = library.entry("one"), path.stat()
    write_adapter(transformer, tmp_path / "two.safetensors", CONFIGS["plain"], 1)
    path.write_bytes((tmp_path / "two.safetensors").read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_ino) == (status.st_size, status.st_ino)
    second = library.entry("one")
    assert second.key != first.key and library.entry("one") is second
    path.unlink()
    with pytest.raises(UnknownAdapter):
        library.entry("one")


def test_the_least_recently_used_leave_when_memory_is_full(tmp_path, transformer):
    for seed in range(4):
        write_adapter(transformer, tmp_path / f"{seed}.safetensors", CONFIGS["plain"], seed)
    library = AdapterLibrary([tmp_path], fingerprint(transformer))
    zero, one, two, three = library.entries()
    cache = AdapterCache(transformer, 2 * zero.num_bytes)

    def present():
        return list(adapters_of(transformer).adapters)

    names, problems = cache.load([zero, one, zero])
    assert (list(names), problems) == ([zero.key, one.key], {})
    assert present() == list(names.values())
    cache.load([zero])  # now `one` is the least recently used
    assert cache.load([two])[0].keys() == {two.key}
    assert len(cache) == 2 and cache.num_bytes == 2 * zero.num_bytes
    assert cache.load([zero])[0] == {zero.key: names[zero.key]}
    assert cache.num_reads == 3
    # A batch has all its adapters together, whatever the limit says.
    together, _ = cache.load([zero, one, two, three])
    assert sorted(present()) == sorted(together.values())
    assert len(cache) == 4 and cache.will_change([three]) and not cache.will_change([zero, one, two, three])
    assert cache.load([three])[0].keys() == {three.key}  # adapters of earlier batches leave
    assert not cache.will_change([])
    assert present() == [together[one.key], together[three.key]] and cache.num_bytes == 2 * zero.num_bytes


def test_values_that_are_damaged_show_when_they_are_read(tmp_path, transformer):
    write_adapter(transformer, tmp_path / "good.safetensors", CONFIGS["plain"], 0)
    content = bytearray((tmp_path / "good.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(content)
    library = AdapterLibrary([tmp_path], fingerprint(transformer))
    cache = AdapterCache(transformer, 10**9)
    names, problems = cache.load(library.entries())
    assert list(names) == [library.entry("good").key]
    ((key, problem),) = problems.items()
    bad = library.entry("bad")
    assert key == bad.key and problem.startswith("is damaged, for it is not what was written")
    library.refuse(bad, problem)
    with pytest.raises(ValueError, match="'bad' cannot be drawn with: is damaged"):
        library.entry("bad")
    # A better file in its place is read.
    write_adapter(transformer, tmp_path / "bad.safetensors", AdapterConfig(bias=True), 0)
    os.utime(tmp_path / "bad.safetensors", ns=(time.time_ns(), time.time_ns()))
    assert cache.load([library.entry("bad")])[1] == {}


def test_an_adapter_has_the_digest_of_the_file_that_was_loaded(tmp_path, transformer):
    path = tmp_path / "one.safetensors"
    write_adapter(transformer, path, CONFIGS["plain"], 0)
    entry = AdapterLibrary([tmp_path], fingerprint(transformer)).entry("one")
    assert entry.digest == read_adapter(path).digest
    write_adapter(transformer, path, CONFIGS["plain"], 1)  # after it was listed and before it is loaded
    assert entry.digest != read_adapter(path).digest
    AdapterCache(transformer, 10**9).load([entry])
    assert entry.digest == read_adapter(path).digest


def test_residents_draw_without_dropout(tmp_path, transformer):
    config = AdapterConfig("lora", rank=4, peft_config={"lora_dropout": 0.5})
    write_adapter(transformer, tmp_path / "lora.safetensors", config, 0)
    cache = AdapterCache(transformer, 10**9)
    (name,) = cache.load(AdapterLibrary([tmp_path], fingerprint(transformer)).entries())[0].values()
    with torch.no_grad(), route_adapters(transformer, [name] * 3):
        assert torch.equal(transformer(**dit_inputs()).sample, transformer(**dit_inputs()).sample)
