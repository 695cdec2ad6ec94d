#!/bin/sh
# From a folder of videos to a model of one's own labels and a clip of it: prepare, two trainings, export, generate.
#
#   sh examples/train_on_own_videos.sh VIDEOS OUT        # VIDEOS/<label>/*.mp4; an hour or more on one GPU
#   TINY=1 sh examples/train_on_own_videos.sh VIDEOS OUT # a minute on a CPU: to see that everything works, not to look at
#
# Run again, it goes on where it was: what is prepared stays, and trainings resume. SQUEEZENET and RAFT are paths of weights
# that make the result better (docs/training.md tells which); without them it trains on what is left.
set -eu

videos=${1:?folder of videos, in it a folder for each label}
out=${2:?folder for all that is made}

if [ -n "${TINY:-}" ]; then
    preset=tiny size=32 short="--set loop.steps=${STEPS:-20} --set loop.checkpoint_every=10 --device cpu"
else
    preset=small size=128 short=
fi
perceptual="--set autoencoder_loss.perceptual=0"
[ -z "${SQUEEZENET:-}" ] || perceptual="--squeezenet $SQUEEZENET"
alignment="--set alignment.kind=none"
[ -z "${RAFT:-}" ] || alignment="--raft $RAFT"

step() { printf '\n== %s\n' "$*"; }
resume() { [ ! -d "$1/checkpoints" ] || echo --resume; }

step "prepare: cut at cuts, checked, divided into train and test"
[ -d "$out/cache" ] || # it has this name only when it is whole
    medsora-train prepare "$videos" --out "$out/cache" --height $size --width $size

# Options are several words each, none of which has a space.
# shellcheck disable=SC2046,SC2086
{
    step "autoencoder: from pixels to latents and back"
    medsora-train autoencoder autoencoder_$preset --data "$out/cache" --out "$out/autoencoder" \
        $perceptual $short $(resume "$out/autoencoder")

    step "denoiser: clips of a label out of noise"
    medsora-train denoiser denoiser_$preset --data "$out/cache" --autoencoder "$out/autoencoder" --out "$out/denoiser" \
        $alignment $short $(resume "$out/denoiser")
}

step "export: one directory with weights, labels, limits and licences"
[ -d "$out/mine" ] ||
    medsora-train export --autoencoder "$out/autoencoder" --denoiser "$out/denoiser" --name mine --out "$out/mine"

step "a clip of the first label"
label=$(basename "$(find "$videos" -mindepth 1 -maxdepth 1 -type d | sort | head -n 1)")
medsora generate --checkpoint "$out/mine" --label "$label" --seed 1 --force -o "$out/clip.mp4"
echo "Serve it: MEDSORA_CHECKPOINTS=$out/mine medsora-server serve"
