"""Rules of validity: the table that vLLM itself is held against, too, and what is beyond vLLM."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.memory import estimate_memory
from sagecp.core.parallelism.model_description import ExpertShape, ModelDescription, WeightFormat
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.plan_placement import place_replicas, required_node_count
from sagecp.core.parallelism.validity import fit_violation, refusals, tensor_parallel_sizes, violations
from tests.support.plan_values import LLAMA_8B, config, pool
from tests.support.plan_verdicts import Row, rows

MODEL = replace(LLAMA_8B, name="llama")
EXPERTS = ExpertShape(expert_count=60, active_expert_count=4, intermediate_size=1408, layer_count=32)
MIXTURE = replace(MODEL, name="mixture", intermediate_size=0, experts=EXPERTS)


@pytest.mark.parametrize("row", rows(), ids=str)
def test_what_vllm_refuses_is_refused_and_nothing_else(row: Row) -> None:
    reasons = refusals(row.model, row.config, row.options)
    assert bool(reasons) == row.refused, reasons
    assert row.says in "\n".join(reasons)


def test_a_refusal_names_the_numbers_and_the_sizes_that_fit() -> None:
    qwen = replace(
        MODEL, hidden_size=3584, attention_head_count=28, key_value_head_count=4, intermediate_size=18944,
        vocabulary_size=152064,
    )  # fmt: skip
    [reason] = violations(qwen, pool(8), config(tensor=8), EngineOptions())
    assert reason == (
        "vLLM refuses: 28 attention heads cannot be split over 8 GPUs; "
        "tensor parallel sizes that fit are 1, 2, 4"
    )


def test_a_prime_number_of_heads_leaves_only_one_gpu_per_stage() -> None:
    prime = replace(MODEL, attention_head_count=7, key_value_head_count=7, hidden_size=896)
    [reason] = violations(prime, pool(8), config(tensor=2), EngineOptions())
    assert reason.endswith("only tensor parallel size 1 fits; use pipeline stages or replicas")


ACROSS_NODES = (
    "unwise: tensor parallel size 8 reaches over nodes of 4 GPUs, and every layer would wait for the "
    "network; keep it within 4 and use pipeline stages or copies between nodes"
)


@pytest.mark.parametrize(
    ("model", "pool", "config", "reasons"),
    [
        pytest.param(
            MODEL,
            pool(8),
            config(tensor=0, replicas=-1),
            "impossible: the tensor parallel size is 0; the least is 1\n"
            "impossible: there are -1 replicas; the least is 1",
            id="sizes-below-one",
        ),
        pytest.param(MODEL, pool(0), config(), "impossible: there are no GPUs", id="no-gpus"),
        pytest.param(
            MODEL,
            pool(4),
            config(tensor=2, replicas=3),
            "impossible: 3 x TP2 takes 6 GPUs and there are 4; add 2 or use 2 replicas",
            id="too-many-replicas",
        ),
        pytest.param(
            MODEL,
            pool(4),
            config(tensor=8),
            "impossible: TP8 takes 8 GPUs and there are 4; add 4 or use smaller sizes\n" + ACROSS_NODES,
            id="too-large-a-replica",
        ),
        pytest.param(
            MODEL, pool(4, nodes=2), config(tensor=8), ACROSS_NODES, id="tensor-parallel-between-nodes"
        ),
        pytest.param(
            MODEL,
            pool(3, nodes=2),
            config(tensor=2, replicas=3),
            "impossible: each replica takes 2 GPUs, so 3 x TP2 takes 3 nodes of 3 GPUs and there are 2 "
            "nodes; use sizes that divide 3 or add nodes",
            id="replicas-that-leave-gaps",
        ),
        pytest.param(
            MODEL,
            pool(8, nodes=11),
            config(pipeline=33),
            "unwise: 32 layers leave some of 33 stages without a layer; use at most 32 stages",
            id="more-stages-than-layers",
        ),
        pytest.param(
            MIXTURE,
            pool(8),
            config(tensor=8, expert=4),
            "vLLM refuses: experts are spread over all tensor x data parallel GPUs, 8 x 1 here, and not "
            "over 4; use expert parallel size 8, or 1",
            id="some-of-the-gpus",
        ),
        pytest.param(
            MIXTURE,
            pool(8),
            config(tensor=8, expert=8),
            "unwise: 60 experts cannot be spread evenly over 8 GPUs, and the fullest holds up the others; "
            "expert parallel sizes that fit are 1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60",
            id="uneven-experts",
        ),
        pytest.param(
            replace(MIXTURE, weight_format=WeightFormat.INT4),
            pool(8),
            config(tensor=2),
            "unwise: experts of width 1,408 in int4 over 2 GPUs leave 704 each, no multiple of the 128 "
            "weights that share a scale: slow kernels at best; use expert parallelism, which keeps experts "
            "whole, or fewer GPUs",
            id="experts-cut-within-a-scale",
        ),
        pytest.param(
            replace(MODEL, weight_format=WeightFormat.FP8),
            pool(8, gpu="V100-32GB"),
            config(),
            "vLLM refuses: fp8 weights need a GPU of compute capability 7.5 and V100-32GB has 7.0; "
            "use 16-bit weights or newer GPUs",
            id="old-gpus",
        ),
        pytest.param(
            replace(MODEL, architecture="Gemma3nForCausalLM"),
            pool(8),
            config(pipeline=2),
            "vLLM refuses: Gemma3nForCausalLM cannot be cut into stages; use pipeline parallel size 1",
            id="no-stages",
        ),
        pytest.param(MODEL, pool(8, nodes=2), config(tensor=4, pipeline=2, data=2), "", id="valid"),
        pytest.param(MIXTURE, pool(8), config(tensor=4, expert=4), "", id="valid-mixture"),
    ],
)
def test_what_gpus_and_sense_allow(
    model: ModelDescription, pool: GpuPool, config: ParallelismConfig, reasons: str
) -> None:
    assert "\n".join(violations(model, pool, config, EngineOptions())) == reasons


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            EngineOptions(gpu_memory_utilization=1.5),
            "share of GPU memory is 1.5; it must be above 0 and at most 1",
        ),
        (EngineOptions(max_running_request_count=0), "batch of 0 requests; the least is 1"),
        (EngineOptions(max_context_token_count=0), "context of 0 tokens; the least is 1"),
        (EngineOptions(max_context_token_count=200_000), "longer than the 131,072 that llama was made for"),
        (
            EngineOptions(max_batch_token_count=100),
            "step of 100 tokens is too small for 256 running requests",
        ),
        (EngineOptions(key_value_bytes=0.5), "no KV cache of 0.5 bytes per element; use 2, or 1 for fp8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_vllm_refuses(options: EngineOptions, says: str) -> None:
    [reason] = violations(MODEL, pool(), config(), options)
    assert reason.startswith("vLLM refuses: ")
    assert says in reason


sizes = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 12, 16])


@given(
    heads=st.integers(1, 64),
    groups=st.integers(1, 8),
    width=st.integers(1, 64),
    vocabulary=st.integers(1, 4000),
)
def test_sizes_that_fit_are_the_ones_that_are_not_refused(
    heads: int, groups: int, width: int, vocabulary: int
) -> None:
    model = replace(
        MODEL,
        attention_head_count=heads * groups,
        key_value_head_count=heads,
        intermediate_size=width * 64,
        vocabulary_size=vocabulary,
    )
    fitting = tensor_parallel_sizes(model)
    assert fitting[0] == 1
    for size in range(1, heads * groups + 2):
        assert (not refusals(model, config(tensor=size), EngineOptions())) == (size in fitting)


@given(tensor=sizes, pipeline=sizes, data=sizes, replicas=st.integers(1, 5), gpus=st.integers(1, 16))
def test_every_replica_has_its_own_gpus_on_nodes_that_there_are(
    tensor: int, pipeline: int, data: int, replicas: int, gpus: int
) -> None:
    plan = config(tensor, pipeline, data, replicas=replicas)
    nodes = required_node_count(gpus, plan)
    taken: set[tuple[int, int]] = set()
    placed = list(place_replicas(pool(gpus, nodes), plan))
    for shares in placed:
        assert sum(share.gpu_count for share in shares) == plan.gpus_per_replica
        copies = [share.copy_count for share in shares]
        assert sum(copies) == plan.data_parallel_size or not any(copies)
        if not all(copies):
            # Each node must have as many ranks as the others.
            assert len({share.gpu_count for share in shares}) == 1
            assert tensor > gpus or all(share.gpu_count % tensor == 0 for share in shares)
        for share in shares:
            assert share.node_index < nodes
            assert share.gpu_indexes.stop <= gpus
            own = {(share.node_index, gpu) for gpu in share.gpu_indexes}
            assert not own & taken
            taken |= own
    assert len(placed) == replicas
    assert len({node for node, _ in taken}) == nodes


def fit_reason(
    model: ModelDescription, pool: GpuPool, plan: ParallelismConfig, options: EngineOptions
) -> str:
    estimate = estimate_memory(model, pool, plan, options)
    assert not estimate.fits
    return fit_violation(model, pool, plan, options, estimate)


LARGE = replace(
    MODEL,
    name="large",
    layer_count=80,
    hidden_size=8192,
    intermediate_size=28672,
    attention_head_count=64,
    max_context_token_count=32768,
)


@pytest.mark.parametrize(
    ("model", "pool", "plan"),
    [
        pytest.param(LARGE, pool(8), config(), id="one-of-eight"),
        pytest.param(LARGE, pool(8, nodes=4), config(tensor=2), id="two-of-many"),
        pytest.param(LARGE, pool(1), config(), id="one-gpu"),
        pytest.param(LARGE, pool(2, gpu="L4-24GB"), config(tensor=2), id="small-gpus"),
        pytest.param(MODEL, pool(1, gpu="L4-24GB"), config(), id="context-too-long"),
        pytest.param(replace(LARGE, weight_format=WeightFormat.FP8), pool(1), config(), id="fp8-already"),
    ],
)
def test_what_would_fit_does_fit(model: ModelDescription, pool: GpuPool, plan: ParallelismConfig) -> None:
    options = EngineOptions()
    reason = fit_reason(model, pool, plan, options)
    assert reason.startswith(f"impossible: {plan} does not fit: ")
    changes = reason.split("it would fit with ")[1].split(" or ")
    for change in changes:
        fitting_model, fitting_pool, fitting_plan, fitting_options = model, pool, plan, options
        if found := re.fullmatch(r"(?:(\d+) GPUs in a node and )?tensor parallel size (\d+)", change):
            fitting_plan = replace(plan, tensor_parallel_size=int(found[2]))
            fitting_pool = replace(pool, gpus_per_node_count=int(found[1] or pool.gpus_per_node_count))
        elif found := re.fullmatch(r"(?:(\d+) such nodes and )?pipeline parallel size (\d+)", change):
            fitting_plan = replace(plan, pipeline_parallel_size=int(found[2]))
            fitting_pool = replace(pool, node_count=int(found[1] or pool.node_count))
        elif found := re.fullmatch(r"(fp8|int4) weights", change):
            fitting_model = replace(model, weight_format=WeightFormat(found[1]))
        elif found := re.fullmatch(r"a context of ([\d,]+) tokens", change):
            fitting_options = replace(options, max_context_token_count=int(found[1].replace(",", "")))
        else:
            assert change == "an fp8 KV cache"
            fitting_options = replace(options, key_value_bytes=1.0)
        assert not violations(fitting_model, fitting_pool, fitting_plan, fitting_options), change
        assert estimate_memory(fitting_model, fitting_pool, fitting_plan, fitting_options).fits, change


def test_a_plan_that_lacks_memory_says_how_much_it_needs() -> None:
    reason = fit_reason(LARGE, pool(8), config(), EngineOptions())
    found = re.search(
        r"has ([\d.]+) GiB to give and would need ([\d.]+) GiB \(([\d.]+) GiB of weights\)", reason
    )
    assert found
    give, need, weights = map(float, found.groups())
    # 80 GB at 0.9, and 70 billion weights of two bytes.
    assert give == pytest.approx(pool(8).gpu.memory_gib * 0.9, abs=0.1)
    assert give < weights == pytest.approx(131, rel=0.02)
    assert need > weights


def test_a_context_that_lacks_memory_says_how_long_it_may_be() -> None:
    reason = fit_reason(MODEL, pool(1, gpu="L4-24GB"), config(), EngineOptions())
    assert re.search(
        r"only [\d,]+ tokens of KV cache fit beside the weights and a context may have 131,072", reason
    )


def test_where_nothing_helps_it_says_so() -> None:
    # One head: no tensor parallelism; one layer: no stages; already in four bits.
    stuck = replace(
        MODEL,
        layer_count=1,
        attention_head_count=1,
        key_value_head_count=1,
        hidden_size=128,
        intermediate_size=10**10,
        weight_format=WeightFormat.INT4,
        weight_group_size=0,
    )
    reason = fit_reason(stuck, pool(1), config(), EngineOptions())
    assert reason.endswith("no single change makes it fit, use larger GPUs")
