#!/usr/bin/env bash
# Compact a document once, into a file; serve it from there, anywhere, from the first request on.
#
#   examples/save_and_preload.sh MODEL [DOCUMENT [QUESTION]]        PORT=8000, FLAGS: of vllm serve
set -euo pipefail

MODEL=$1
document=${2:-LICENSE}
question=${3:-What must those who redistribute the work give to its recipients?}
port=${PORT:-8000}
read -ra flags <<< "${FLAGS:-}"

# --8<-- [start:compact]
vllm-am compact "$document" --model "$MODEL" --ratio 20x -o contract.kv "${flags[@]}"
# --8<-- [end:compact]

# --8<-- [start:serve]
vllm serve "$MODEL" --kv-compaction attention-matching --kv-compaction-ratio 20x \
  --kv-compaction-preload contract.kv --port "$port" "${flags[@]}" &
# --8<-- [end:serve]
server=$!
trap 'kill $server; wait $server || true' EXIT
until curl -sf "http://localhost:$port/health"; do
  kill -0 $server # it lives
  sleep 1
done

URL=http://localhost:$port "$(dirname "$0")/one_request.sh" "$document" "$question"
# Loaded once, and nothing was compacted here:
curl -s "http://localhost:$port/metrics" |
  grep -E '^vllm:kv_compaction_(cache_(loads_total|hit_tokens_total|blocks_pinned)|compactions_total)'
