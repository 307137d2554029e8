#!/bin/bash
# What experiments/recovery/README.md reports: bash experiments/recovery/run.sh [smol_lvlm|demo_lvlm|smollm2_135m]
set -eu
cd "$(dirname "$0")/../.."
model=${1:-smol_lvlm}
data=data/recovery
text=recovery.data.path=svl/demo/text/calibration.jsonl
case $model in
  demo_lvlm) kind=demo ;;
  smol_lvlm) kind=smol ;;
  smollm2_135m) kind=prose ;;
  *) echo "smol_lvlm, demo_lvlm or smollm2_135m, not $model" >&2; exit 1 ;;
esac
sweep() {
  svl -m experiment=recovery model=$model calibration=$kind benchmark=$kind name=recovery_$model seed=${seed:-0} \
    model.dtype=float32 tracker=none "$@"
}
train() {
  sweep ratio=${ratio:-0.3} recovery.batch_size=16 recovery.learning_rate=${rate:-1e-3} "$@"
}

if [ $model = smollm2_135m ]; then
  sweep recovery=none strategy=runs,sleb,shortgpt
  train recovery=distill,lora strategy=runs,sleb recovery.steps=100 $text
else
  [ -f $data/${kind}_train.parquet ] || python scripts/make_recovery_data.py --out $data --questions 6144
  scenes=recovery.data.path=$data/${kind}_train.parquet
  sweep recovery=none
fi
if [ $model = demo_lvlm ]; then
  train recovery=lora,distill recovery.steps=100 $scenes
  train recovery=projector,interlace recovery.steps=100 $scenes
  for seed in 1 2; do
    train recovery=lora,distill strategy=shortgpt,runs compensation=refit recovery.steps=100 $scenes
  done
  seed=0
  for ratio in 0.2 0.4; do
    train recovery=projector,lora,distill,interlace compensation=refit recovery.steps=100 $scenes
  done
  ratio=0.3 rate=1e-4 train recovery=lora,distill,interlace strategy=runs compensation=refit recovery.steps=100 $scenes
elif [ $model = smol_lvlm ]; then
  train recovery=projector,lora,distill strategy=runs recovery.steps=20,100,300 $scenes
  train recovery=interlace recovery.accumulate=1 strategy=runs recovery.steps=20,100,300 $scenes
  for seed in 0 1 2; do
    train recovery=lora compensation=refit recovery.steps=20 $scenes
    rate=1e-4 train recovery=distill strategy=runs compensation=refit recovery.steps=20 $scenes
  done
  seed=0 rate=1e-4
  train recovery=lora,projector strategy=runs compensation=refit recovery.steps=20 $scenes
  train recovery=interlace recovery.accumulate=1 compensation=refit recovery.steps=20 $scenes
  train recovery=distill strategy=shortgpt,interlace compensation=refit recovery.steps=20 $scenes
  train recovery=distill strategy=runs compensation=refit recovery.steps=20 $text # text alone
  for ratio in 0.2 0.4; do
    rate=1e-3 train recovery=lora compensation=refit recovery.steps=20 $scenes
    train recovery=distill compensation=refit recovery.steps=20 $scenes
  done
  ratio=0.3 rate=1e-3
  rate=3e-4 train recovery=distill strategy=runs compensation=refit recovery.steps=300 $scenes
  seed=1 train recovery=distill strategy=runs compensation=refit recovery.steps=300 $scenes
  ratio=0.2 train recovery=distill strategy=runs compensation=none recovery.steps=300 $scenes
  train recovery=distill strategy=runs recovery.steps=100 $text # text alone
  train recovery=distill strategy=bridge selector=tis compensation=refit recovery.projector=false recovery.budget_s=900 $scenes # the goal
  train recovery=distill,lora strategy=bridge selector=tis compensation=refit recovery.projector=false recovery.steps=7,36 $scenes
fi
svl-report experiment=recovery_$model
