"""After any sequence of calls, the model's output is road_core's reference for the active adapters."""

import tempfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import torch
from _compare import assert_close, named_values
from _models import Net
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import road_core
from road_torch import RoadConfig, RoadModel

IN, OUT = 8, 32
X = torch.from_numpy(named_values("x", 3, 2, IN))
NAMES = ["a", "b", "c", "d"]
PATHS = {"up": OUT, "down": IN}
CONFIGS = st.builds(
    lambda variant, size, targets: RoadConfig(
        variant=variant, group_size=size, target_modules=targets, init_weights=False, inference_mode=True
    ),
    st.sampled_from(["road_1", "road_2", "road_4"]),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([["up"], ["down"], ["up", "down"]]),
)


class Sequences(RuleBasedStateMachine):
    """The model, and beside it a simple account of the state that it should have."""

    @initialize(limit=st.sampled_from([None, 3]))
    def start(self, limit):
        self.folder = tempfile.TemporaryDirectory()
        self.number = 0
        self.model = RoadModel(Net(IN, OUT), max_loaded=limit)
        self.limit = limit
        self.adapters = {}
        self.active = []
        self.merged = []

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def parameters(self, name):
        """Returns an adapter's θ and α as the model holds them."""
        layers = {path: getattr(self.model.base_model, path) for path in PATHS}
        return {
            path: (layer.road_theta[name].detach().numpy().copy(), layer.road_alpha[name].detach().numpy().copy())
            for path, layer in layers.items()
            if name in getattr(layer, "road_theta", {})
        }

    def came(self, name, config):
        self.adapters[name] = (config, self.parameters(name))
        if len(self.adapters) == 1:
            self.active = [name]

    def new_folder(self):
        self.number += 1
        return Path(self.folder.name) / str(self.number)

    @precondition(lambda self: not self.merged and len(self.adapters) < len(NAMES))
    @rule(config=CONFIGS, data=st.data())
    def add(self, config, data):
        name = data.draw(st.sampled_from([n for n in NAMES if n not in self.adapters]))
        torch.manual_seed(self.number)
        self.number += 1
        self.model.add_adapter(name, config)
        self.came(name, config)

    @precondition(lambda self: self.adapters and not self.merged and len(self.adapters) < len(NAMES))
    @rule(data=st.data())
    def save_and_load(self, data):
        source = data.draw(st.sampled_from(sorted(self.adapters)))
        name = data.draw(st.sampled_from([n for n in NAMES if n not in self.adapters]))
        folder = self.new_folder()
        self.model.save_pretrained(folder, selected_adapters=[source])
        self.model.load_adapter(folder / source, name)
        self.came(name, self.adapters[source][0])
        for path, pair in self.adapters[source][1].items():
            assert all(map(np.array_equal, pair, self.adapters[name][1][path]))

    @precondition(lambda self: self.adapters and not self.merged)
    @rule(data=st.data())
    def swap(self, data):
        name = data.draw(st.sampled_from(sorted(self.adapters)))
        config = self.adapters[name][0]
        other = RoadModel(Net(IN, OUT))
        torch.manual_seed(1000 + self.number)
        other.add_adapter("default", config)
        folder = self.new_folder()
        other.save_pretrained(folder)
        self.model.hotswap_adapter(folder, name)
        before = self.adapters[name][1]
        self.adapters[name] = (config, self.parameters(name))
        assert all(not np.array_equal(before[path][0], pair[0]) for path, pair in self.adapters[name][1].items())

    @precondition(lambda self: set(self.adapters) - set(self.active) - set(self.merged))
    @rule(data=st.data())
    def delete(self, data):
        free = sorted(set(self.adapters) - set(self.active) - set(self.merged))
        name = data.draw(st.sampled_from(free))
        self.model.delete_adapter(name)
        del self.adapters[name]

    @precondition(lambda self: not self.merged)
    @rule(data=st.data())
    def activate(self, data):
        names = data.draw(st.permutations(sorted(self.adapters)))
        self.active = names[: data.draw(st.integers(0, min(2, len(names))))]
        self.model.set_adapter(self.active)

    @precondition(lambda self: self.adapters and not self.merged)
    @rule(data=st.data())
    def merge(self, data):
        self.merged = [data.draw(st.sampled_from(sorted(self.adapters)))]
        self.model.merge_adapter(self.merged)

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self):
        self.model.unmerge_adapter()
        self.merged = []

    @precondition(lambda self: self.adapters and not self.merged)
    @rule(data=st.data())
    def change_in_place(self, data):
        name = data.draw(st.sampled_from(sorted(self.adapters)))
        path = sorted(self.adapters[name][1])[0]
        with torch.no_grad():
            getattr(self.model.base_model, path).road_theta[name].mul_(-1)
        self.adapters[name] = (self.adapters[name][0], self.parameters(name))

    @precondition(lambda self: self.adapters and not self.merged)
    @rule(data=st.data())
    def mixed(self, data):
        room = len(NAMES) if self.limit is None else self.limit - len(self.active)
        names = [*data.draw(st.permutations(sorted(self.adapters)))[: max(room, 0)], "__base__"]
        chosen = data.draw(st.lists(st.sampled_from(names), min_size=3, max_size=3))
        with torch.no_grad():
            given = self.model(X, adapter_names=chosen)
        for row, name in enumerate(chosen):
            self.check(given[row], X[row], [] if name == "__base__" else [name])

    @rule()
    def disabled(self):
        with torch.no_grad(), self.model.disable_adapter():
            assert torch.equal(self.model(X), Net(IN, OUT)(X))
            if self.adapters:
                given = self.model(X, adapter_names=[sorted(self.adapters)[0]] * 3)
                assert torch.equal(given, Net(IN, OUT)(X))

    @invariant()
    def plain(self):
        if hasattr(self, "model"):
            assert self.model.adapter_names == list(self.adapters)
            assert self.model.active_adapters == list(self.active)
            with torch.no_grad():
                self.check(self.model(X), X, self.merged or self.active)

    def check(self, given, x, names):
        value, net = x.double(), Net(IN, OUT).double()
        for path in PATHS:
            value = getattr(net, path)(value).detach()
            for name in names:
                config, pairs = self.adapters[name]
                if path in pairs:
                    rotated = road_core.rotate(
                        value, *pairs[path], variant=config.variant, group_size=config.group_size
                    )
                    value = torch.from_numpy(rotated)
        assert_close(given, value, "float32")


Sequences.TestCase.settings = settings(max_examples=40, stateful_step_count=15, deadline=None, derandomize=True)
TestSequences = Sequences.TestCase
