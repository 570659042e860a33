import hashlib
import json
import shutil

import pytest
import torch
from tiny_models import make_tokenizer
from torch import nn
from transformers import AutoTokenizer

from onelora_diffusion.data import prompt_cache
from onelora_diffusion.data.prompt_cache import PromptCache, build_prompt_cache, identity_of
from onelora_diffusion.data.row_cache import is_whole


class Encoder(nn.Module):
    """Adds its weight to the codes of the characters of a prompt, padded with -1 to eight."""

    def __init__(self, weight=0.0, **config):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight]))
        self.config = config

    def forward(self, prompts):
        codes = [list(prompt.encode())[:8] for prompt in prompts]
        padded = torch.tensor([each + [-1] * (8 - len(each)) for each in codes])
        return {"codes": padded + self.weight, "mask": padded >= 0}


CAPTIONS = ["a dog", "a cat", "a dog", "a bird", "a cat"]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(prompt_cache, "SHARD_SIZE", 3)  # the empty prompt, dog and cat; bird


def build(parent, captions=CAPTIONS, encoder=None, kind="codes of 8", encode=None, **arguments):
    encoder = encoder or Encoder()
    identity = identity_of({"text": encoder, "other": None})
    return build_prompt_cache(parent, captions, encode or encoder, identity, kind, **arguments)


def test_embeddings_are_those_of_each_caption_and_of_the_empty_one_where_it_is_dropped(tmp_path):
    encoder = Encoder(0.5)
    cache = PromptCache(build(tmp_path, encoder=encoder), CAPTIONS)
    indices = torch.tensor([4, 0, 3, 2, 1])
    dropped = torch.tensor([False, True, False, False, True])
    found = cache.embeddings(indices, dropped)
    expected = encoder(["a cat", "", "a bird", "a dog", ""])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not found["codes"].requires_grad and found["mask"].dtype == torch.bool


def test_every_prompt_is_encoded_once(tmp_path):
    asked, encoder = [], Encoder()
    folder = build(tmp_path, encode=lambda prompts: asked.append(prompts) or encoder(prompts), batch_size=2)
    assert asked == [["", "a dog"], ["a cat"], ["a bird"]]
    assert build(tmp_path, encode=lambda prompts: asked.append(prompts)) == folder
    assert len(asked) == 3 and len(PromptCache(folder, CAPTIONS)) == 4


def test_a_build_that_was_stopped_or_damaged_goes_on(tmp_path):
    asked, encoder = iter([False, True]), Encoder()
    folder = build(tmp_path, is_stopped=lambda: next(asked))
    first, second = folder / "shard-00000.safetensors", folder / "shard-00001.safetensors"
    assert is_whole(first) and not second.exists()
    first.write_bytes(b"cut")
    said, asked = [], []
    build(tmp_path, encode=lambda prompts: asked.append(prompts) or encoder(prompts), report=said.append)
    assert asked == [["", "a dog", "a cat"], ["a bird"]]
    assert said == [f"{first} is damaged: its prompts are encoded again"]


def test_two_processes_share_the_prompts(tmp_path):
    folder = build(tmp_path, process_index=1, num_processes=2)
    assert not (folder / "shard-00000.safetensors").exists()
    build(tmp_path, process_index=0, num_processes=2)
    alone = build(tmp_path / "alone")
    for path in alone.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_other_captions_encoders_or_ways_to_encode_make_another_cache(tmp_path):
    folder = build(tmp_path)
    assert build(tmp_path, captions=[*CAPTIONS, "a dog"]) == folder  # the same prompts
    others = {
        build(tmp_path, captions=["a dog", "a cat", "a fish"]),
        build(tmp_path, encoder=Encoder(1.0)),
        build(tmp_path, encoder=Encoder(layers=2)),
        build(tmp_path, kind="codes of 8, twice"),
    }
    assert len(others | {folder}) == 5


def test_a_tokenizer_is_known_by_what_it_does_and_not_by_where_it_lies(tmp_path):
    tokenizer = make_tokenizer(24)
    tokenizer.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    content = json.loads((tmp_path / "b" / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(content))
    before = identity_of({"tokenizer": tokenizer, "tokenizer_2": None})
    tokenizer("a call pads", padding="max_length", truncation=True, max_length=7)
    same, other = (AutoTokenizer.from_pretrained(tmp_path / name) for name in "ab")
    assert list(before) == ["tokenizer"] and before == identity_of({"tokenizer": tokenizer})
    assert before == identity_of({"tokenizer": same}) != identity_of({"tokenizer": other})


def test_the_key_is_a_hash_of_what_is_written_beside_the_rows(tmp_path):
    folder = build(tmp_path)
    inputs = json.loads((folder / "inputs.json").read_text())
    assert (inputs["prompts"], inputs["kind"], list(inputs["encoders"])) == (4, "codes of 8", ["text"])
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    assert folder.name == f"prompts-{key[:12]}"
