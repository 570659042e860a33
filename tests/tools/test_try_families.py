"""The table of what recordings say of small pipelines."""

from tools.try_families import main


def test_a_row_says_what_was_found(capsys):
    assert main(["wan", "hidream"]) == 0
    _, _, wan, hidream = capsys.readouterr().out.splitlines()
    assert wan.startswith("| `WanPipeline` | `hidden_states` + | `timestep` 1·t | `encoder_hidden_states` | – | w |")
    assert hidream.startswith("| `HiDreamImagePipeline` | `hidden_states` − | `timesteps` 1·t | ")
