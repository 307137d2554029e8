#!/bin/bash
# The matrix of experiments/recovery/README.md: bash experiments/recovery/run.sh [demo_lvlm|smol_lvlm] [SECONDS ...]
set -eu
cd "$(dirname "$0")/../.."
model=${1:-demo_lvlm}
shift || true
budgets=${*:-60 300 900}
data=data/recovery
[ -f $data/demo_train.parquet ] || python scripts/make_recovery_data.py --out $data --questions 16384
case $model in
  demo_lvlm) kind=demo ;;
  smol_lvlm) kind=smol ;;
  *) echo "demo_lvlm or smol_lvlm, not $model" >&2; exit 1 ;;
esac
about="model=$model calibration=$kind benchmark=$kind name=recovery_$model tracker=none"
svl -m experiment=recovery recovery=none $about
for seconds in $budgets; do
  svl -m experiment=recovery recovery=projector,lora,distill,interlace recovery.budget_s=$seconds \
    recovery.data.path=$data/${kind}_train.parquet recovery.batch_size=16 recovery.accumulate=1 \
    recovery.learning_rate=1e-3 $about
done
svl-report experiment=recovery_$model
