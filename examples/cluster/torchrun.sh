#!/usr/bin/env bash
# On each node: NODE_RANK=<0, 1, …> MASTER_ADDR=<the first node> ./torchrun.sh [options of `train.py fit`]
set -euo pipefail
cd "$(dirname "$0")"
source "${CLUSTER_ENV:-cluster.env}"
exec torchrun \
  --nnodes "$NODES" \
  --nproc-per-node "$PROCESSES_PER_NODE" \
  --node-rank "${NODE_RANK:?the number of this node, from 0}" \
  --master-addr "${MASTER_ADDR:?the host name of node 0}" \
  --master-port "${MASTER_PORT:-29500}" \
  train.py fit --config config.yaml \
  --trainer.num_nodes "$NODES" \
  --trainer.devices "$PROCESSES_PER_NODE" \
  "$@"
