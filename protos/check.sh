#!/usr/bin/env bash
# Checks the protos: habits, format, compatibility with what was released to
# main, and that the committed stubs are what the protos generate. Needs buf and
# the generators on PATH (`make lint` sees to that).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "protos: lint"
buf lint

echo "protos: format"
buf format --diff --exit-code protos

# Compares with the protos of one commit, unpacked: a clone may be shallow, or
# detached, in ways that buf's own git input does not take.
compare() {
    local revision=$1
    if ! git rev-parse --quiet --verify "$revision^{commit}" >/dev/null 2>&1; then
        echo "protos: compatibility with $revision: skipped, this clone does not have it"
        return
    fi
    if [ -z "$(git ls-tree -r --name-only "$revision" -- protos | grep '\.proto$')" ]; then
        echo "protos: compatibility with $revision: skipped, it has no protos"
        return
    fi
    echo "protos: compatibility with $revision ($(git rev-parse --short "$revision"))"
    local before=$work/before
    rm -rf "$before" && mkdir "$before"
    git archive "$revision" -- protos buf.yaml | tar -x -C "$before"
    buf breaking --against "$before"
}
if git rev-parse --git-dir >/dev/null 2>&1; then
    main=main
    git rev-parse --quiet --verify main >/dev/null 2>&1 || main=origin/main
    compare "$main"
    # Where this commit is main itself, the comparison that tells is with the one before.
    if [ "$(git rev-parse --quiet --verify "$main" 2>/dev/null)" = "$(git rev-parse HEAD 2>/dev/null)" ]; then
        compare HEAD~1
    fi
else
    echo "protos: compatibility: skipped, this is no git clone"
fi

echo "protos: stubs are current"
buf generate --output "$work/generated"
if ! diff --recursive --brief --exclude=__pycache__ --exclude=__init__.py "$work/generated/sagecp/v1" sagecp/v1; then
    echo "protos: sagecp/v1 differs from what the protos generate; run: make proto" >&2
    exit 1
fi
