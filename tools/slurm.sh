#!/bin/bash
# BURN on eight machines of eight GPUs. Saves and requeues itself before the time limit:
#   sbatch tools/slurm.sh recipes/burn_stage1.yaml data.micro_batch=64
#SBATCH --job-name=burn
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append
#SBATCH --requeue
set -u
newest() { find runs -name 'step-*.pt' -printf '%T@ %p\n' 2>/dev/null | sort -n | tail -n 1; }
before=$(newest)
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# USR1 goes to the launchers' Python processes; each rank finishes its step and all save the same one.
srun --kill-on-bad-exit=0 bash -c '
    head=$1; shift
    # USR1 kills torchrun (PyTorch issue 154849) where Slurm sends it to every process; the ranks set a handler of their own.
    ( trap "" USR1; exec torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --rdzv_id="$SLURM_JOB_ID" \
        --rdzv_backend=c10d --rdzv_endpoint="$head:29500" tools/train.py "$@" --resume ) &
    launcher=$!
    trap "pkill -USR1 -P $launcher" USR1
    wait $launcher; code=$?
    while kill -0 $launcher 2>/dev/null; do wait $launcher; code=$?; done
    exit $code' bash "$head" "$@"
code=$?
# torchrun turns every exit code into 1; what was stopped and not broken has left a new checkpoint behind.
if [ $code -ne 0 ] && [ "$(newest)" != "$before" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 30 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
