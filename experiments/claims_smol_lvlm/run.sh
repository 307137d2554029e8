#!/usr/bin/env bash
# Everything on this page, from nothing: hours on one CPU core. Interrupted, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=experiments/claims_smol_lvlm
for experiment in claims_smol_lvlm claims_smol_lvlm_tokens; do
  svl -m experiment=$experiment model.dtype=float32 together=8
done
svl -m experiment=claims_smol_lvlm_tokens calibration=prose selector=all model.dtype=float32 together=8
svl -m experiment=ablation_bridge model=smol_lvlm calibration.seed=0,1,2 name=claims_smol_lvlm_gap model.dtype=float32 together=8
scp="model=smol_lvlm strategy=short_lvlm_paper ratio=0.2 name=claims_smol_lvlm_scp compensation.gain=-1,0.25,1 model.dtype=float32"
svl -m $scp compensation.rank=1,4,16 together=9
svl -m $scp compensation.anchor=after together=3
for experiment in claims_smol_lvlm claims_smol_lvlm_tokens claims_smol_lvlm_gap claims_smol_lvlm_scp; do
  svl-report experiment=$experiment
done
python scripts/anchor_writes.py --experiment claims_smol_lvlm --model svl:smol_lvlm \
  --samples svl/demo/data/smol_calibration.parquet --out $here
python scripts/feature_gap.py --experiment claims_smol_lvlm_gap --model svl:smol_lvlm \
  --samples svl/demo/data/smol_short.parquet --dtype float32 --out $here | tee $here/feature_gap.md
