# SPDX-License-Identifier: Apache-2.0
"""Training sees the same pictures in either layout: the same loss and gradient, bit for bit."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simplejpeg
from flax import nnx

from apollo_jax import sharding
from apollo_jax.config import TrainConfig
from apollo_jax.models import apollo, pixels, siglip
from apollo_jax.models.apollo import Apollo
from apollo_jax.sharding import MeshConfig
from apollo_jax.training import losses, step
from apollo_jax.training.rows import place
from data_pipeline import canvas
from data_pipeline.batch import Batch, empty_batch
from data_pipeline.frame_records import MediaInfo, ShardSpec, encode_segments
from data_pipeline.frame_shard_writer import FrameShardWriter
from data_pipeline.loader import Loader

B, L, C, Q, S = 8, 32, 2, 8, 40
TRAIN = TrainConfig(num_steps=1)
SIZES = [(24, 40), (40, 17), (40, 40), (19, 23)]


def small() -> apollo.Config:
    """The debug model with one tower, smaller than the canvas, and a layer of everything."""
    e = apollo.Config.debug()
    tower = siglip.Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,  # the last is not built
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    connector = replace(
        e.connector, vision_hidden_size=64, token_input_shape=(1, 4, 4), resampler_depth=1
    )
    return replace(
        e, towers={"siglip": tower}, connector=connector, llm=replace(e.llm, num_hidden_layers=1)
    )


def weights_of(config: apollo.Config) -> tuple[nnx.GraphDef, nnx.State]:
    model = nnx.eval_shape(lambda: Apollo(config, rngs=nnx.Rngs(0)))
    graphdef, shapes = nnx.split(model)
    rng = np.random.default_rng(0)
    draw = lambda s: jnp.asarray(rng.normal(0, 0.1, s.shape), s.dtype)  # noqa: E731
    return graphdef, jax.tree.map(draw, shapes)


def batch_of(layout: str) -> Batch:
    rng = np.random.default_rng(0)
    b = empty_batch(B, L, C, 4, S, layout)
    b.tokens[:], b.targets[:] = rng.integers(0, 400, (2, B, L))
    b.loss_weights[:, L // 2 :] = 1.0
    b.positions[:], b.segment_ids[:] = np.arange(L), 1
    b.visual_index[:, : C * Q] = np.arange(C * Q)
    b.clip_mask[:], b.clip_segment_ids[:] = True, 1
    for row, clip in np.ndindex(B, C):
        height, width = SIZES[(row + clip) % len(SIZES)]
        here = slice(clip, clip + 1)
        b.frame_geometry[row, clip], views = canvas.open_pictures(
            b.frames[row, here], height, width
        )
        for frame in range(4):
            picture = rng.integers(0, 256, (height, width, 3), np.uint8)
            jpeg = simplejpeg.encode_jpeg(picture, 90, colorsubsampling="420")
            canvas.draw_jpeg(jpeg, tuple(view[0, frame] for view in views))
    return b


def test_loss_and_gradient_are_the_same_in_both_layouts():
    graphdef, weights = weights_of(small())

    @jax.jit
    def loss_and_gradient(weights: nnx.State, batch: Batch):
        def loss(weights: nnx.State):
            return losses.mean(step.batch_sums(nnx.merge(graphdef, weights), batch, TRAIN))[0]

        return jax.value_and_grad(loss)(weights)

    rgb, planes = (loss_and_gradient(weights, batch_of(layout)) for layout in canvas.LAYOUTS)
    for one, other in zip(*map(jax.tree.leaves, (rgb, planes)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert any(np.any(x) for x in jax.tree.leaves(rgb[1]["vision_tower"]))


@jax.jit
def pictures(batch: Batch):
    """u8[N, F, S, S, 3], black around the pictures."""
    frames = jnp.reshape(batch.frames, (-1, *batch.frames.shape[2:]))
    geometry = jnp.reshape(batch.frame_geometry, (-1, 4))
    rgb = pixels.to_rgb(frames, geometry)
    inside = pixels.inside(geometry, rgb.shape[2])[:, None, ..., None]
    return jnp.where(inside, rgb, jnp.uint8(0))


def test_planes_are_converted_where_their_rows_are():
    mesh = sharding.make_mesh(MeshConfig())
    batches = [place(batch_of(layout), mesh) for layout in canvas.LAYOUTS]

    with jax.set_mesh(mesh):
        rgb, planes = map(pictures, batches)
        assert "all-" not in str(pictures.lower(batches[1]).compile().as_text())
    assert planes.sharding.is_equivalent_to(rgb.sharding, planes.ndim)
    np.testing.assert_array_equal(rgb, planes)


def test_the_loader_draws_the_same_pictures_in_both_layouts(experiment):
    loaders = [
        Loader(experiment({"data.layout": layout}).data, num_steps=2) for layout in canvas.LAYOUTS
    ]
    for (rgb, _), (planes, _) in zip(*loaders, strict=True):
        assert planes.frames.nbytes * 2 == rgb.frames.nbytes
        np.testing.assert_array_equal(pictures(planes), pictures(rgb))
        for name in set(Batch._fields) - {"frames"}:
            np.testing.assert_array_equal(getattr(planes, name), getattr(rgb, name), name)
    for loader in loaders:
        loader.close()


def test_shards_with_full_colours_have_no_planes(experiment, tmp_path):
    spec = ShardSpec(size=32, subsampling="444")
    writer = FrameShardWriter(tmp_path / "444", spec)
    jpeg = spec.encode(np.zeros((32, 32, 3), np.uint8))
    info = MediaInfo("grey.png", "image", 1, 1.0, 0.0, 1, 1.0, 32, 32)
    writer.add(info, encode_segments(info.id, [jpeg], [0.0], (32, 32), spec))
    writer.close()
    data = experiment({"data.layout": "yuv420"}).data
    with pytest.raises(ValueError, match=r"444 is stored with subsampling 444.*layout='rgb'"):
        Loader(replace(data, frames=(str(tmp_path / "444"),)), num_steps=1)
