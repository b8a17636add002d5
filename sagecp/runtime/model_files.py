"""Reads what is known of the fleet's models from the files that the configuration names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from sagecp.config import ConfigError
from sagecp.core.errors import FieldViolation
from sagecp.core.parallelism.model_config import MAX_CONFIG_BYTES, ModelConfigError, parse_model_config
from sagecp.core.parallelism.model_description import ModelDescription


def read_models(paths: Mapping[str, str]) -> dict[str, ModelDescription]:
    """Return models by the name they are served under.

    Args:
        paths: A checkpoint's folder, or its ``config.json``, by name.

    Raises:
        ConfigError: Names every file that cannot be read or is no model's.
    """
    models: dict[str, ModelDescription] = {}
    violations: list[FieldViolation] = []
    for name, text in paths.items():
        path = Path(text).expanduser()
        if path.is_dir():
            path /= "config.json"
        field = f'planner.models."{name}"'
        try:
            if path.stat().st_size > MAX_CONFIG_BYTES:
                raise ValueError(
                    f"{path} has more than {MAX_CONFIG_BYTES:,} bytes; name a model's config.json"
                )
            models[name] = parse_model_config(json.loads(path.read_text(encoding="utf-8")), name=name)
        except ModelConfigError as error:
            violations += [FieldViolation(field, f"{path}: {each.description}") for each in error.violations]
        except (OSError, ValueError, RecursionError) as error:
            violations.append(FieldViolation(field, f"cannot be read: {error}"))
    if violations:
        raise ConfigError(violations)
    return models
