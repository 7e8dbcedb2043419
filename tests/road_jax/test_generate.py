"""Decoding against Hugging Face's `generate`, and sampled tokens against their distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from _compare import named_values
from _models import small_checkpoint
from flax import linen as nn

import road_jax
from road_core import AdapterError, RoadConfig
from road_jax import _generate, models

PROMPTS = [[6, 7, 8], [9] * 11, [40, 41, 42, 43, 44, 45, 46], [150, 3]]


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen3", "gemma3_text", "phi3"])
def base(request, tmp_path_factory):
    changes = {"sliding_window": 8} if request.param in ("mistral", "gemma3_text") else {}
    return small_checkpoint(tmp_path_factory.mktemp("base"), request.param, **changes)


def hugging_face(directory, prompts, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    given = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0, **options)
    return given[:, longest:].tolist()


def test_greedy_tokens_are_hugging_faces(base):
    module, variables = models.load(base)
    expected = hugging_face(base, PROMPTS, max_new_tokens=20, eos_token_id=None)
    with jax.default_matmul_precision("highest"):
        assert road_jax.generate(module, variables, PROMPTS, max_new_tokens=20) == expected
    assert len({tuple(row) for row in expected}) == len(PROMPTS)


def test_a_row_ends_with_its_end_token(base):
    module, variables = models.load(base)
    free = road_jax.generate(module, variables, PROMPTS, max_new_tokens=12)
    ends = [free[0][4], free[1][7]]
    expected = []
    for row in free:
        at = [i for i, token in enumerate(row) if token in ends]
        expected.append(row[: at[0]] if at else row)
    assert road_jax.generate(module, variables, PROMPTS, max_new_tokens=12, eos_token_id=ends) == expected
    assert len(expected[0]) < 12
    first = road_jax.generate(module, variables, PROMPTS, max_new_tokens=12, eos_token_id=free[2][0])
    assert first[2] == []


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A module, its variables, and a road with an adapter that changes the generated tokens."""
    module, variables = models.load(small_checkpoint(tmp_path_factory.mktemp("small")))
    road = road_jax.transform(module, RoadConfig(target_modules="all-linear", group_size=8))
    adapter = road.init(jax.random.key(0), variables, jnp.zeros((1, 4), jnp.int32))

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        return jnp.asarray(named_values(name, *leaf.shape, mean=float("alpha" in name), std=0.3))

    return module, variables, road, jax.tree_util.tree_map_with_path(fill, adapter)


def test_an_adapter_speaks_as_its_merged_weights_do(small):
    module, variables, road, adapter = small
    said = road_jax.generate(road, variables, PROMPTS, adapter=adapter, max_new_tokens=10)
    assert said == road_jax.generate(module, road.merge(variables, adapter), PROMPTS, max_new_tokens=10)
    assert said != road_jax.generate(module, variables, PROMPTS, max_new_tokens=10)


@pytest.mark.no_leaks
def test_no_tracer_leaks(small):
    _, variables, road, adapter = small
    assert road_jax.generate(road, variables, [[7, 8], [9]], adapter=adapter, max_new_tokens=2)


def test_one_program_for_a_bucket(small):
    _, variables, road, adapter = small
    _generate._run.clear_cache()
    rng = jax.random.key(0)
    road_jax.generate(road, variables, PROMPTS, adapter=adapter, max_new_tokens=9)
    road_jax.generate(road, variables, [[7] * 16, [8], [9]], adapter=adapter, max_new_tokens=16, eos_token_id=[2, 3])
    half = jax.tree.map(lambda leaf: leaf / 2, adapter)
    road_jax.generate(road, variables, [[5], *PROMPTS[:3]], adapter=half, max_new_tokens=3, eos_token_id=[4, 5])
    assert _generate._run._cache_size() == 2, "one and two end tokens"
    road_jax.generate(road, variables, PROMPTS, adapter=adapter, temperature=0.5, rng=rng, max_new_tokens=9, top_k=5)
    road_jax.generate(road, variables, PROMPTS, adapter=adapter, temperature=2.0, rng=rng, max_new_tokens=9, top_p=0.4)
    assert _generate._run._cache_size() == 3


def test_what_is_drawn_follows_the_distribution(small):
    """Many equal rows with one sampled token each, against the softmax of logits that Hugging Face filtered."""
    module, variables, _, _ = small
    prompt, rows = [6, 7, 8], 2048
    logits = np.asarray(module.apply(variables, jnp.asarray([prompt], jnp.int32))[0, -1], np.float64)
    for temperature, top_k, top_p in ((1.5, None, None), (2.0, 4, None), (3.0, None, 0.6), (2.5, 6, 0.7)):
        warped = torch.from_numpy(logits / temperature)[None]
        if top_k:
            warped = transformers.TopKLogitsWarper(top_k)(None, warped)
        if top_p:
            warped = transformers.TopPLogitsWarper(top_p)(None, warped)
        expected = torch.softmax(warped, -1)[0].numpy()
        said = road_jax.generate(
            module,
            variables,
            [prompt] * rows,
            max_new_tokens=1,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            rng=jax.random.key(3),
        )
        counts = np.bincount([row[0] for row in said], minlength=160)
        assert not counts[expected == 0].any()
        deviation = np.sqrt(rows * expected * (1 - expected)) + 1e-9
        assert (np.abs(counts - rows * expected) < 5 * deviation + 1).all()


