#!/usr/bin/env bash
# One run on several nodes that survives a lost rank or node: the same command on each node, in any order. Where a rank
# is lost, all start again from the newest checkpoint; where a node is lost, the others wait until it, or another one,
# has given the same command.
#   NODES=2 RDZV_ENDPOINT=node-a:29400 JOB_ID=mine ./examples/multi_node/elastic.sh RECIPE [key=value ...]
#
#   NODES          number of nodes
#   RDZV_ENDPOINT  HOST:PORT where the nodes meet; HOST is one of them, and the run cannot outlive that one's launcher
#   JOB_ID         a name that no other run at this endpoint has
#   MAX_RESTARTS   how often a launcher starts its ranks again (default: 3)
#   JOIN_SECONDS   how long the nodes wait for each other (default: 600)
# The other variables are in common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[[ "${RDZV_ENDPOINT:-}" == ?*:?* ]] || fail "RDZV_ENDPOINT is HOST:PORT of a node; got '${RDZV_ENDPOINT:-}'."
[ -n "${JOB_ID:-}" ] || fail "JOB_ID is not set. Choose a name for the run, alike on all nodes."
# With its shared store, torch 2.13 never tells a node that joins later where rank 0 is; both then wait and give up.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "${torchrun[@]}" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "$JOB_ID" \
    --rdzv-conf "join_timeout=${JOIN_SECONDS:-600}" --max-restarts "${MAX_RESTARTS:-3}" \
    -m renio_megatron.cli.main train "$@"
