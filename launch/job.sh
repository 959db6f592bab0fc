#!/usr/bin/env bash
# What the jobs of this folder share: source it after the #SBATCH lines, then
# `job <arguments of run.py>`.
# - Two minutes before its time limit a job gets USR1 (#SBATCH --signal): the training saves its
#   state, the job is queued again and goes on from there.
# - Preempted, requeued or cancelled by Slurm it gets TERM: the training saves its state, and Slurm
#   decides what becomes of the job.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?this is a Slurm job: submit it with sbatch}"
if [ ! -f run.py ] || [ ! -x .venv/bin/python ]; then
    echo "$PWD is not the repository, or not set up: run \`bash setup.sh\` there, then sbatch." >&2
    exit 1
fi
PATH="$PWD/.venv/bin:$PATH"
# seconds that a launcher gives its processes to save; by default 30
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"

job() {
    local again="" code=0 run
    python run.py "$@" &
    run=$!
    trap 'again=yes; kill -TERM "$run" 2>/dev/null || true' USR1
    trap 'kill -TERM "$run" 2>/dev/null || true' TERM
    wait "$run" || code=$?
    while kill -0 "$run" 2>/dev/null; do # a signal has ended the wait, and the run is saving
        code=0
        wait "$run" || code=$?
    done
    if [ -n "$again" ] && [ "$code" -ne 0 ]; then
        echo "job $SLURM_JOB_ID was stopped before its time limit and is queued again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$code"
}
