"""What --model names: a folder of a checkpoint, its config.json, or a model that is known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError

if TYPE_CHECKING:
    import click
    from click.shell_completion import CompletionItem

_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model for a request.

    Attributes:
        name: What it is called in the commands.
        config_json: Its configuration; empty: the name says all.
    """

    name: str
    config_json: str = ""


def read_model(text: str) -> ModelSource:
    """Return the model that somebody named.

    Raises:
        CliError: A file that was meant cannot be read.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        return ModelSource(str(path.resolve()), _read(path / _CONFIG, within=path))
    if path.is_file():
        config_json = _read(path, within=None)
        return ModelSource(_name_in(config_json) or str(path.resolve().parent), config_json)
    if text.endswith(".json") or text.startswith((".", "/", "~")):
        raise _refusal(
            f"there is no file or folder {text}", "give a checkpoint's folder, its config.json, or a name"
        )
    return ModelSource(text)


def _read(path: Path, within: Path | None) -> str:
    from sagecp.core.parallelism.model_config import MAX_CONFIG_BYTES

    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise _refusal(
                f"{path} has {size:,} bytes; a model's {_CONFIG} has {MAX_CONFIG_BYTES:,} at most",
                f"give the {_CONFIG} of the checkpoint, not its weights or its tokenizer",
            )
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except FileNotFoundError as error:
        raise _refusal(
            f"{within} has no {_CONFIG}", "give the folder of a Hugging Face checkpoint, or a name"
        ) from error
    except OSError as error:
        raise _refusal(f"cannot read {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise _refusal(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise _refusal(f"{path} is not JSON text: {error}") from error
    return text


def _name_in(config_json: str) -> str:
    """Return the name that a configuration has for its model, where it is one."""
    config = json.loads(config_json)
    name = config.get("_name_or_path") if isinstance(config, dict) else None
    return name if isinstance(name, str) else ""


def _refusal(problem: str, hint: str = "") -> CliError:
    return CliError(f"--model: {problem}", hint=hint, exit_code=ExitCode.INVALID)


def complete_model(_ctx: click.Context, _parameter: click.Parameter, start: str) -> list[CompletionItem]:
    """Offer the models that are known; files are the shell's."""
    from click.shell_completion import CompletionItem

    from sagecp.core.parallelism.known_models import KNOWN_MODELS

    found = [CompletionItem(name) for name in sorted(KNOWN_MODELS) if name.lower().startswith(start.lower())]
    return found or [CompletionItem(start, type="file")]
