"""The hub is asked once: a path that only looks like a hub id costs no retries."""

import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.remote import HUB_ID, is_in_reach
from onelora_diffusion.storage.finding import find_weights


class Hub:
    """The hub's client, which answers with an error and counts how often it is asked."""

    def __init__(self, monkeypatch, error):
        self.asked, self.error = [], error
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", self.answer)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "nowhere")

    def answer(self, hub_id, timeout):
        self.asked.append(hub_id)
        raise self.error


def not_found():
    return RepositoryNotFoundError.__new__(RepositoryNotFoundError, "404")  # without a response of the client's


def test_what_a_hub_id_looks_like():
    assert HUB_ID.fullmatch("facebook/DiT-XL-2-256") and HUB_ID.fullmatch("runs/food.101")
    assert not any(map(HUB_ID.fullmatch, ("food101", "./food101", "/runs/food101", "a/b/c", "a/b c")))


@pytest.mark.parametrize("load", [load_base, find_weights])
@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError("no route"), "not in the cache"), (not_found(), "the hub has no 'rums/food101', or gives no access")],
)
def test_a_mistyped_path_is_one_question_and_one_line(load, error, reason, monkeypatch, capfd):
    hub = Hub(monkeypatch, error)
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as caught:
        load("rums/food101")
    assert "rums/food101" in str(caught.value) and "\n" not in str(caught.value)
    assert hub.asked == ["rums/food101"] and capfd.readouterr() == ("", "")


def test_the_hubs_silence_is_no_answer(monkeypatch):
    Hub(monkeypatch, TimeoutError())
    assert is_in_reach("someone/food") is False
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda api, hub_id, timeout: None)
    assert is_in_reach("someone/food") is True
