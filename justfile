set shell := ["bash", "-eu", "-o", "pipefail", "-c"]
# A recipe's arguments are "$@" in it, quotes and spaces as they were typed: `just test -k "one or other"`.
set positional-arguments

# Inside `uv run just …` the environment is there already, with the groups that the caller chose.
export UV_NO_SYNC := if env("UV_RUN_RECURSION_DEPTH", "0") == "0" { "0" } else { "1" }

# Show what there is.
default:
    @just --list --unsorted

# ===== Try it =====

# A spoken conversation with a barge-in: everything real, nothing to set up.
demo *ARGS:
    uv run python -m src.demo.run "$@"

# Registry, language model, LiveKit server (if there is one), worker and orchestrator; up until Ctrl-C.
up *ARGS:
    uv run python -m src.demo.stack "$@"

# Talk from a terminal: `just cli`, `just cli ws://host:8080`, `just cli --in talk.wav --out reply.wav`.
cli *ARGS:
    @case "${1:-}" in *ws://*|*wss://*) set -- --host "${1#HOST=}" "${@:2}";; esac; \
        uv run python -m src.client.cli_client "$@"

# ===== Quality =====

lint:
    uv run ruff check .
    uv run ruff format --check .

fix:
    uv run ruff check . --fix
    uv run ruff format .

typecheck:
    uv run mypy

test *ARGS:
    uv run pytest "$@"

# What looks at no clock goes two at a time, the longest first; what is heard in real time, by itself.
# What must pass before anything lands.
ci: lint
    @just _beside "just test-family sesame" "just test-family xtts" "just test tests/unit" "just test-family parler" "just typecheck"
    just test --ignore=tests/unit

# The worker alone, on the oldest Python it supports (the CosyVoice container's), in a venv of its own.
test-worker PYTHON="3.10" *ARGS:
    UV_NO_SYNC=0 UV_PROJECT_ENVIRONMENT=.venv-{{PYTHON}} uv run -p {{PYTHON}} pytest -m worker_slice "${@:2}"

# The suite on another Python; `just test-python 3.13 -k duplex` for a part of it.
test-python PYTHON *ARGS:
    UV_NO_SYNC=0 UV_PROJECT_ENVIRONMENT=.venv-{{PYTHON}} uv run -p {{PYTHON}} pytest "${@:2}"

# `just test-family xtts`, `parler`, `sesame`, `piper`; cosyvoice, spark and melo are no packages: their sources
# lie where COSYVOICE_HOME, SPARK_HOME and MELO_HOME say.
# A family's real package on small random weights, in a venv of its own. No weights, no GPU.
test-family NAME *ARGS:
    @just _in {{ if NAME == "piper" { '"" pytest tests/unit/test_piper_adapter.py' } else { NAME + " pytest tests/families/" + NAME } }} "${@:2}"

# The families that are packages: sesame, xtts and parler.
test-families:
    @just _beside "just test-family sesame" "just test-family xtts" "just test-family parler"

# Command lines, two at a time, none of which looks at a clock; one thread of mathematics each, as two would wait for
# the other's. Each one's output in one piece, also in out/logs; all run to their end, and where one failed this fails.
_beside *COMMANDS:
    @mkdir -p out/logs
    @printf '%s\0' "$@" | OMP_NUM_THREADS=1 xargs -0 -P 2 -n 1 bash -c ' \
        log="out/logs/${0//[^a-zA-Z0-9.]/-}.log"; status=0; \
        { echo "== $0"; $0 || status=$?; echo "== $0: exit status $status after $SECONDS s"; } >"$log" 2>&1; \
        cat "$log"; [ $status = 0 ]'

# A command in a family's own environment: .venv-<family>, with the family's extra and without the embedded
# models. Without a family, in the default one. UV_PYTHON picks another Python, and another venv.
_in FAMILY *COMMAND:
    {{ if FAMILY == "" { "" } else { "UV_NO_SYNC=0 UV_PROJECT_ENVIRONMENT=.venv-" + FAMILY + if env("UV_PYTHON", "") == "" { "" } else { "-" + env("UV_PYTHON") } } }} \
        uv run {{ if FAMILY == "" { "" } else { "--extra " + FAMILY + " --no-group local-models" } }} "${@:2}"

