#!/bin/sh
# What inference wants a GPU for, on the machine that has one: tests, tables of back ends, figures, a profile.
#
#     PYTHON=python3 benchmarks/gpu.sh [FOLDER]        (default: benchmarks/results/gpu)
#
# First what compiles runs all at once, which fills the compilers' caches on disk; then what is timed, alone.
# The tables go into medsora/ops/auto_backends.json. Every part writes as soon as it is done.
set -u
cd "$(dirname "$0")/.."
OUT=${1:-benchmarks/results/gpu}
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-150} # seconds of the first part
mkdir -p "$OUT"
STARTED=$(date +%s)
TESTS="mixer pipeline bench ssd selective_scan"
export TORCHINDUCTOR_COMPILE_THREADS="${TORCHINDUCTOR_COMPILE_THREADS:-3}" COLUMNS=160
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # the scripts find the package uninstalled too

say() { echo "[$(($(date +%s) - STARTED)) s] $*"; }
bench() { "$PYTHON" -c 'from medsora.cli import main; main()' bench "$@"; }
aside() { # NAME COMMAND...: in the background, with a log of its own
    name=$1
    shift
    (
        timeout "$LIMIT" "$@" >"$OUT/$name.log" 2>&1
        echo "exit status $?" >>"$OUT/$name.log"
    ) &
}
warm() { # NAME OPTIONS...: compile what bench will need, and tell how long a cold start takes
    name=$1
    shift
    aside "warm-$name" "$PYTHON" -c 'from medsora.cli import main; main()' bench "$@" --steps 3 --repeats 1
}

"$PYTHON" -c 'import torch, medsora.cli, medsora.pipeline; print(torch.cuda.get_device_name(), torch.__version__)' || exit 1
bench --help >/dev/null || exit 1

for test in $TESTS; do
    # a hundred tests that each compile kernels: side by side where pytest-xdist is there
    parallel=""
    [ "$test" = ssd ] && "$PYTHON" -c "import xdist" 2>/dev/null && parallel="-n 6 -p no:benchmark" # a plugin, where it is installed, that warns beside it
    aside "test-$test" "$PYTHON" -m pytest -q -p no:cacheprovider -rfE --durations 3 $parallel \
        "tests/gpu/test_${test}_cuda.py"
done
warm base-64 --preset base --batch 64
warm base-128 --preset base --batch 128
warm base-1 --preset base --batch 1
warm small --checkpoint lung-ultrasound-small --batch 64,1
warm small-euler --checkpoint lung-ultrasound-small --batch 64,1 --sampler euler --steps 30 --guidance 1.5
warm frames-16-32 --preset small --batch 8,64 --frames 16,32
warm frames-64-128 --preset small --batch 8,64 --frames 64,128
wait
say "compiled"
for test in $TESTS; do grep -hE '^(FAILED|ERROR|E  )|passed|failed|exit status' "$OUT/test-$test.log"; done
for log in "$OUT"/warm-*.log; do echo "$log"; tail -n 8 "$log"; done

bench --preset base --batch 64,128 --steps 20 --repeats 5 --json "$OUT/base-batches.json"; say base, large batches
bench --checkpoint lung-ultrasound-small --batch 64,1 --json "$OUT/small.json"; say small
bench --checkpoint lung-ultrasound-small --batch 64,1 --sampler euler --steps 30 --guidance 1.5 \
    --json "$OUT/small-euler.json"; say small, guided Euler steps
bench --preset base --batch 1 --repeats 3 --json "$OUT/base-one.json"; say base, one clip
bench --preset small --batch 8,64 --frames 16,32,64,128 --steps 20 --json "$OUT/frames.json"; say lengths
"$PYTHON" benchmarks/step_profile.py | tee "$OUT/profile.txt"; say profile
[ -n "${NO_TABLES:-}" ] && exit 0
for operator in mixer ssd selective_scan; do
    "$PYTHON" benchmarks/ssd.py --operator "$operator" --forward-only --write-table | tee "$OUT/table-$operator.txt"
done
cp medsora/ops/auto_backends.json "$OUT/"
say done
