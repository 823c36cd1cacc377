#!/usr/bin/env bash
# One question about a long document, with curl; the request has a ratio of its own.
#
#   examples/one_request.sh [DOCUMENT [QUESTION]]        URL=http://localhost:8000
set -euo pipefail

url=${URL:-http://localhost:8000}
document=${1:-LICENSE}
question=${2:-What must those who redistribute the work give to its recipients?}
text=$(python3 -c 'import json, sys; print(json.dumps(sys.stdin.read())[1:-1])' < "$document")

# --8<-- [start:ask]
curl -sS --fail-with-body "$url/v1/chat/completions" -H 'Content-Type: application/json' -d @- <<EOF
{
  "messages": [{"role": "user", "content": "$text\n\n$question"}],
  "max_tokens": 64, "temperature": 0,
  "vllm_xargs": {"kv_compaction_ratio": "20x"}
}
EOF
# --8<-- [end:ask]
echo
