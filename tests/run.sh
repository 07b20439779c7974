#!/usr/bin/env bash
# From a clean clone: the environment, then the tests.
#
#   bash tests/run.sh                       all but the slow ones
#   bash tests/run.sh --slow                those too
#   bash tests/run.sh tests/algorithm -x    anything else is handed to pytest
#
# Environment variables, all optional:
#   ANTISD_TEST_WORKERS  test processes at once (default 2; 1 runs in this process). Tests of one file stay together.
#   ANTISD_TEST_TIMEOUT  seconds that one test may take (default 300)
#   ANTISD_DATA          a folder of real problems and tokenizers; the tests that need it are skipped without
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"

select=(-m "not slow")
rest=()
for argument in "$@"; do
  if [ "$argument" = --slow ]; then select=(); else rest+=("$argument"); fi
done
workers=()
if [ "${ANTISD_TEST_WORKERS:-2}" -gt 1 ]; then workers=(-n "${ANTISD_TEST_WORKERS:-2}" --dist loadfile); fi

bash tools/setup_env.sh
export OMP_NUM_THREADS=1
exec "${ANTISD_VENV:-$ROOT/.venv}/bin/python" -m pytest -rs --durations=10 --timeout "${ANTISD_TEST_TIMEOUT:-300}" \
  "${select[@]}" "${workers[@]}" "${rest[@]}"
