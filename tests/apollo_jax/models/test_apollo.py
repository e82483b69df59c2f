# SPDX-License-Identifier: Apache-2.0
"""The whole model against the official code: embeddings, logits, loss, gradients, image, batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from apollo_jax.checkpoints.pretrained import from_pretrained
from apollo_jax.checkpoints.rules import apollo as layout
from apollo_jax.checkpoints.rules.table import parameters, slots
from apollo_jax.checkpoints.translate import Arrays, to_published
from apollo_jax.models import apollo

GRAD_FOLDERS = {  # how the official module tree spells the parts
    "vision_tower/siglip-so400m-patch14-384": "vision_tower.siglip-so400m-patch14-384.vision_tower",
    "vision_tower/internvideo2": "vision_tower.internvideo2.vision_tower",
    "mm_connector": "mm_connector",
    "llm": "llm",
}


def mean_loss(logits, labels):
    """The official loss: shifted, mean over labels that are not -100."""
    counted = labels[:, 1:] != -100
    targets = jnp.where(counted, labels[:, 1:], 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], targets)
    return jnp.mean(losses, where=counted)


@pytest.fixture(scope="module")
def debug(build):
    return build(lambda: apollo.Apollo(apollo.Config.debug(vocab_size=64), rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def forward(model, official):
    """Logits of the fixture's sample, as a function of the model."""
    tokens = jnp.asarray(official["input_ids"], jnp.int32)
    index = jnp.asarray(official["visual_index"], jnp.int32)

    def forward(model):
        visual = model.connector(model.vision_tower(official["pixels"]))
        visual = visual.reshape(1, -1, visual.shape[-1])
        return model(tokens, visual_tokens=visual, visual_index=index)

    return forward


@pytest.fixture(scope="module")
def gradients(model, official, forward):
    """{part: {published name: gradient}} of the official loss."""
    graphdef, state = nnx.split(model)
    labels = jnp.asarray(official["new_labels"], jnp.int32)

    @jax.jit
    def grad(state):
        return jax.grad(lambda s: mean_loss(forward(nnx.merge(graphdef, s)), labels))(state)

    grads = nnx.merge(graphdef, grad(state))
    names = [f"vision_tower/{name}" for name in model.config.towers]
    parts = dict(zip(names, grads.vision_tower.towers, strict=True))
    out = {}
    for name, part in (parts | {"mm_connector": grads.connector, "llm": grads.llm}).items():
        rules, leaves = layout.RULES[type(part)], parameters(part)
        table = slots(rules.table(part.config, rules.published(part.config)["config.json"]), leaves)
        tensors = to_published(Arrays(leaves), table)
        out[name] = {n: tensors.read(n) for n in tensors.stored}
    return out


def test_spliced_embeddings(model, official, close):
    visual = jnp.asarray(official["connector_out"]).reshape(1, -1, 48)
    tokens = jnp.asarray(official["input_ids"], jnp.int32)
    index = jnp.asarray(official["visual_index"], jnp.int32)
    close(model.splice(tokens, visual, index), official["inputs_embeds"])


def test_logits_and_loss(model, official, forward, run, close):
    logits = run(forward, model)
    close(logits, official["logits"])
    labels = jnp.asarray(official["new_labels"], jnp.int32)
    close(mean_loss(logits, labels), official["loss"])


def test_connector_gradients(gradients, load, close):
    expected = load("grads_connector.npz")
    assert gradients["mm_connector"].keys() == expected.keys()
    for name, gradient in gradients["mm_connector"].items():
        close(gradient, expected[name])


def test_gradient_norm_of_every_parameter(gradients, load, close):
    expected = {n: norm for n, norm in load("grad_norms.json").items() if norm is not None}
    ours = {
        f"{GRAD_FOLDERS[part]}.{name}": np.linalg.norm(gradient)
        for part, named in gradients.items()
        for name, gradient in named.items()
    }
    assert ours.keys() == expected.keys()
    close([ours[n] for n in expected], list(expected.values()))


