#!/usr/bin/env bash
# Submit the job with the settings of cluster.env: ./submit.sh [options of `train.py fit`]
set -euo pipefail
cd "$(dirname "$0")"
set -a
source "${CLUSTER_ENV:-cluster.env}"
mkdir -p runs # sbatch does not create its output folder
exec sbatch \
  --nodes "$NODES" \
  --ntasks-per-node "$PROCESSES_PER_NODE" \
  --cpus-per-task "$CPUS_PER_PROCESS" \
  --time "$TIME" \
  --signal "SIGUSR1@$WARNING_SECONDS" \
  ${SBATCH_EXTRA:-} \
  job.sbatch "$@"
