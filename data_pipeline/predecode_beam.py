# SPDX-License-Identifier: Apache-2.0
"""The shards of a plan as an Apache Beam pipeline: one element is one shard (extra `beam`).

Workers read the plan from the output and write their shards into it, so all of them must reach it
under the same name, and the input too: URLs (gs://, s3://), or folders on a shared disk (NFS,
Filestore, Lustre). No pixels travel through the engine. A shard that is tried again, or by two
workers at once, comes out the same.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

from data_pipeline.predecode_plan import PLAN, Plan, PredecodeConfig, open_plan

# As Beam calls them. The direct runner is named by its class: Beam's own choice for "DirectRunner"
# would first look for a binary of another runner on the net.
_RUNNERS = {"dataflow": "DataflowRunner", "flink": "FlinkRunner", "spark": "SparkRunner"}


def run_beam(plan: Plan, config: PredecodeConfig, runner: str, options: Sequence[str]) -> None:
    """Makes all unfinished shards with a `runner` and its command-line `options`; waits for them.

    The direct runner has `config.workers` processes, each with one decoder. Elsewhere, where the
    engine decides how many processes there are, `config.workers` is how many decoders each has.
    """
    try:
        import apache_beam as beam  # pyright: ignore[reportMissingImports]
        from apache_beam.options import (  # pyright: ignore[reportMissingImports]
            pipeline_options,
        )
    except ImportError as error:
        raise ValueError(
            f"--runner {runner} needs Apache Beam: pip install 'apollo-jax[beam]'"
        ) from error
    options = list(options)
    if runner == "direct":
        from apache_beam.runners.portability.fn_api_runner import fn_runner  # pyright: ignore

        engine = fn_runner.FnApiRunner()
        processes = config.workers or os.cpu_count() or 1
        if not any(option.startswith("--direct_running_mode") for option in options):
            options += ["--direct_running_mode=multi_processing"]
        if not any(option.startswith("--direct_num_workers") for option in options):
            options += [f"--direct_num_workers={processes}"]
        config = replace(config, workers=1)
    else:
        engine = _RUNNERS[runner]
        config = replace(config, workers=config.workers or 1)
    settings = pipeline_options.PipelineOptions(options)
    with beam.Pipeline(engine, settings) as pipeline:
        _ = (
            pipeline
            | "Shards" >> beam.Create(plan.unfinished())
            | beam.Reshuffle()
            | "Make" >> beam.Map(make_one, _address(plan), plan.digest, config)
        )


def make_one(shard: int, output: str, digest: str, config: PredecodeConfig) -> int:
    """Makes one shard on a worker. FileNotFoundError if it does not see the job's folder."""
    from data_pipeline.predecode_shards import make_shards

    try:
        plan = open_plan(output)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"this worker sees no {output}/{PLAN}: the output must be a URL, or a folder that all "
            "workers share, mounted at the same place"
        ) from None
    if plan.digest != digest:
        raise ValueError(f"{output}/{PLAN} on this worker is another plan than the job's")
    make_shards(plan, [shard], config)
    return shard


def _address(plan: Plan) -> str:
    return plan.name if isinstance(plan.name, str) else str(plan.name.absolute())
