import dataclasses
import json

import pytest
from peft import RoadConfig as PeftRoadConfig

from road_core import AdapterError, RoadConfig


def test_fields_and_defaults_are_pefts():
    theirs = {f.name: f for f in dataclasses.fields(PeftRoadConfig)}
    for field in dataclasses.fields(RoadConfig):
        if field.name in theirs and theirs[field.name].default is not dataclasses.MISSING:
            assert field.default == theirs[field.name].default, field.name
    ours = {field.name for field in dataclasses.fields(RoadConfig)}
    assert set(theirs) - ours == {"peft_type", "peft_version"}


def test_reads_what_peft_writes_and_peft_reads_it_back(tmp_path, recwarn):
    theirs = PeftRoadConfig(
        variant="road_2", group_size=8, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    theirs.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    config = RoadConfig.from_dict(fields)
    assert config.to_dict() == fields
    (tmp_path / "adapter_config.json").write_text(json.dumps(config.to_dict()))
    assert PeftRoadConfig.from_pretrained(tmp_path) == theirs
    assert not recwarn.list


def test_unknown_fields_are_carried():
    config = RoadConfig.from_dict({"peft_type": "ROAD", "new_in_peft": {"a": [1]}})
    assert config.extra == {"new_in_peft": {"a": [1]}}
    assert config.to_dict()["new_in_peft"] == {"a": [1]}
    assert RoadConfig.from_dict(config.to_dict()) == config


def test_collections_become_lists():
    assert RoadConfig(target_modules={"v", "q"}).target_modules == ["q", "v"]
    assert RoadConfig(target_modules=("v", "q")).target_modules == ["v", "q"]
    assert RoadConfig(modules_to_save="head").modules_to_save == ["head"]
    assert RoadConfig(target_modules=["q"], layers_to_transform=range(2)).layers_to_transform == [0, 1]


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RoadConfig().variant = "road_2"
    same = [RoadConfig(target_modules=["q"], extra={"a": [1]}) for _ in range(2)]
    assert hash(same[0]) == hash(same[1])
    assert len({*same, RoadConfig()}) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "road_3"}, "road_1, road_2, road_4, found 'road_3'"),
        ({"group_size": -2}, "even number from 2 up, found -2"),
        ({"group_size": 3}, "even number from 2 up, found 3"),
        ({"group_size": 2.0}, "expected an integer, found 2.0"),
        ({"group_size": True}, "expected an integer, found True"),
        ({"init_weights": "no"}, "init_weights"),
        ({"target_modules": 3}, "target_modules.*found 3"),
        ({"target_modules": ["q", 3]}, "target_modules"),
        ({"task_type": "CHESS"}, "task_type.*CHESS"),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, "layers_to_transform"),
        ({"target_modules": ["q"], "layers_to_transform": "1"}, "layers_to_transform"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "layers_pattern"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path"),
    ],
)
def test_checks_itself(fields, message):
    with pytest.raises(AdapterError, match=message):
        RoadConfig(**fields)


def test_another_methods_file_is_refused():
    with pytest.raises(AdapterError, match="expected 'ROAD', found 'LORA'"):
        RoadConfig.from_dict({"peft_type": "LORA"})