# Builds the images and starts the compose file's services with Debian's tools, no engine, and talks to them.
images-check *ARGS:
    uv run python -m scripts.images_check "$@"

# Latency, jitter, processor and memory on 1, 10 and 50 sessions; writes docs/benchmarks.md's table.
bench *ARGS:
    uv run python -m benchmarks "$@"

# Sesame's engine beside transformers' `generate`: tiny on the processor, `--size real` on a GPU.
bench-csm *ARGS:
    @just _in sesame python -m benchmarks.csm "$@"

# Is Sesame's engine right on this machine's GPU, and how fast? Needs no weights.
check-sesame-gpu *ARGS:
    @just _in sesame python scripts/check_sesame_gpu.py "$@"

# A family's adapter beside its bare package, on small random weights: `just bench-families xtts`.
bench-families NAME *ARGS:
    @just _in {{ if NAME == "piper" { '""' } else { NAME } }} python -m benchmarks.families "$@"

# Rooms and the page as their users hear them, beside a stock AgentSession on the same LiveKit server.
bench-livekit *ARGS:
    uv run python -m benchmarks.livekit "$@"

# ===== Infrastructure =====

# A registry without docker: Valkey out of a wheel, or whatever server is on the machine.
redis PORT="6379":
    uv run python -m src.common.embedded_redis --port {{PORT}}

# Builds the pinned livekit-server with Go, into a cache; `just livekit-server --run` starts it too.
livekit-server *ARGS:
    uv run python -m scripts.livekit_server "$@"

# Fetches livekit-client for the page, if what comes has the hash in the lock.
web-deps:
    uv run python scripts/web_deps.py

# A small language model behind an OpenAI-compatible endpoint.
run-llm *ARGS:
    uv run python scripts/run_llm.py "$@"

# `just voicepack xtts v2-en`, `just voicepack cosyvoice2 en-base`; `--pin` prints the hashes for the catalog.
# A voice pack's files from where the catalog says, or which file to put where.
voicepack *ARGS:
    uv run python -m scripts.voicepack fetch "$@"

# All voice packs, or one (`just voicepack-check xtts v2-en`): whole, plain, and as pinned? Loads no weights.
voicepack-check *ARGS:
    uv run python -m scripts.voicepack check "$@"

# A pickled checkpoint into a plain one: `just voicepack-convert FILE --i-trust-it`. Brings torch (.venv-xtts).
voicepack-convert FILE *ARGS:
    @just _in xtts python -m scripts.voicepack_convert "$@"

# ===== Generators =====

gen-proto:
    uv run python scripts/gen_proto.py

gen-schema:
    uv run python scripts/protocol_schema.py

# The TTS plugin for other people's LiveKit agents, as a wheel in out/dist.
build-plugin:
    uv run python scripts/build_plugin.py

# ===== Runtime =====
# A worker's arguments, by name in any order or in this one: DEFAULT (a model), PRELOAD (more, with commas between),
# PORT, DEVICE (cuda:0 if there is a GPU). `just run-tts-xtts PORT=7003 DEVICE=cpu`, `just run-tts-cosy cosyvoice2-en-base`.

# CosyVoice 2 where COSYVOICE_HOME names its sources; without them the stand-in voice speaks under its name.
run-tts-cosy *ARGS:
    @just _run-tts "${COSYVOICE_HOME:+cosyvoice}" cosyvoice2 cosyvoice2-en-base 7001 "$@"

# `just run-tts-sesame tiny-csm-random` tries the engine without weights, and speaks noise.
# Sesame CSM; without weights it says what to download and where to put it.
run-tts-sesame *ARGS:
    @just _run-tts sesame sesame sesame-csm-1b 7001 "$@"

# XTTS-v2. As Sesame's and the next three, in an environment of its own; without weights they say what to download.
run-tts-xtts *ARGS:
    @just _run-tts xtts xtts xtts-v2-en 7001 "$@"

# Parler-TTS.
run-tts-parler *ARGS:
    @just _run-tts parler parler_tts parler-tts-mini-v1 7001 "$@"

# Spark-TTS; SPARK_HOME names its sources.
run-tts-spark *ARGS:
    @just _run-tts spark spark_tts spark-tts-0.5b 7001 "$@"

