"""An intervention trained in Flax, saved once, and the same numbers and tokens in PyTorch."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from _compare import named_values
from _models import small_checkpoint

import road_jax
import road_torch

PROMPTS = [[9, 8, 7, 6, 10], [20, 21, 22]]
CONFIGS = [
    road_jax.InterventionConfig(layers=(0, 2), positions="first+last:2", group_size=64, subspace=(0, 0.5)),
    road_jax.InterventionConfig(layers=(0, 1, 2), positions="all", group_size=32, variant="road_4"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("base"))


def test_flax_and_pytorch_agree(base, tmp_path):
    module, variables = road_jax.models.load(base)
    peer = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    model = road_torch.InterventionModel(peer)
    longest = max(map(len, PROMPTS))
    ids = np.array([[0] * (longest - len(p)) + p for p in PROMPTS], np.int32)
    mask = (ids != 0).astype(np.int32)
    inputs = {"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.from_numpy(mask).long()}
    flax_logits, flax_tokens = [], []
    with jax.default_matmul_precision("highest"):
        plain = np.asarray(module.apply(variables, ids, mask))
        for row, config in enumerate(CONFIGS):
            intervened = road_jax.intervene(module, config)

            def fill(path, leaf, config=config):
                name = f"{config.positions} {jax.tree_util.keystr(path)}"
                return jnp.asarray(named_values(name, *leaf.shape, mean=float("alpha" in name), std=0.3))

            tree = jax.tree_util.tree_map_with_path(fill, intervened.init(ids))
            road_jax.save_intervention(tmp_path / str(row), tree, config)
            model.load_adapter(tmp_path / str(row), str(row))
            logits = np.asarray(jax.jit(intervened.apply)(variables, tree, ids, attention_mask=mask))
            flax_logits.append(logits[row])
            flax_tokens += road_jax.generate(intervened, variables, [PROMPTS[row]], adapter=tree, max_new_tokens=8)
            model.set_adapter(str(row))
            with torch.no_grad():
                np.testing.assert_allclose(model(**inputs).logits.numpy()[mask > 0], logits[mask > 0], atol=1e-4)
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=["0", "1"]).logits.numpy()
    for row in range(2):
        real = mask[row] > 0
        np.testing.assert_allclose(mixed[row][real], flax_logits[row][real], atol=1e-4)
        assert np.abs(plain[row][real] - flax_logits[row][real]).max() > 1e-2
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = model.generate(**inputs, adapter_names=["0", "1"], **options)
    assert tokens[:, longest:].tolist() == flax_tokens


def test_the_pages_code_runs(base, tmp_path, monkeypatch):
    page = Path(__file__).parents[2].joinpath("docs", "interventions.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(code) == 5
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("checkpoint").symlink_to(base)
    names: dict = {}
    # The page uses an optax optimiser, which needs dtype promotion.
    with jax.numpy_dtype_promotion("standard"):
        for block in code:
            exec(compile(block, "docs/interventions.md", "exec"), names)
    assert names["tokens"].shape == (2, 7)
    np.testing.assert_allclose(names["y"][1], names["model"](names["x"])[1], rtol=1e-6)
    optimiser, intervention = names["optimiser"], names["intervention"]
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimiser.update(jax.tree.map(jnp.ones_like, intervention), optimiser.init(intervention))
    for layer in updates["layers"].values():
        assert np.abs(layer["road_theta"]).min() > 1e-3
        np.testing.assert_array_equal(layer["road_alpha"], 0)
