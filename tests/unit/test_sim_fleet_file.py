"""Fleets of the simulator: files, short forms and built-in ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from sagecp.core.types import ExecutionInstance
from sagecp.core.validation import check_instance
from sagecp.sim.engine_types import EngineLimits
from sagecp.sim.fleet.fleet_file import FleetFileError, SimInstance, built_in_fleets, read_fleet
from sagecp.sim.profiles import get_profile


def test_a_short_form_counts_profiles() -> None:
    fleet = read_fleet("2x8b-h100+8b-a100 + 1x8b-h100")
    assert [instance.instance_id for instance in fleet] == [
        "8b-h100-0",
        "8b-h100-1",
        "8b-a100-0",
        "8b-h100-2",
    ]
    assert [instance.port for instance in fleet] == [8000, 8001, 8002, 8003]
    assert [instance.usd_per_hour for instance in fleet] == [6.88, 6.88, 3.43, 6.88]


def test_a_file_sets_everything(tmp_path: Path) -> None:
    text = """
        [usd_per_gpu_hour]
        l4 = 0.5

        [[instance]]
        profile = "70b-h100-tp4"
        count = 2
        name = "big"
        model = "llama-3-70b"
        usd_per_gpu_hour = 3
        gpu_name = "NVIDIA H200"
        gpu_count = 5
        gpu_memory_gb = 141
        max_running = 64
        max_batch_tokens = 4096
        kv_token_capacity = 1000
        prefix_caching = false
        slowness = 2

        [[instance]]
        profile = "8b-l4"
    """
    path = tmp_path / "fleet.toml"
    path.write_text(text, encoding="utf-8")
    fleet = read_fleet(path)
    assert fleet == read_fleet(str(path)) == read_fleet(text)
    assert fleet[1] == SimInstance(
        instance_id="big-1",
        port=8001,
        profile=get_profile("70b-h100-tp4"),
        kv_token_capacity=1000,
        max_running_requests=64,
        max_batch_tokens=4096,
        prefix_caching=False,
        slowness=2.0,
        model="llama-3-70b",
        gpu_name="NVIDIA H200",
        gpu_count=5,
        gpu_memory_gb=141,
        usd_per_gpu_hour=3.0,
    )
    assert fleet[1].engine_limits(64) == EngineLimits(1000, 64, 4096, 64, False)
    assert (fleet[2].instance_id, fleet[2].usd_per_hour, fleet[2].gpu_memory_gb) == ("8b-l4-0", 0.5, 24.0)


def test_the_control_plane_is_told_of_an_instance() -> None:
    (instance,) = read_fleet("70b-h100-tp4")
    told = instance.execution_instance()
    assert told == ExecutionInstance(
        instance_id="70b-h100-tp4-0",
        host="127.0.0.1",
        port=8000,
        model_name="sim",
        tensor_parallel_size=4,
        gpu_count=4,
        gpu_memory_gb=80.0,
        gpu_name="NVIDIA H100 80GB HBM3",
        key_value_token_capacity=430_000,
        max_concurrent_request_count=256,
        usd_per_gpu_hour=6.88,
    )


def test_prices_come_from_the_caller_under_those_of_a_file() -> None:
    given = {"h100": 2.5, "l4": 0.1}
    assert [i.usd_per_gpu_hour for i in read_fleet("8b-h100+8b-a100", usd_per_gpu_hour=given)] == [2.5, 3.43]
    text = '[usd_per_gpu_hour]\nl4 = 0.9\n[[instance]]\nprofile = "8b-l4"\n'
    assert read_fleet(text, usd_per_gpu_hour=given)[0].usd_per_gpu_hour == 0.9


@pytest.mark.parametrize("name", built_in_fleets())
def test_built_in_fleets_are_whole(name: str) -> None:
    fleet = read_fleet(name)
    assert len({instance.instance_id for instance in fleet}) == len(fleet)
    for instance in fleet:
        check_instance(instance.execution_instance())
        instance.engine_limits(512)


def test_the_built_in_fleets_are_those_that_are_described() -> None:
    assert built_in_fleets() == ("70b-8", "70b-one-slow", "70b-pessimistic", "8b-mixed")
    assert read_fleet("8b-mixed") == read_fleet("2x8b-h100+3x8b-a100+6x8b-l4")
    assert [instance.slowness for instance in read_fleet("70b-one-slow")] == [1.0] * 7 + [4.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "'' is not COUNTxPROFILE"),
        ("8x70b", "'8x70b' is not COUNTxPROFILE; write for example 8x70b-h100-tp4"),
        ("8b-l4+", "'' is not COUNTxPROFILE"),
        ("0x8b-l4", "instance 1: count must be a whole number of at least 1, not 0"),
        ("30000x8b-l4", "a fleet has at most 20000 instances"),
        ("1xinstant", "profile 'instant' has no step times to simulate"),
        ("absent.toml", "absent.toml: cannot be read: No such file"),
        ("[[instance]", "fleet: is not TOML"),
        ('[[instances]]\nprofile = "8b-l4"', "unknown setting 'instances'"),
        ("[[instance]]\ncount = 1", "instance 1: has no profile; choose one of: 8b-a100"),
        ('[[instance]]\nprofile = "9b"', "instance 1: unknown profile '9b'; choose one of"),
        ('[instance]\nprofile = "8b-l4"\n', "write [[instance]], not [instance]"),
        ("instance = []\n", "has no instances"),
        (
            '[[instance]]\nprofile = "8b-l4"\nslow = 1',
            "instance 1: unknown setting 'slow'; known are profile",
        ),
        ('[[instance]]\nprofile = "8b-l4"\nslowness = 0', "slowness must be a number above 0, not 0"),
        ('[[instance]]\nprofile = "8b-l4"\nslowness = nan', "slowness must be a number above 0, not nan"),
        ('[[instance]]\nprofile = "8b-l4"\ncount = true', "count must be a whole number"),
        (
            '[[instance]]\nprofile = "8b-l4"\ngpu_name = "B200"',
            "no price is known for the GPU 'B200'; set usd_per",
        ),
        ("[usd_per_gpu_hour]\nb200 = 9\n", "unknown kind 'b200'; known are h100, a100, l4"),
        ("[usd_per_gpu_hour]\nl4 = -1\n", "usd_per_gpu_hour.l4 must be a number of at least 0, not -1"),
        ('usd_per_gpu_hour = 3\n[[instance]]\nprofile = "8b-l4"', "must be a table of prices"),
    ],
)
def test_what_is_wrong_is_said(text: str, expected: str) -> None:
    with pytest.raises(FleetFileError) as caught:
        read_fleet(f"{text}\n" if "=" in text or "[" in text else text)
    assert expected in str(caught.value)