# MeloTTS; MELO_HOME names its sources.
run-tts-melo *ARGS:
    @just _run-tts melo melo melo-en 7001 "$@"

# Piper, on the processor, with the embedded voice.
run-tts-piper *ARGS:
    @just _run-tts "" piper piper-en-joe 7002 DEVICE=cpu "$@"

# Without an environment of its own, a family that is not installed is spoken for by the stand-in voice.
_run-tts FAMILY ADAPTER DEFAULT PORT *ARGS:
    #!/usr/bin/env bash
    set -euo pipefail
    default={{DEFAULT}} preload="" port={{PORT}} device=""
    order=(default preload port device)
    for argument in "${@:5}"; do
        case "$argument" in
            DEFAULT=*) default=${argument#*=} ;;
            PRELOAD=*) preload=${argument#*=} ;;
            PORT=*) port=${argument#*=} ;;
            DEVICE=*) device=${argument#*=} ;;
            *=*) echo "there is no ${argument%%=*}: DEFAULT, PRELOAD, PORT and DEVICE are known" >&2; exit 2 ;;
            *) [ ${#order[@]} -gt 0 ] || { echo "one argument too many: $argument" >&2; exit 2; }
               printf -v "${order[0]}" %s "$argument"; order=("${order[@]:1}") ;;
        esac
    done
    [ -n "$device" ] || device=$(nvidia-smi -L >/dev/null 2>&1 && echo cuda:0 || echo cpu)
    worker="python -m src.tts.worker --adapter {{ADAPTER}} --port $port --device $device --default_model $default"
    [ -z "$preload" ] || worker+=" --preload_models $preload"
    [ -n "{{FAMILY}}" ] || worker+=" --allow_fallback"
    just _in "{{FAMILY}}" watchfiles --filter python "$worker" src configs

# Starts an embedded registry by itself when there is none.
run-orch *ARGS:
    uv run watchfiles --filter python "python -m src.orchestrator.server --livekit --ws {{ARGS}}" src configs

# ===== Profiling =====

spy-top PID:
    uv run py-spy top --pid {{PID}}

spy-record PID OUT="profile.svg":
    uv run py-spy record -o {{OUT}} --pid {{PID}} --duration 30

# The report is out/profiles/tts-NAME.nsys-rep; ARGS are the worker's: `just nsys-tts xtts --port 7005`.
# A worker under Nsight Systems until Ctrl-C, with our ranges in its timeline.
nsys-tts NAME *ARGS: (_needs "nsys" "Nsight Systems" "nsight-systems")
    @just _profile-tts 'nsys profile --trace=cuda,nvtx,osrt --force-overwrite=true --output=out/profiles/tts-{{NAME}}' "$@"

# Each of these kernels runs many times over, and nothing beside it: have one short sentence spoken.
# A worker under Nsight Compute: the first 200 kernels of speaking, in out/profiles/tts-NAME.ncu-rep.
ncu-tts NAME *ARGS: (_needs "ncu" "Nsight Compute" "nsight-compute")
    @just _profile-tts 'ncu --target-processes application-only --nvtx --nvtx-push-pop-scope process --nvtx-include tts.$adapter/ --launch-count 200 --force-overwrite --export out/profiles/tts-{{NAME}}' "$@"

# Where a family has no environment of its own there is no torch, and the ranges are the nvtx package's.
_profile-tts TOOL NAME *ARGS:
    @mkdir -p out/profiles
    case {{NAME}} in parler|spark) adapter={{NAME}}_tts;; cosyvoice) adapter=cosyvoice2;; *) adapter={{NAME}};; esac; \
        device=$(nvidia-smi -L >/dev/null 2>&1 && echo cuda:0 || echo cpu); \
        just _in {{ if NAME =~ '^(piper|espeak)$' { '"" --with nvtx' } else { NAME } }} env DUPLEX_NVTX=1 {{TOOL}} python -m src.tts.worker --adapter $adapter --device $device "${@:3}"

_needs TOOL WHAT PAGE:
    @command -v {{TOOL}} >/dev/null || { echo "{{TOOL}} is not there: install {{WHAT}} from https://developer.nvidia.com/{{PAGE}} (it comes with the CUDA toolkit, too), or put its folder into PATH" >&2; exit 1; }
