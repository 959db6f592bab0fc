#!/usr/bin/env bash
# Starts a script in all processes of all nodes of a job: launch/nodes.sh SCRIPT [FLAGS]. It is the
# --launch of several_nodes.slurm.
# PROCESSES_PER_NODE: by default one for each GPU that the job has on a node.
set -euo pipefail
# where the processes meet: the job's first node
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# of two jobs on one node each has its own
MASTER_PORT=$((10000 + SLURM_JOB_ID % 50000))
NO_GPU="no GPU in this job: set PROCESSES_PER_NODE"
PER_NODE=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:?$NO_GPU}}
PROCESSES=$((SLURM_NNODES * PER_NODE))
export MASTER_ADDR MASTER_PORT PROCESSES

# srun itself kills its tasks at once when it gets TERM, so TERM goes to them around it: they save,
# and srun ends with them.
trap 'scancel --signal=TERM "$SLURM_JOB_ID" || true' TERM
# shellcheck disable=SC2016 # each node fills in its own rank
NODE_COMMAND='exec accelerate launch --config_file launch/several_nodes.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$PROCESSES" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MASTER_ADDR" \
    --main_process_port "$MASTER_PORT" "$@"'
srun --ntasks-per-node=1 --kill-on-bad-exit=0 bash -c "$NODE_COMMAND" node "$@" &
code=0
wait $! || code=$?
while kill -0 $! 2>/dev/null; do
    code=0
    wait $! || code=$?
done
exit "$code"
