#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Predecodes a collection with Apache Beam on Dataflow; one element of the pipeline is one shard.
#
#   PROJECT=p REGION=us-central1 IMAGE=.../apollo-jax:1 \
#       launch/predecode_dataflow.sh gs://bucket/videos gs://bucket/frames [--fps 2 ...]
#
# IMAGE is a Beam SDK container with apollo-jax[beam,remote] in it, of the Python and the Beam
# version that run here (which needs apache-beam[gcp]). The command waits for the job and then
# completes the set; if it was killed meanwhile, the same command does so.
set -euo pipefail
INPUT=$1 OUTPUT=$2

# One decoder per virtual CPU: Dataflow starts a process for each, with one thread.
exec apollo-jax predecode --input "$INPUT" --output "$OUTPUT" --runner dataflow "${@:3}" -- \
    --project="$PROJECT" --region="$REGION" --temp_location="${TEMP:-$OUTPUT-temporary}" \
    --sdk_container_image="$IMAGE" --sdk_location=container \
    --number_of_worker_harness_threads=1 --experiments=use_runner_v2 \
    --machine_type="${MACHINE:-n2-standard-8}" --max_num_workers="${WORKERS:-64}" \
    --disk_size_gb=200 --job_name="predecode-$(date +%Y%m%d-%H%M%S)"
