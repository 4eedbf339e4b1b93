#!/usr/bin/env bash
# One run on several nodes with plain torchrun: start it on each node, with its own NODE_RANK. No restarts.
#   NODES=2 NODE_RANK=0 MASTER_ADDR=node-a ./examples/multi_node/static.sh RECIPE [key=value ...]     on node-a
#   NODES=2 NODE_RANK=1 MASTER_ADDR=node-a ./examples/multi_node/static.sh RECIPE [key=value ...]     on node-b
#
#   NODES        number of nodes
#   NODE_RANK    this node's number, 0 to NODES - 1
#   MASTER_ADDR  name or address of node 0
#   MASTER_PORT  a port that is free there (default: 29500)
# The other variables are in common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[[ "${NODE_RANK:-}" =~ ^[0-9]+$ ]] && [ "$NODE_RANK" -lt "$NODES" ] ||
    fail "NODE_RANK is this node's number, 0 to $((NODES - 1)); got '${NODE_RANK:-}'."
[ -n "${MASTER_ADDR:-}" ] || fail "MASTER_ADDR is not set. Give the name or address of node 0, alike on all nodes."
exec "${torchrun[@]}" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" \
    -m renio_megatron.cli.main train "$@"
