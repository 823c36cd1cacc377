#!/usr/bin/env bash
# Operators: keep a document compacted under a name, on a running server.
#
#   VLLM_PLUGINS=vllm_am vllm serve MODEL --kv-compaction attention-matching \
#     --kv-compaction-config '{"prefix_folder": "/var/lib/prefixes"}'
#   examples/named_prefixes.sh [DOCUMENT]        URL=http://localhost:8000
set -euo pipefail

url=${URL:-http://localhost:8000}
text=$(python3 -c 'import json, sys; print(json.dumps(sys.stdin.read())[1:-1])' < "${1:-LICENSE}")
prefixes=$url/v1/kv_compaction/prefixes
curl() { command curl -sS --fail-with-body "$@"; echo; }

# --8<-- [start:routes]
# Compact and keep: the first message of chats to come ("prompt" for plain completions).
curl "$prefixes" -H 'Content-Type: application/json' -d @- <<EOF
{"name": "contract", "messages": [{"role": "user", "content": "$text"}], "ratio": "20x"}
EOF
curl "$prefixes"                           # list
curl -X POST "$prefixes/contract/save"     # to prefix_folder/contract.kv
curl -X DELETE "$prefixes/contract"        # its blocks are free again
curl "$prefixes" -H 'Content-Type: application/json' -d '{"name": "contract", "load": true}'
# --8<-- [end:routes]
