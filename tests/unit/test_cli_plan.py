"""`sagecp plan` as people use it: what it prints for whom, and what it refuses in which words."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.main import main
from sagecp.cli.plan.view import folded
from sagecp.cli.plan.workload_source import KNOWN_TRAFFIC, read_workload
from sagecp.core.parallelism.workload import LengthSample
from sagecp.v1 import admin_service_pb2
from tests.support.plan_models import LLAMA_8B, LLAMA_70B, PRIME_HEADS, write_checkpoint
from tests.support.sim_traces import write_trace

SLO = ("--slo", "ttft=1s,tpot=50ms")
CHAT = ("--workload", "chat", *SLO)


def plan(*arguments: str | Path) -> int:
    """Run the command in this process and return its exit code."""
    with pytest.raises(SystemExit) as exited:
        main(["plan", *map(str, arguments)])
    return int(exited.value.code or 0)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "llama-70b", LLAMA_70B)


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    assert plan(*arguments, "-o", "json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


# -- for people ----------------------------------------------------------------------------


def test_the_answer_fits_a_terminal_and_says_everything(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert plan("--model", "Llama-3.1-70B", "--gpus", "8xH100", *CHAT, "--rejected") == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert all(len(line) <= 100 for line in lines), max(lines, key=len)
    assert "\x1b" not in out
    head = next(line for line in lines if " PLAN " in line)
    assert head.split()[:4] == ["#", "PLAN", "GPUS", "IDLE"] or head.split()[:3] == ["#", "PLAN", "GPUS"]
    first = lines[lines.index(head) + 1]
    assert " 1  " in first
    assert "★" in out
    for text in (
        "70.6B parameters", "320 KiB per token", "8 x H100", "1,237 tokens in, 221 out",
        "TTFT 1.00 s and TPOT 50.0 ms for 90% of the requests", "Memory of the fullest GPU, GiB",
        "Start it with", "vllm serve meta-llama/Llama-3.1-70B --tensor", "cannot be", "does not fit",
    ):  # fmt: skip
        assert text in " ".join(out.split()), text


def test_wide_adds_memory_and_throughput(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--model", llama, "--gpus", "8xH100", *CHAT, "-o", "wide") == 0
    (head,) = [line for line in capsys.readouterr().out.splitlines() if " PLAN " in line]
    assert all(title in head for title in ("TYPE", "TOKENS/S", "WEIGHTS", "KV GIB"))


def test_kinds_of_gpus_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_checkpoint(tmp_path / "llama-8b", LLAMA_8B)
    arguments = ("--model", model, "--gpus", "2xH100", "--gpus", "4xL4", *CHAT, "--all")
    assert plan(*arguments) == 0
    out = capsys.readouterr().out
    assert " 2 H100 " in out
    assert " 4 L4 " in out
    dear = as_json(capsys, *arguments, "--price", "H100=1000,L4=0.1")["plans"]
    cheap = as_json(capsys, *arguments, "--price", "H100=0.001,L4=0.1")["plans"]
    assert dear[0]["gpu_name"] == "L4-24GB"
    assert cheap[0]["gpu_name"] == "H100-SXM-80GB"


def test_rejected_plans_of_one_reason_are_one_entry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_checkpoint(tmp_path / "prime", PRIME_HEADS)
    assert plan("--model", model, "--gpus", "8xH100", "--workload", "chat", "--rejected") == 0
    out = capsys.readouterr().out
    assert out.count("61 attention heads cannot be split") == 1
    assert "pipeline" in out


def test_the_best_plans_in_the_simulator(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", llama, "--gpus", "4xH100", *CHAT, "--rate", "2", "--check")
    assert plan(*arguments) == 0
    out = capsys.readouterr().out
    assert "The same in the simulator" in out
    simulated = as_json(capsys, *arguments)["simulated"]
    assert simulated[0]["request_rate"] == 2.0
    assert 0.0 < simulated[0]["attainment"] <= 1.0
    assert simulated[0]["simulated_ttft_s"] > 0.0


# -- for programs ----------------------------------------------------------------------------


def test_json_is_the_contracts_message(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from google.protobuf import json_format

    found = as_json(
        capsys, "--model", llama, "--gpus", "8xH100", *CHAT, "--all", "--rejected", "--nodes", "2"
    )
    message = json_format.ParseDict(found, admin_service_pb2.PlanParallelismResponse())
    assert message.considered_plan_count == len(message.plans) + len(message.rejected)
    assert message.rejected_plan_count == len(message.rejected)
    assert all(each.reasons for each in message.rejected)
    best = message.plans[0]
    assert best.rationale
    assert best.predicted_goodput > 0.0
    sizes = best.sizes
    product = sizes.tensor_parallel_size * sizes.pipeline_parallel_size * sizes.data_parallel_size
    assert best.gpu_count == product * best.replica_count
    assert best.gpu_count + best.idle_gpu_count == 16
    memory = best.memory
    parts = (
        memory.weight_bytes + memory.activation_bytes + memory.cuda_graph_bytes + memory.runtime_bytes
        + memory.key_value_bytes
    )  # fmt: skip
    assert parts == pytest.approx(memory.total_bytes, rel=1e-6)
    assert any(plan.pareto_optimal for plan in message.plans)
    assert f"vllm serve {llama}" in best.commands[0]
    assert message.model.key_value_bytes_per_token == 327_680


def test_yaml(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--model", llama, "--gpus", "8xH100", *CHAT, "-o", "yaml") == 0
    assert yaml.safe_load(capsys.readouterr().out)["plans"][0]["gpu_name"] == "H100-SXM-80GB"


def test_settings_of_the_engine_reach_plans_and_commands(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = as_json(capsys, "--model", llama, "--gpus", "8xH100", *CHAT, "--type", "tensor")
    tuned = as_json(
        capsys, "--model", llama, "--gpus", "8xH100", *CHAT, "--type", "tensor", "--kv-cache-dtype", "fp8",
        "--max-model-len", "16384", "--gpu-memory-utilization", "0.8", "--max-num-seqs", "64",
        "--max-num-batched-tokens", "4096", "--enforce-eager",
    )  # fmt: skip
    assert {each["type"] for each in tuned["plans"]} == {"PARALLELISM_TYPE_TENSOR"}
    command = tuned["plans"][0]["commands"][0]
    for option in (
        "--kv-cache-dtype fp8", "--max-model-len 16384", "--gpu-memory-utilization 0.8", "--max-num-seqs 64",
        "--max-num-batched-tokens 4096", "--enforce-eager",
    ):  # fmt: skip
        assert option in command
    assert tuned["model"]["key_value_bytes_per_token"] * 2 == plain["model"]["key_value_bytes_per_token"]
    assert tuned["plans"][0]["memory"]["total_bytes"] < plain["plans"][0]["memory"]["total_bytes"]


def test_a_context_that_had_to_be_shortened_is_in_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "--model", "Llama-3.1-8B", "--gpus", "1xL4", *CHAT)
    assert found["model"]["max_context_token_count"] == 131_072
    arguments = found["plans"][0]["engine_arguments"]
    context = int(arguments[arguments.index("--max-model-len") + 1])
    assert 8192 <= context <= int(found["plans"][0]["key_value_token_capacity"])


def test_a_known_model_by_name_alone_and_stored_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    sixteen = as_json(capsys, "--model", "llama-3.1-8b", "--gpus", "1xL4", "--workload", "chat")
    eight = as_json(
        capsys, "--model", "Llama-3.1-8B", "--gpus", "1xL4", "--workload", "chat", "--weight-format", "fp8"
    )
    assert sixteen["model"]["weight_format"] == "bfloat16"
    assert eight["model"]["weight_format"] == "fp8"
    assert int(eight["model"]["weight_bytes"]) < 0.7 * int(sixteen["model"]["weight_bytes"])


def test_gpus_that_no_table_knows(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wonder = "8xWonder-1:memory_gib=200,memory_gb_per_s=9000,dense_tflops=2500,fast_link_gpu_count=8"
    found = as_json(capsys, "--model", llama, "--gpus", wonder, *CHAT, "--price", "7.5")
    assert found["plans"][0]["gpu_name"] == "Wonder-1"
    assert found["plans"][0]["usd_per_hour"] == pytest.approx(7.5 * found["plans"][0]["gpu_count"])


def test_nodes_of_each_pool(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(
        capsys, "--model", llama, "--gpus", "4x8xH100", "--gpus", "8xA100", "--nodes", "2", *CHAT,
        "--objective", "highest_throughput", "--all",
    )["plans"]  # fmt: skip
    most = {name: max(each["gpu_count"] for each in found if each["gpu_name"] == name)
            for name in ("H100-SXM-80GB", "A100-SXM-80GB")}  # fmt: skip
    assert most == {"H100-SXM-80GB": 32, "A100-SXM-80GB": 16}


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "8xH1000"), "--gpus: 'H1000' is not a GPU that is known; did you mean H100-SXM-80GB?"),
        (("--gpus", "0xH100"), "no GPUs"),
        (("--gpus", "abc"), "for example 8xH100"),
        (("--gpus", "8xH100:colour=1"), "'colour' is not a figure of a GPU"),
        (("--gpus", "8xH100:memory_gib=much"), "'much' is not a number"),
        (("--gpus", "8xH100", "--gpus", "4xH100"), "in a pool before"),
        (("--objective", "fastest"), "'goodput_per_usd'"),
        (("--slo", "e2e=3s"), "for example ttft=1s,tpot=50ms"),
        (("--slo", "ttft=0s"), "above 0"),
        (("--slo", "ttft=soon"), "not a duration"),
        (("--price", "free"), "not a price"),
        (("--price", "A100=2"), "A100-SXM-80GB is not among the GPUs"),
        (("--plot", "plans.png"), "neither .html nor .svg"),
        (("--check", "--server", "127.0.0.1:1"), "--check simulates here"),
        (("--workload", "nowhere.csv"), "there is no file nowhere.csv"),
        (("--workload", "prompt=1000"), "prompt and output are needed"),
        (("--workload", "prompt=1000,output=many"), "'output=many'"),
        (("--workload", "prompt=10,output=10,cached=10"), "fewer of them"),
        (("--workload", "prompt=1000,output=200", "--scale", "2"), "--scale is for traces"),
        (("--rate", "1", "--scale", "2"), "the one or the other"),
        (("--workload", "prompt=300k,output=1,spread=0"), "longer than the context"),
        (("--attainment", "2"), "0<x<=1"),
    ],
)
def test_bad_options(
    arguments: tuple[str, ...], message: str, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    default = () if "--gpus" in arguments else ("--gpus", "8xH100")
    traffic = () if "--workload" in arguments else ("--workload", "chat")
    assert plan("--model", llama, *default, *traffic, *arguments) == ExitCode.INVALID
    shown = capsys.readouterr()
    assert message in shown.err
    assert not shown.out


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", None, "there is no file or folder"),
        ("config.json", "{", "config.json:1:2: not valid JSON"),
        ("config.json", "[" * 50_000, "is not JSON text"),
        ("config.json", '{"model_type": "bert"}', "--model: num_hidden_layers: is missing"),
        ("config.json", " " * 262_145, "262,145 bytes"),
        ("config.json", "[]", "is a JSON list"),
        ("tokenizer.json", "{}", "--model: "),
    ],
)
def test_bad_models(
    name: str, text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert plan("--model", path, "--gpus", "8xH100", "--workload", "chat") == ExitCode.INVALID
    assert message in capsys.readouterr().err


def test_a_folder_without_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--model", tmp_path, "--gpus", "8xH100", "--workload", "chat") == ExitCode.INVALID
    assert "has no config.json" in capsys.readouterr().err


def test_an_unknown_name_brings_names_like_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--model", "Llama-3.1-80B", "--gpus", "8xH100", "--workload", "chat") == ExitCode.INVALID
    assert "did you mean Llama-3.1-8B" in capsys.readouterr().err


def test_what_cannot_be_says_what_would(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", llama, "--gpus", "1xL4", *CHAT)
    assert plan(*arguments) == ExitCode.NOT_FOUND_OR_CONFLICT
    shown = capsys.readouterr()
    assert "It would be possible with" in " ".join(shown.out.split())
    assert plan(*arguments, "-o", "json") == ExitCode.NOT_FOUND_OR_CONFLICT
    found = json.loads(capsys.readouterr().out)
    assert found["plans"] == []
    assert found["summary"]


# -- workloads -----------------------------------------------------------------------------------


def test_a_trace_gives_lengths_rate_and_what_is_cached(tmp_path: Path) -> None:
    rows = [
        {"t_s": 0.5 * number, "prompt_tokens": 64, "output_tokens": 8, "block_hashes": [1, 2, 3 + number]}
        for number in range(4)
    ]
    trace = write_trace(tmp_path / "trace.jsonl", rows)
    found = read_workload(str(trace))
    assert found.request_rate == pytest.approx(2.0)
    assert found.arrival_variation == pytest.approx(0.0, abs=1e-9)
    # Two blocks of 16 tokens are in every prompt after the first.
    assert sorted(found.samples, key=lambda each: each.cached_token_count) == [
        LengthSample(64, 8, 0), LengthSample(64, 8, 32), LengthSample(64, 8, 32), LengthSample(64, 8, 32),
    ]  # fmt: skip
    assert any("38% of its prompt tokens" in note for note in found.notes)
    assert {each.cached_token_count for each in read_workload(str(trace), count_cached=False).samples} == {0}
    assert read_workload(str(trace), scale=3.0).request_rate == pytest.approx(6.0)
    assert read_workload(str(trace), rate=1.0).request_rate == 1.0
    assert read_workload(str(trace), rate=0.0).request_rate is None


def test_a_long_trace_is_thinned_out_evenly_and_the_same_each_time(tmp_path: Path) -> None:
    rows = [{"t_s": number, "prompt_tokens": 1 + number, "output_tokens": 1} for number in range(5000)]
    trace = write_trace(tmp_path / "trace.jsonl", rows)
    found = read_workload(str(trace))
    assert len(found.samples) == 1000
    mean = sum(each.prompt_token_count for each in found.samples) / 1000
    assert mean == pytest.approx(2500.5, rel=0.01)
    assert found == read_workload(str(trace))
    assert any("1,000 of the 5,000 requests" in note for note in found.notes)


def test_sessions_have_no_rate(tmp_path: Path) -> None:
    rows = [
        {"t_s": turn, "prompt_tokens": 64, "output_tokens": 8, "session": "s", "turn": turn, "think_s": 1}
        for turn in range(3)
    ]
    found = read_workload(str(write_trace(tmp_path / "sessions.jsonl", rows)))
    assert found.request_rate is None
    assert any("no rate" in note for note in found.notes)


@pytest.mark.parametrize("name", KNOWN_TRAFFIC)
def test_known_traffic_has_the_means_it_claims(name: str) -> None:
    samples = read_workload(name).samples
    known = KNOWN_TRAFFIC[name]
    mean_prompt = sum(each.prompt_token_count for each in samples) / len(samples)
    mean_output = sum(each.output_token_count for each in samples) / len(samples)
    assert mean_prompt == pytest.approx(known.prompt, rel=0.02)
    assert mean_output == pytest.approx(known.output, rel=0.02)


def test_lengths_with_a_unit_a_share_and_no_spread() -> None:
    found = read_workload("prompt=4k, output=100, cached=1000, spread=0", rate=2.0)
    assert found.samples == (LengthSample(4000, 100, 1000),)
    assert found.request_rate == 2.0
    assert read_workload("prompt=4k,output=100").mean_prompt_token_count == 4000.0


# -- commands ------------------------------------------------------------------------------------


SIZES = "--tensor-parallel-size 8 --pipeline-parallel-size 2 --gpu-memory-utilization 0.9"
LONG_NAME = " ".join(f"--{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" * 2)


@pytest.mark.parametrize(
    "command",
    [
        "vllm serve m --tensor-parallel-size 8",
        f"# node 1 of 2\nCUDA_VISIBLE_DEVICES=0,1 vllm serve meta/model {SIZES} --max-num-seqs 256",
        f"vllm serve '{LONG_NAME}' --tensor-parallel-size 8 --port 8000",
    ],
)
def test_a_folded_command_is_the_same_command(command: str) -> None:
    text = folded(command)
    spoken = text.partition("\n")[2] if text.startswith("#") else text
    plain = command.partition("\n")[2] if command.startswith("#") else command
    assert shlex.split(spoken.replace("\\\n", "")) == shlex.split(plain)
