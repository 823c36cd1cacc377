#!/usr/bin/env bash
# Budgets of a model's heads, measured on your own documents, and served with.
#
#   examples/own_budgets.sh MODEL DOCUMENTS.jsonl        FLAGS: of vllm serve
#
# A line of the file: {"context": "...", "question": "...", "answer": "..."}. Models with full
# attention in all layers; mind the time: each head is measured by itself.
set -euo pipefail

MODEL=$1
documents=$2
read -ra flags <<< "${FLAGS:-}"

# --8<-- [start:budgets]
vllm-am budgets "$MODEL" --documents "$documents" --out budgets.json
vllm serve "$MODEL" --kv-compaction attention-matching \
  --kv-compaction-config '{"budgets": "budgets.json"}' "${flags[@]}"
# --8<-- [end:budgets]
