"""From a command line to the configuration of each engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sagecp.agent.config import Supervision
from sagecp.agent.settings import agent_configs, engine_url_of
from sagecp.core.errors import InvalidRequestError

A, B = "http://127.0.0.1:8000", "http://127.0.0.1:8001"


@pytest.mark.parametrize(
    ("command", "url"),
    [
        ("vllm serve m", "http://127.0.0.1:8000"),
        ("vllm serve m --port 9000", "http://127.0.0.1:9000"),
        ("vllm serve m --port=9000 --host 0.0.0.0", "http://127.0.0.1:9000"),
        ("vllm serve m --host 10.0.0.7 --port 1 --port 2", "http://10.0.0.7:2"),
        ("vllm serve m --host ::", "http://127.0.0.1:8000"),
        ("vllm serve m --host fd00::7", "http://[fd00::7]:8000"),
        ("python -m sglang.launch_server --model-path m", "http://127.0.0.1:30000"),
        ("vllm serve m --port", "http://127.0.0.1:"),
    ],
)
def test_where_an_engine_will_listen(command: str, url: str) -> None:
    assert engine_url_of(command.split()) == url


def test_several_engines_have_what_is_theirs_and_share_the_rest() -> None:
    left, right = agent_configs(
        [f"left={A}", B],
        advertised_urls=["http://gpu7:8000", "http://gpu7:8001"],
        model_names=["m"],
        gpus=[("0", "1"), ("2", "3")],
        common={"labels": {"rack": "r7"}},
    )
    assert (left.effective_instance_id, left.engine_url) == ("left", A)
    assert right.effective_instance_id.endswith("-8001")
    assert (left.advertised_url, right.advertised_url) == ("http://gpu7:8000", "http://gpu7:8001")
    assert (left.gpus, right.gpus) == (("0", "1"), ("2", "3"))
    assert (left.model_name, right.model_name) == ("m", "m")
    assert left.labels == right.labels == {"rack": "r7"}


def test_a_url_may_have_an_equals_sign_where_a_name_has_none() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        agent_configs([f"{A}/?a=b"], common={})
    assert "has more than scheme, host and port" in caught.value.violations[0].description


@pytest.mark.parametrize(
    ("engines", "settings", "flag", "text"),
    [
        ([], {}, "--engine", "is needed"),
        ([A, B], {"instance_id": "x"}, "--instance-id", "NAME=URL"),
        ([A, B], {"gpus": [("0",)]}, "--gpus", "once for each"),
        ([A], {"gpus": [("0",), ("1",)]}, "--gpus", "2 times for 1 engines"),
        ([A, B], {"advertised_urls": ["http://gpu7:8000"]}, "--advertise", "once for each"),
        ([A, B, A], {"model_names": ["m", "n"]}, "--model", "once for each"),
        ([f"a={A}", f"a={B}"], {}, "--engine", "'a' names two engines"),
        ([A, A], {}, "--engine", "names two engines"),
        ([f"a b={A}"], {}, "--engine", "is no id"),
        ([A, B], {"supervision": Supervision(command=("sh",))}, "--supervise", "for one engine"),
        ([], {"supervision": Supervision(command=("sh", "--port", "x"))}, "--engine", "is not a URL"),
        ([A], {"supervision": Supervision(command=())}, "--supervise", "behind --"),
        ([A], {"supervision": Supervision(command=("no-such-program",))}, "--supervise", "no such program"),
        ([A], {"supervision": Supervision(command=("sh",), stop_timeout_s=-1)}, "--stop-timeout", "is -1"),
        (
            [A],
            {"supervision": Supervision(command=("sh",), log_file=Path("/nowhere/x.log"))},
            "--engine-log",
            "cannot be a file",
        ),
    ],
)
def test_what_does_not_work_is_named(
    engines: list[str], settings: dict[str, Any], flag: str, text: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        agent_configs(engines, common={}, **settings)
    found = {violation.field: violation.description for violation in caught.value.violations}
    assert text in found[flag]


def test_every_engine_is_checked_and_a_trouble_of_all_is_told_once() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        agent_configs([A, B], common={"control_plane": "nowhere", "interval_s": 1000.0})
    assert sorted(violation.field for violation in caught.value.violations) == [
        "--control-plane",
        "--interval",
    ]
