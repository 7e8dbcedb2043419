import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _compare import named_values

import road_jax
from road_core import AdapterError, RoadConfig


def make(dtype="float32"):
    def leaf(name, *shape):
        return jnp.asarray(named_values(name, *shape)).astype(dtype)

    return {
        "layers": {"q": {"road_theta": leaf("a", 3, 64), "road_alpha": leaf("b", 3, 64)}},
        "lm_head": {"kernel": leaf("c", 8, 5)},
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_save_and_load_give_back_the_same_bits(dtype, tmp_path):
    config = RoadConfig(target_modules=["q"], modules_to_save=["lm_head"])
    adapter = make(dtype)
    road_jax.save_adapter(tmp_path / "a", adapter, config)
    loaded, found = road_jax.load_adapter(tmp_path / "a")
    assert found == config
    assert jax.tree.structure(loaded) == jax.tree.structure(adapter)
    for old, new in zip(jax.tree.leaves(adapter), jax.tree.leaves(loaded), strict=True):
        assert isinstance(new, jax.Array)
        assert new.dtype == old.dtype
        assert np.asarray(new).tobytes() == np.asarray(old).tobytes()


def test_what_can_not_be_kept_is_refused(tmp_path):
    config = RoadConfig(target_modules=["q"], modules_to_save=["lm_head"])
    broken = make()
    broken["layers"]["q"]["road_theta"] = broken["layers"]["q"]["road_theta"].at[1, 2].set(jnp.nan)
    with pytest.raises(AdapterError, match=r"layers\.q\.road_theta: expected finite values, found 1"):
        road_jax.save_adapter(tmp_path / "a", broken, config)
    with pytest.raises(AdapterError, match="names joined by dots differ, found some alike"):
        road_jax.save_adapter(tmp_path / "a", {"a.b": make()["layers"], "a": {"b": make()["layers"]}}, config)
    with pytest.raises(AdapterError, match="config: expected RoadConfig, found InterventionConfig"):
        road_jax.save_adapter(tmp_path / "a", make(), road_jax.InterventionConfig(layers=[0]))
    with pytest.raises(AdapterError, match="adapter: expected a nested dict of arrays, found list"):
        road_jax.save_adapter(tmp_path / "a", [make()], config)
    with pytest.raises(AdapterError, match="expected modules with names to save, found a model that is one layer"):
        road_jax.save_adapter(tmp_path / "a", make()["layers"]["q"], config)
    assert list(tmp_path.iterdir()) == []
    road_jax.save_adapter(tmp_path / "a", make(), config)
    with pytest.raises(AdapterError, match="already holds something"):
        road_jax.save_adapter(tmp_path / "a", make(), config)
    road_jax.save_adapter(tmp_path / "a", make(), config, overwrite=True)
    with pytest.raises(AdapterError, match="expected a folder, found nothing"):
        road_jax.load_adapter(tmp_path / "b")
