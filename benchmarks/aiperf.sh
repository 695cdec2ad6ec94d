#!/bin/sh
# NVIDIA's aiperf, --endpoint-type video_generation, against a server on this machine with the untrained tiny model.
# It asks for videos, polls, downloads them, and must count no error. aiperf is far larger than the server, so it has an
# environment of its own: AIPERF names one that is there already, else one is made in benchmarks/results.
# Variables: REQUESTS (20), CONCURRENCY (4), PORT (8765), AIPERF.
set -eu
cd "$(dirname "$0")/.."

RESULTS=$PWD/benchmarks/results
PORT=${PORT:-8765}
AIPERF=${AIPERF:-$RESULTS/aiperf-venv}
FOLDER=$(mktemp -d)
SERVER=

stop() {
    [ -z "$SERVER" ] || { kill "$SERVER"; wait "$SERVER" || true; }
    rm -rf "$FOLDER"
}
trap stop EXIT INT TERM

mkdir -p "$RESULTS"
if [ ! -x "$AIPERF/bin/aiperf" ]; then
    python3 -m venv "$AIPERF"
    "$AIPERF/bin/pip" install --quiet 'aiperf>=0.13,<1'
fi

# aiperf counts tokens of prompts: a tokenizer of their words, so that none is downloaded
printf '{"text": "covid lung"}\n{"text": "regular lung"}\n' > "$FOLDER/prompts.jsonl"
"$AIPERF/bin/python" - "$FOLDER/tokenizer" <<'PYTHON'
import sys

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = ["[UNK]", "[BOS]", "[EOS]", "covid", "regular", "lung"]
tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
names = {"unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(sys.argv[1])
PYTHON

.venv/bin/python -c "from medsora.checkpoint import write_tiny_checkpoint; write_tiny_checkpoint('$FOLDER/tiny')"
MEDSORA_CHECKPOINTS=$FOLDER/tiny MEDSORA_MIN_FREE_BYTES=0 OMP_NUM_THREADS=1 \
    .venv/bin/medsora-server serve --port "$PORT" --data-dir "$FOLDER/data" > "$FOLDER/server.log" 2>&1 &
SERVER=$!
seconds=0
until grep -q 'is ready' "$FOLDER/server.log"; do
    seconds=$((seconds + 1))
    if [ $seconds -gt 120 ] || ! kill -0 "$SERVER" 2> /dev/null; then
        cat "$FOLDER/server.log" >&2
        exit 1
    fi
    sleep 1
done

"$AIPERF/bin/aiperf" profile --model tiny --url "http://127.0.0.1:$PORT" --endpoint-type video_generation \
    --input-file "$FOLDER/prompts.jsonl" --custom-dataset-type single_turn --tokenizer "$FOLDER/tokenizer" \
    --request-count "${REQUESTS:-20}" --concurrency "${CONCURRENCY:-4}" \
    --extra-inputs seconds:2 --extra-inputs size:32x32 --download-video-content \
    --ui none --output-artifact-dir "$RESULTS/aiperf"

"$AIPERF/bin/python" - "$RESULTS/aiperf/profile_export_aiperf.json" "${REQUESTS:-20}" <<'PYTHON'
import json
import sys

result = json.load(open(sys.argv[1]))
errors = result.get("error_request_count") or {"avg": 0}
done = result["request_count"]["avg"]
print(f"{done:g} of {sys.argv[2]} requests done, {errors['avg']:g} errors")
sys.exit(errors["avg"] != 0 or done != float(sys.argv[2]))
PYTHON
