#!/usr/bin/env bash
# The main job, from a clean clone: environment, base model and problems, AntiSD under torchrun, report.
#   bash examples/quickstart/run.sh [key=value ...]        METHOD=grpo | sd | reverse_kl | ... for another method
set -euo pipefail
cd "$(dirname "$0")/../.."
method="${METHOD:-antisd}"
name="quickstart"; [ "$method" = antisd ] || name="quickstart-$method"
run="runs/$name"

bash tools/setup_env.sh
source "${ANTISD_VENV:-.venv}/bin/activate"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

python -m examples.quickstart.prepare runs/quickstart-inputs
if [ -d "$run" ]; then  # an earlier run is moved aside, never mixed or deleted
  aside="$run.$(date +%Y%m%d-%H%M%S)"; mv "$run" "$aside"; echo "moved the earlier $run to $aside"
fi
torchrun --standalone --nproc-per-node 2 -m megatron_antisd.train examples/quickstart/config.yaml \
  "run.name=$name" "algorithm.method=$method" "$@"
python -m megatron_antisd.reporting report "$run"
echo "report: $run/report.png and $run/report.md"
if [ -d "$run/rollouts" ]; then  # without a teacher (grpo) there is no u
  echo "every token coloured by u, for a browser: $(python -m megatron_antisd.reporting u-lens "$run")"
fi
