#!/usr/bin/env bash
#SBATCH --job-name=ttc
#SBATCH --array=0-7              # eight jobs that share one work directory
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120      # to this script, before the time is over
#
#   sbatch examples/pods/slurm.sh DATA WEIGHTS WORKDIR
#
# Each job takes runs that no other does. To train one run over several nodes:
#
#   sbatch --array=0 --nodes=4 --ntasks-per-node=8 examples/pods/slurm.sh \
#     DATA WEIGHTS WORKDIR --config.hosts=batch --config.batch_size=512
set -euo pipefail
# A task sees one GPU, which is number 0 to it, whatever SLURM numbers the task.
export JAX_LOCAL_DEVICE_IDS=0
data=$1 weights=$2 workdir=$3
shift 3
# SIGTERM saves the epoch and ends with code 0, which SLURM takes for done: so a
# job that was told to end asks for another turn itself.
told=
trap 'told=1; kill -TERM "$child"' TERM
srun python -m ttc_jax.main --workdir="$workdir" \
  --config="configs/compare.py:task=vtab,backbone=vit_b16,size=224,epochs=50,\
data=$data,weights=$weights" "$@" &
child=$!
wait "$child" && code=$? || code=$?
if [ -n "$told" ]; then
  wait "$child" || true
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