@pytest.mark.parametrize(("top_k", "top_p"), [(4, 1), (4, 0.7), (160, 0.5), (160, 0.01), (160, 1)])
def test_tokens_that_are_as_likely_are_filtered_as_in_transformers(top_k, top_p):
    logits = np.round(named_values("logits", 64, 160))
    expected = transformers.TopKLogitsWarper(top_k)(None, torch.from_numpy(logits))
    if top_p < 1:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    found = _generate._filter(jnp.asarray(logits), jnp.int32(top_k), jnp.float32(top_p))
    # Which of the tied tokens are kept isn't specified.
    np.testing.assert_array_equal(np.sort(found, -1), np.sort(expected.numpy(), -1))
    assert ((found == logits) | np.isneginf(found)).all()


@pytest.mark.parametrize("temperature", [1e-46, 1e-40, 1e-38, 1.2e-38, 1e-37, 1e-30, 1e-6])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.5}])
def test_a_temperature_near_zero_gives_the_likeliest(temperature, options, small):
    module, variables, _, _ = small
    # With larger norms, logits are in the hundreds.
    loud = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 300 if "norm" in jax.tree_util.keystr(path) else leaf, variables
    )
    options = {**options, "temperature": temperature, "rng": jax.random.key(1)}
    for weights in (variables, loud):
        expected = road_jax.generate(module, weights, PROMPTS, max_new_tokens=6)
        assert road_jax.generate(module, weights, PROMPTS, max_new_tokens=6, **options) == expected


def test_a_rows_draw_does_not_depend_on_its_neighbours(small):
    module, variables, _, _ = small
    options = {"max_new_tokens": 8, "temperature": 2.0, "rng": jax.random.key(1)}
    many = road_jax.generate(module, variables, PROMPTS, **options)
    assert road_jax.generate(module, variables, PROMPTS[:1], **options)[0] == many[0]
    other = road_jax.generate(module, variables, PROMPTS, **{**options, "rng": jax.random.key(2)})
    assert other != many


def test_no_prompts_no_answers(small):
    module, variables, road, adapter = small
    assert road_jax.generate(module, variables, []) == []
    several = road_jax.stack_adapters([adapter])
    assert road_jax.generate(road, variables, [], adapter=several, adapter_ids=[]) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "expected tokens in every prompt, found none in row 1"),
        ([[1], [160]], {}, "expected tokens from 0 to 159, found 160 in row 1"),
        ([[-1]], {}, "found -1 in row 0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: expected a whole number from 1 up, found 0"),
        ([[1]], {"temperature": -1.0}, "temperature: expected a number from 0 up"),
        ([[1]], {"temperature": 1.0}, "rng: expected a key to draw with, found none"),
        ([[1]], {"top_k": 3}, "expected a temperature above 0 beside them"),
        ([[1]], {"top_k": 0, "temperature": 1.0}, "top_k: expected a whole number from 1 up, found 0"),
        ([[1]], {"top_p": 1.5, "temperature": 1.0}, "top_p: expected a number above 0 and up to 1"),
        ([[1]], {"adapter": {}}, "expected a Road together with an adapter"),
        ([1, 2], {}, "expected a list of token ids in every prompt, found int in row 0"),
        (["one"], {}, "found str in row 0"),
        ([[1], [2.5]], {}, "found float64 in row 1"),
        ([[1]], {"max_new_tokens": 2.0}, r"max_new_tokens: expected a whole number from 1 up, found 2\.0"),
        ([[1]], {"eos_token_id": None}, "eos_token_id: expected a token or several, found None"),
        ([[1]], {"temperature": None}, "temperature: expected a number from 0 up, found None"),
        ([[1]], {"temperature": 1.0, "rng": 0}, "rng: expected a key to draw with, found int"),
        ([[1]], {"temperature": 1.0, "top_k": 2.5}, r"top_k: expected a whole number from 1 up, found 2\.5"),
        ([[1]], {"variables": None}, "variables: expected a dict with params under 'params', found NoneType"),
        ([[1]], {"model": nn.Dense(2)}, r"model: expected a decoder of road_jax\.models, found Dense"),
    ],
)
def test_bad_input_is_refused(prompts, options, message, small):
    with pytest.raises(AdapterError, match=message):
        road_jax.generate(**{"model": small[0], "variables": small[1], "prompts": prompts, **options})


@pytest.mark.parametrize("kind", [int, np.int64, np.array, jnp.int32, list, set, "mixed"])
def test_what_ends_a_row(kind, small):
    module, variables, _, _ = small
    ((end, *_),) = road_jax.generate(module, variables, [[3, 4]], max_new_tokens=1)
    several = {list: [end, 1], set: {end, 1}, "mixed": [1, np.uint64(end)]}
    given = several[kind] if kind in several else kind(end)
    assert road_jax.generate(module, variables, [[3, 4]], max_new_tokens=3, eos_token_id=given) == [[]]


def test_prompts_may_be_an_array(small):
    prompts = np.asarray([[3, 4], [5, 6]])
    said = road_jax.generate(small[0], small[1], prompts.tolist(), max_new_tokens=4)
    for array in (prompts, jnp.asarray(prompts)):
        assert road_jax.generate(small[0], small[1], array, max_new_tokens=4) == said
