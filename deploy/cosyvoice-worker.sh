#!/bin/sh
# The variables of .env.cosyvoice as the worker's flags.
set -eu
if [ ! -d "$COSYVOICE_MODEL_PATH" ]; then
  echo "no voice pack in $COSYVOICE_MODEL_PATH: docs/VOICEPACK_COSYVOICE2.md says what belongs there" >&2
  exit 1
fi
exec python -m src.tts.worker --adapter cosyvoice2 --host 0.0.0.0 --port "$WORKER_PORT" \
  --advertise_addr "${ADVERTISE_ADDR:-$(hostname):$WORKER_PORT}" --metrics_port 9464 \
  --device "$WORKER_DEVICE" --voicepacks_dir "$(dirname "$COSYVOICE_VOICEPACK_DIR")" \
  --default_model "$DEFAULT_MODEL_ID" --ttl_ms "$TTL_MS" --resident_cap "$RESIDENT_CAP"