def test_image_is_a_frame_repeated(model, load, run, close):
    z = load("image.npz")
    pixels = {
        "siglip-so400m-patch14-384": z["pixel_values_siglip"].transpose(0, 1, 3, 4, 2),
        "internvideo2": z["pixel_values_internvideo2"].transpose(0, 2, 3, 4, 1),
    }
    for frames in (slice(None), slice(1)):  # the tower repeats a single frame itself
        x = {name: jnp.asarray(p[:, frames]) for name, p in pixels.items()}
        fused = run(lambda tower, x: tower(x), model.vision_tower, x)
        close(fused, z["concat_features"])
        close(run(lambda connector, x: connector(x), model.connector, fused), z["connector_out"])


def test_padded_batch_of_two(model, official, run, close):
    tokens = jnp.asarray(official["batch_input_ids"], jnp.int32)
    index = jnp.asarray(official["batch_visual_index"], jnp.int32)
    valid = official["batch_attention_mask"] != 0

    def forward(model, pixels, segments):
        visual = model.connector(model.vision_tower(pixels)).reshape(1, -1, 48)
        rows = jnp.concatenate([visual] * 2)  # a text-only row never looks at them
        return model(tokens, visual_tokens=rows, visual_index=index, segment_ids=segments)

    logits = run(forward, model, official["pixels"], jnp.asarray(valid, jnp.int32))
    close(np.asarray(logits)[valid], official["batch_logits"][valid])
    labels = jnp.where(index >= 0, -100, jnp.asarray(official["batch_labels"], jnp.int32))
    close(mean_loss(logits, labels), official["batch_loss"])


def test_packed_rows_equal_rows_alone(debug, run):
    visual = jax.random.normal(jax.random.key(1), (1, 16, 96))
    first = jnp.array([[5, -1, -1, 7, 9]]), jnp.array([[-1, 0, 1, -1, -1]])
    second = jnp.array([[8, -1, 3]]), jnp.array([[-1, 8, -1]])

    def both(model):
        alone = [model(t, visual_tokens=visual, visual_index=i) for t, i in (first, second)]
        packed = model(
            jnp.concatenate([first[0], second[0]], axis=1),
            visual_tokens=visual,
            visual_index=jnp.concatenate([first[1], second[1]], axis=1),
            positions=jnp.array([[0, 1, 2, 3, 4, 0, 1, 2]]),
            segment_ids=jnp.array([[1, 1, 1, 1, 1, 2, 2, 2]]),
        )
        return packed, jnp.concatenate(alone, axis=1)

    packed, alone = run(both, debug)
    np.testing.assert_allclose(packed, alone, atol=1e-5)


def test_encode_clips_equals_towers_on_host_pixels(debug, run):
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 32, 32, 3), np.uint8)
    geometry = jnp.array([[0, 0, 32, 32]] * 2)
    pixels = {
        name: (frames / np.float32(255) - np.float32(t.image_mean)) / np.float32(t.image_std)
        for name, t in debug.config.towers.items()
    }
    expected = run(lambda model, x: model.connector(model.vision_tower(x)), debug, pixels)
    ours = run(lambda model, *x: model.encode_clips(*x), debug, jnp.asarray(frames), geometry)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_bfloat16_computes_in_bfloat16_and_stays_near(tiny, official, run):
    half = from_pretrained(tiny / "checkpoint", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(nnx.state(half)))
    visual = run(lambda model, x: model.connector(model.vision_tower(x)), half, official["pixels"])
    assert visual.dtype == jnp.bfloat16
    difference = np.asarray(visual, np.float32) - official["connector_out"]
    assert np.abs(difference).mean() < 0.05


def test_parts_that_do_not_fit_are_refused():
    config = apollo.Config.debug()
    narrow = dataclasses.replace(config.connector, vision_hidden_size=100)
    with pytest.raises(ValueError, match="vision_hidden_size is 100, the parts give 128"):
        dataclasses.replace(config, connector=narrow)


@pytest.mark.parametrize(
    ("config", "connector", "llm"),
    [  # parameters in millions: connectors as measured on the released models
        (apollo.Config.apollo_1p5b(), 38.36, 1543.7),
        (apollo.Config.apollo_3b(), 63.73, 3085.9),
        (apollo.Config.apollo_7b(), 177.58, 7615.6),
    ],
)
def test_released_sizes(config, connector, llm):
    model = nnx.eval_shape(lambda: apollo.Apollo(config, rngs=nnx.Rngs(0)))

    def millions(part):
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(part))) / 1e6

    assert round(millions(model.connector), 2) == connector
    assert round(millions(model.llm), 1) == llm
