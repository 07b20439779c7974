#!/usr/bin/env bash
# Three steps on DAPO-Math-17k with Qwen3's tokenizer and full vocabulary, on a tiny random model. What it reads, either way:
#
#   ANTISD_DATA=DIR bash examples/dapo/run.sh [key=value ...]
#       DIR/train/dapo_math_17k.jsonl, DIR/raw/dapo_math_17k.parquet, DIR/tokenizer/qwen3/, DIR/tokenizer/qwen3_chat_template.jinja
#   bash examples/dapo/run.sh DATA_FILE TOKENIZER_DIR [CHAT_TEMPLATE] [key=value ...]
#       one .jsonl or .parquet file; a tokenizer; a Jinja file where the tokenizer holds no chat template
#
# FORMAT=jsonl or FORMAT=parquet runs one of the two files of ANTISD_DATA (both by default). OUTPUT names the folder of the results
# (runs/dapo). 1 to 4 minutes a file on 2 cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
fail() { echo "examples/dapo/run.sh: $*" >&2; exit 2; }

given=() overrides=()
for argument in "$@"; do
  if [[ "$argument" =~ ^[a-z_]+\.[a-z_.]+= ]]; then overrides+=("$argument"); else given+=("$argument"); fi
done
files=() template=""
if [ "${#given[@]}" -ge 2 ]; then
  [ "${#given[@]}" -le 3 ] || fail "got ${#given[@]} paths (${given[*]}), expected DATA_FILE TOKENIZER_DIR [CHAT_TEMPLATE]"
  files=("${given[0]}") tokenizer="${given[1]}" template="${given[2]:-}"
elif [ "${#given[@]}" = 1 ]; then
  fail "got only ${given[0]}, expected DATA_FILE TOKENIZER_DIR [CHAT_TEMPLATE]"
elif [ -n "${ANTISD_DATA:-}" ]; then
  case "${FORMAT:-both}" in jsonl | parquet | both) ;; *) fail "FORMAT=$FORMAT: expected jsonl, parquet or both" ;; esac
  [ "${FORMAT:-both}" = parquet ] || files+=("$ANTISD_DATA/train/dapo_math_17k.jsonl")
  [ "${FORMAT:-both}" = jsonl ] || files+=("$ANTISD_DATA/raw/dapo_math_17k.parquet")
  tokenizer="$ANTISD_DATA/tokenizer/qwen3" template="$ANTISD_DATA/tokenizer/qwen3_chat_template.jinja"
else
  fail "no data: set ANTISD_DATA, or give DATA_FILE TOKENIZER_DIR [CHAT_TEMPLATE]; the head of this file shows both." \
       "DAPO-Math-17k is BytedTsinghua-SIA/DAPO-Math-17k on Hugging Face, the tokenizer that of any Qwen3 model."
fi
for file in "${files[@]}" "$tokenizer/tokenizer.json" ${template:+"$template"}; do
  [ -f "$file" ] || fail "no file at $file"
done

bash tools/setup_env.sh
source "${ANTISD_VENV:-.venv}/bin/activate"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
output="${OUTPUT:-runs/dapo}"

if [ "$(cat "$output/model.txt" 2>/dev/null)" != "$tokenizer $template" ]; then  # the last thing written: the model is whole
  rm -rf "$output/model"
  python tools/make_tiny_checkpoint.py --output "$output/model" --tokenizer "$tokenizer" ${template:+--chat-template "$template"} \
    --vocab-size 151936 --layers 2 --hidden 64 --heads 4 --key-value-heads 2 --head-dim 32 --experts 4 --intermediate 64 --context 2048
  echo "$tokenizer $template" > "$output/model.txt"
fi
for file in "${files[@]}"; do
  format="${file##*.}" run="$output/${file##*.}" start=$SECONDS
  if [ -d "$run" ]; then  # an earlier run is moved aside, never mixed or deleted
    aside="$run.$(date +%Y%m%d-%H%M%S)"; mv "$run" "$aside"; echo "moved the earlier $run to $aside"
  fi
  torchrun --standalone --nproc-per-node 2 -m megatron_antisd.train examples/dapo/config.yaml "run.name=dapo-$format" \
    "run.directory=$run" "model.path=$output/model" "data.train=[$file]" "${overrides[@]}"
  echo "$file: $((SECONDS - start)) s, results in $run"
done
