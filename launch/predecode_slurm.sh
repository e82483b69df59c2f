#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Predecodes a collection as a SLURM array; the output folder (or URL) is all that tasks share.
#
#   sbatch launch/predecode_slurm.sh INPUT OUTPUT [--fps 2 --size 384 ...]
#   sbatch --array=0-255 launch/predecode_slurm.sh INPUT OUTPUT ...
#
# `apollo-jax predecode ... --plan-only` says how many shards there are: more tasks than that are of
# no use. The task that makes the last shard completes the set. Should tasks have failed or been
# preempted, submit the same again: what is made stays, whatever the new number of tasks.

#SBATCH --job-name=predecode
#SBATCH --array=0-31
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=predecode-%A-%a.log
set -euo pipefail

# What is decoded from a URL or a tar lies here for as long as that takes; so do the records of
# long videos.
export TMPDIR="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}"

exec apollo-jax predecode --input "$1" --output "$2" --task auto \
    --workers "${SLURM_CPUS_PER_TASK:-0}" "${@:3}"
