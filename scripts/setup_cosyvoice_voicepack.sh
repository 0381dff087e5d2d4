#!/usr/bin/env bash
# Puts CosyVoice 2's weights (5 GB) into voicepacks/cosyvoice2/en-base/, or says which file goes where.
# What came already stays, what broke off goes on. HF_ENDPOINT names another hub, PYTHON another Python.
# docs/VOICEPACK_COSYVOICE2.md has the whole structure, the recordings too.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

if [[ -n "${PYTHON:-}" ]]; then
    python=("$PYTHON")
elif command -v uv >/dev/null; then
    python=(uv run python)
else
    python=(python3)
fi
exec "${python[@]}" -m scripts.voicepack fetch cosyvoice2 en-base "$@"
