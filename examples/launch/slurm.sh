#!/usr/bin/env bash
# A run on several nodes:  sbatch examples/launch/slurm.sh my.yaml
#
# Submit it where my.yaml is. The run's output folder must be on a file system that all nodes see. The same command goes
# on with a run that was cut short, so a job that Slurm ends and requeues loses what came after the last checkpoint.
#
#SBATCH --job-name=cit-fast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#
# Change the lines above to your cluster (partition, account, GPUs of a node); one task a node starts a process for each
# GPU. LAUNCH names another file beside this one: LAUNCH=path/to/ddp.yaml sbatch examples/launch/slurm.sh my.yaml
set -euo pipefail

# Your environment, if the nodes do not have it already:
# source "$HOME/venv/bin/activate"

launch=${LAUNCH:-examples/launch/fsdp2.yaml}
nodes=${SLURM_JOB_NUM_NODES:?sbatch sets it: sbatch examples/launch/slurm.sh my.yaml}
gpus=${SLURM_GPUS_ON_NODE:?sbatch sets it where the job asks for GPUs: --gpus-per-node}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one node do not meet

# Each node's own number is known only there.
# shellcheck disable=SC2016
exec srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' accelerate \
  --config_file "$launch" \
  --num_machines "$nodes" \
  --num_processes "$((nodes * gpus))" \
  --main_process_ip "${hosts[0]}" \
  --main_process_port "$port" \
  -m cit_fast.cli run "$@"
