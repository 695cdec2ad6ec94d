#!/bin/sh
# How the shipped checkpoint is made, on one GPU: each stage goes on from what the ones before left in RUNS.
#
#     DATA=clips.csv WEIGHTS=folder benchmarks/train_shipped.sh RUNS [STAGE...]
#
# Stages: autoencoder denoiser compare distill export evaluate finish; without any, all of them in this order.
# WEIGHTS holds squeezenet1_0.pth. Other variables: PYTHON; SIZE (small; tiny runs on a CPU, for a try); BUDGET_S (of a
# training stage: it stops, saves and goes on at the next call); DENOISER, DISTILL (options of `medsora-train denoiser` and
# `distill`, such as --set lines of a variant); EMA (of the teacher), STEPS, GUIDANCE (of the samplers that take any number of
# steps; what compare let one choose); FINGERPRINTS (as many as leave the whole within 24 MiB); SAMPLES (of evaluate and
# compare). What the shipped one was made with stands in docs/experiments.md.
set -eu
RUNS=${1:?a folder for the runs}
shift
[ $# -gt 0 ] || set -- autoencoder denoiser compare distill export evaluate finish
PYTHON=${PYTHON:-python3}
SIZE=${SIZE:-small}
NAME=${NAME:-lung-ultrasound-small}
SQUEEZENET=${WEIGHTS:-}/squeezenet1_0.pth
SAMPLES=${SAMPLES:-1024}
HERE=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}"
BUDGET=${BUDGET_S:+--time-budget-s $BUDGET_S}

train() { "$PYTHON" -c 'from training.cli import main; main()' "$@"; }

export_checkpoint() {
    train export --autoencoder "$RUNS/autoencoder" --denoiser "$RUNS/few-steps" --name "$NAME" --out "$RUNS/$NAME" \
        --steps "${STEPS:-50}" --guidance "${GUIDANCE:-2}" "$@"
}

for stage; do
    echo "== $stage"
    case $stage in
    autoencoder)
        # shellcheck disable=SC2086  # options, to be split
        train autoencoder "autoencoder_$SIZE" --data "$DATA" --squeezenet "$SQUEEZENET" --out "$RUNS/autoencoder" \
            --resume $BUDGET ${AUTOENCODER:-}
        ;;
    denoiser)
        # shellcheck disable=SC2086
        train denoiser "denoiser_$SIZE" --data "$DATA" --autoencoder "$RUNS/autoencoder" --out "$RUNS/denoiser" \
            --set alignment.kind=none --resume $BUDGET ${DENOISER:-}
        ;;
    compare)
        train compare "$RUNS/denoiser" --data "$DATA" --autoencoder "$RUNS/autoencoder" --squeezenet "$SQUEEZENET" \
            --steps 50 --steps 20 --guidance 1 --guidance 1.5 --samples "$SAMPLES" --out "$RUNS/compare.json"
        ;;
    distill)
        # shellcheck disable=SC2086
        train distill "denoiser_${SIZE}_shortcut" --data "$DATA" --autoencoder "$RUNS/autoencoder" \
            --teacher "$RUNS/denoiser" ${EMA:+--teacher-ema $EMA} --out "$RUNS/few-steps" --resume $BUDGET ${DISTILL:-}
        ;;
    export)
        export_checkpoint
        ;;
    evaluate)
        train evaluate "$RUNS/$NAME" --data "$DATA" --squeezenet "$SQUEEZENET" --out "$RUNS/evaluation" \
            --samples "$SAMPLES"
        ;;
    finish) # with figures and fingerprints
        export_checkpoint --report "$RUNS/evaluation/report.json"
        train fingerprints "$RUNS/$NAME" --data "$DATA" --count "${FINGERPRINTS:-426}"
        ;;
    *)
        echo "stages are autoencoder denoiser compare distill export evaluate finish, got $stage" >&2
        exit 2
        ;;
    esac
done
