#!/usr/bin/env bash
# Methods x seeds x base models, and the table with intervals, whatever it shows.
#   bash examples/quickstart/compare.sh            2 base models x 3 seeds x grpo, antisd, sd, reverse_kl
#   bash examples/quickstart/compare.sh --short    1 base model  x 2 seeds x grpo, antisd, sd (about 20 minutes on 2 cores)
# METHODS, SEEDS and BASES (lists) override. Finished runs are kept and not run again, unless their base model's recipe has changed since;
# results in runs/compare/.
set -euo pipefail
cd "$(dirname "$0")/../.."
methods="${METHODS:-grpo antisd sd reverse_kl}" seeds="${SEEDS:-11 12 13}" bases="${BASES:-0 1}"
if [ "${1:-}" = --short ]; then methods="${METHODS:-grpo antisd sd}" seeds="${SEEDS:-11 12}" bases="${BASES:-0}"; fi

bash tools/setup_env.sh
source "${ANTISD_VENV:-.venv}/bin/activate"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

runs=()
for base in $bases; do
  inputs="runs/quickstart-inputs"; [ "$base" = 0 ] || inputs="runs/quickstart-inputs-$base"
  python -m examples.quickstart.prepare "$inputs" --seed "$base"
  for seed in $seeds; do
    for method in $methods; do
      run="runs/compare/base$base-$method-seed$seed"; runs+=("$run")
      if cmp -s "$inputs/recipe.txt" "$run/recipe.txt"; then echo "$run is done"; continue; fi
      if [ -f "$run/hf/config.json" ]; then  # finished, but not known to be on this base model: moved aside, never mixed or deleted
        aside="$run.$(date +%Y%m%d-%H%M%S)"; mv "$run" "$aside"; echo "moved the earlier $run to $aside"
      fi
      rm -rf "$run"
      torchrun --standalone --nproc-per-node 2 -m megatron_antisd.train examples/quickstart/config.yaml \
        "run.name=$(basename "$run")" "run.directory=$run" "run.seed=$seed" "algorithm.method=$method" "model.path=$inputs/base" \
        "checkpoint.every=null" "logging.tensorboard=false" "logging.progress=false"
      cp "$inputs/recipe.txt" "$run/recipe.txt"  # the last thing written: the run is whole, and this base model's
    done
  done
done
python -m megatron_antisd.reporting compare "${runs[@]}" --output runs/compare
