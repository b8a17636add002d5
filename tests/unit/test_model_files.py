"""Models that the configuration names: read at the start, or refused with every reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sagecp.config import ConfigError, load_config
from sagecp.runtime.model_files import read_models

CONFIGS = Path(__file__).parents[1] / "data" / "model_configs"


def test_models_are_read_from_files_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text((CONFIGS / "gemma-2-9b.json").read_text())
    models = read_models({"mine": str(folder), "other": str(CONFIGS / "qwen3-32b.json")})
    assert models["mine"].layer_count == 42
    assert models["other"].name == "other"


def test_every_bad_file_is_named(tmp_path: Path) -> None:
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps({"a": 1}))
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ConfigError) as caught:
        read_models({"a": str(tmp_path / "none.json"), "b": str(broken), "c": str(odd)})
    text = str(caught.value)
    assert 'planner.models."a": cannot be read' in text
    assert 'planner.models."b": cannot be read' in text
    assert 'planner.models."c"' in text
    assert "num_hidden_layers" in text or "is missing" in text


def test_the_configuration_has_a_table_of_models(tmp_path: Path) -> None:
    path = tmp_path / "sagecp.toml"
    path.write_text('[planner.models]\n"llama-70b" = "/models/llama-70b"\n')
    assert load_config(path).planner.models == {"llama-70b": "/models/llama-70b"}
