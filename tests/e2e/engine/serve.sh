#!/usr/bin/env bash
# serve.sh PORT [vllm serve options]
#
# Serves the tiny model as "tiny" on 127.0.0.1:PORT, installing first what is
# missing. Stays in the foreground and becomes the server. An option given on
# the command line wins over the same one below.
#
#   SAGECP_ENGINE_MODEL     another model's folder  [the tiny model]
#   SAGECP_ENGINE_KV_BYTES  size of the KV cache  [64M, which holds 65,536 tokens]
set -euo pipefail
if [ $# -lt 1 ]; then
    echo "usage: serve.sh PORT [vllm serve options]" >&2
    exit 2
fi
port=$1
shift
venv=$("$(dirname "${BASH_SOURCE[0]}")/install.sh")

# Nothing is fetched and nothing reported.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export VLLM_CACHE_ROOT=${venv%/*}/cache
# Several servers share the cores: one thread each, bound to no core.
export OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
# Otherwise the first request for log probabilities waits 18 s for a C++ compiler.
export TORCHDYNAMO_DISABLE=1
# With the "uni" executor: the model runs inside the engine process, as on one GPU.
export VLLM_ENABLE_V1_MULTIPROCESSING=0
export PYTHONHASHSEED=0
# Would silently win over --kv-cache-memory-bytes.
unset VLLM_CPU_KVCACHE_SPACE

# Chunked prefill is off: on a CPU, a seeded request whose prefill is split kills the engine.
exec "$venv/bin/vllm" serve "${SAGECP_ENGINE_MODEL:-$venv/model}" \
    --host 127.0.0.1 --port "$port" \
    --served-model-name tiny \
    --dtype float32 \
    --enforce-eager \
    --distributed-executor-backend uni \
    --kv-cache-memory-bytes "${SAGECP_ENGINE_KV_BYTES:-64M}" \
    --no-enable-chunked-prefill --max-num-batched-tokens 8192 \
    "$@"
