import importlib.util
import json
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def test_exports_load_with_stock_classes_and_differ_from_the_base(tmp_path, monkeypatch, capsys):
    """What the tool does, in this environment, which it is told to take for one without the library."""
    monkeypatch.syspath_prepend(TOOLS)
    import check_exports
    import load_exports

    with pytest.raises(SystemExit, match="has onelora-diffusion, and is no test of doing without"):
        load_exports.main(tmp_path)
    check_exports.export(tmp_path, scale=0.05)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    load_exports.main(tmp_path)
    differences = json.loads((tmp_path / "found.json").read_text())
    assert check_exports.report(differences) == 0
    assert check_exports.report(differences | {"lora - lora": 1e-2}) == 1
    assert check_exports.report(differences | {"base - merged": 1e-2}) == 1
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    assert "onelora_diffusion" not in Path(load_exports.__file__).read_text().replace(
        'find_spec("onelora_diffusion")', ""
    )
