"""Which adapter a row gets: under torch.compile, while adapters are swapped, and with more adapters than places."""

import copy
import dataclasses
import gc
import threading
import weakref

import bitsandbytes as bnb
import pytest
import torch
from _compare import assert_close, named_values
from _models import Net, small_model
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import road_core
from road_core import read_peft, write_peft
from road_torch import AdapterError, RoadConfig, RoadLayer, RoadModel
from road_torch._routing import Routing

IN, OUT = 16, 64
X = torch.from_numpy(named_values("x", 4, 3, IN))
IDS = torch.arange(3, 31).reshape(4, 7)


def config(**changes):
    fields = {"target_modules": ["up", "down"], "group_size": 8, "init_weights": False, "inference_mode": True}
    return RoadConfig(**{**fields, **changes})


def road(names, *, max_loaded=None, **changes):
    model = RoadModel(Net(IN, OUT), max_loaded=max_loaded).eval()
    for name in names:
        torch.manual_seed(sum(map(ord, name)))
        model.add_adapter(name, config(**changes))
    return model


def reference(model, name, x=X):
    """Returns the net's output in float64 according to road_core."""
    value, net = x.double(), Net(IN, OUT).double()
    for path in ("up", "down"):
        value = getattr(net, path)(value).detach()
        layer = getattr(model.base_model, path)
        if name in getattr(layer, "road_theta", {}):
            theta, alpha = layer.road_theta[name].detach(), layer.road_alpha[name].detach()
            fields = model.peft_config[name]
            rotated = road_core.rotate(value, theta, alpha, variant=fields.variant, group_size=fields.group_size)
            value = torch.from_numpy(rotated)
    return value


def check(given, model, names, x=X):
    for row, name in enumerate(names):
        assert_close(given[row].detach(), reference(model, name, x)[row], "float32")


def saved(tmp_path, name, **changes):
    road([name], **changes).save_pretrained(tmp_path / f"of {name}", selected_adapters=[name])
    return tmp_path / f"of {name}" / name


@torch.no_grad()
def test_a_compiled_model_is_not_compiled_again(tmp_path):
    model = road("ab")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    check(compiled(X), model, "aaaa")
    check(compiled(X, adapter_names=list("abab")), model, "abab")
    once = counter.frame_count
    assert once == 2
    model.set_adapter("b")
    check(compiled(X), model, "bbbb")
    for names in ("bbba", ["__base__", "a", "b", "__base__"], "aaaa"):
        check(compiled(X, adapter_names=list(names)), model, names)
    model.hotswap_adapter(saved(tmp_path, "z"), "b")
    check(compiled(X), model, "bbbb")
    check(compiled(X, adapter_names=list("abab")), model, "abab")
    for name in "cdefgh":
        model.add_adapter(name, config(target_modules=["up", "down"]))
        check(compiled(X, adapter_names=[name, "a", "b", "a"]), model, [name, "a", "b", "a"])
    model.delete_adapter("a")
    check(compiled(X, adapter_names=list("chbd")), model, "chbd")
    with torch.no_grad():
        model.base_model.up.road_theta["c"].add_(0.5)
    check(compiled(X, adapter_names=list("cccc")), model, "cccc")
    assert counter.frame_count == once


@pytest.mark.parametrize("trainable", [False, True])
@torch.no_grad()
def test_names_and_their_number_are_no_reason_to_compile_again(trainable):
    torch.compiler.reset()
    model = road("abcdefgh")
    model.add_adapter("t", config(inference_mode=not trainable))
    model.set_adapter("t")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    # One graph for the first number of rows, one for any other number, and one for a single row.
    for rows in (4, 3, 1):
        check(compiled(X[:rows], adapter_names=list("tab")[:1] * rows), model, "t" * rows)
    assert counter.frame_count == 3
    # This also refuses frames without a graph, such as the model's own call, which the counter doesn't count.
    with torch._dynamo.config.patch(error_on_recompile=True):
        for names in ("tab", "ht", "cdef", "gt", "b", "hgfe", "tc", "dtd"):
            check(compiled(X[: len(names)], adapter_names=list(names)), model, names)


@torch.no_grad()
def test_a_graph_for_rows_that_the_model_multiplies():
    class Flat(Net):
        def forward(self, x):
            return super().forward(x.flatten(0, 1)).view(x.shape)

    torch.compiler.reset()
    model = RoadModel(Flat(IN, OUT), config(), "a").eval()
    model.add_adapter("b", config())
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for names in ("abab", "bba", "ab"):
        check(compiled(X[: len(names)], adapter_names=list(names)), model, names)
    check(compiled(X[:3, :2].contiguous(), adapter_names=list("bab")), model, "bab", X[:, :2])
    assert counter.frame_count == 3


@torch.inference_mode()
def test_inductor_and_batches_of_several_sizes():
    torch.compiler.reset()
    model = road("ab")
    compiled = torch.compile(model, backend="inductor")
    for names in ("abab", "ba", "bab"):
        check(compiled(X[: len(names)], adapter_names=list(names)), model, names)


@torch.no_grad()
def test_a_layer_that_can_not_be_traced(monkeypatch):
    # Dynamo can't trace divmod of a symbolic number; it gives the layer up and compiles what the layer calls.
    monkeypatch.setattr(Routing, "repeats", lambda routing, y, path, batch=None: divmod(len(y), routing.batch)[0])
    torch.compiler.reset()
    model = road("ab")
    compiled = torch.compile(model, backend="aot_eager")
    for names in ("abab", "bab", "ba"):
        check(compiled(X[: len(names)], adapter_names=list(names)), model, names)


@pytest.mark.parametrize("written", ["by hand", "in training"])
def test_what_was_written_before_a_model_is_compiled_is_used(written):
    torch.compiler.reset()
    model = road("ab", inference_mode=written == "by hand")
    before = model(X).detach()
    twin = copy.deepcopy(model)
    for given in (model, twin):
        theta = given.base_model.up.road_theta["a"]
        if written == "in training":
            given(X).square().mean().backward()
            theta.data.sub_(100 * theta.grad)
        else:
            with torch.no_grad():
                theta.add_(0.5)
        # torch.compile may reuse the graph of the one model for the other.
        with torch.no_grad():
            after = torch.compile(given, backend="aot_eager")(X)
        check(after, given, "aaaa")
        assert not torch.allclose(after, before, atol=1e-2)


def test_gradients_begin_or_end_within_a_compiled_call():
    class Partly(Net):
        def forward(self, x):
            with torch.no_grad():
                x = self.up(x)
            with torch.enable_grad():
                return self.down(x)

    torch.compiler.reset()
    model = RoadModel(Partly(IN, OUT), config(inference_mode=False), "a").eval()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        with torch.no_grad():
            model.base_model.up.road_theta["a"].add_(0.5)
        optimizer.zero_grad()
        given = compiled(X)
        check(given, model, "aaaa")
        given.square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            check(compiled(X), model, "aaaa")


def test_a_compiled_model_finds_its_rows_where_it_was_moved_to(monkeypatch):
    model, moved_to = road("a"), torch.device("meta")
    # "meta" is a second device that every machine has, but layers would ignore it as their own device.
    monkeypatch.setattr(RoadLayer, "_device", lambda layer: moved_to)
    model.to(torch.float64)
    assert model.base_model.up.bank.first.device == moved_to
    assert [(size, rows.device) for size, rows in model._shared.plain.steps[moved_to]] == [(8, moved_to)]


@torch.no_grad()
def test_compiled_with_group_sizes_and_layers_that_differ():
    model = road("a")
    model.add_adapter("b", config(group_size=64, variant="road_4", target_modules=["up"]))
    model.add_adapter("c", config(variant="road_2", target_modules=["down"]))
    compiled = torch.compile(model, backend="eager", fullgraph=False)
    names = ["c", "b", "a", "__base__"]
    check(compiled(X, adapter_names=names), model, names)
    model.set_adapter("b")
    check(compiled(X), model, "bbbb")
    with model.disable_adapter():
        check(compiled(X), model, ["__base__"] * 4)
    model.merge_adapter()
    check(compiled(X), model, "bbbb")


@torch.no_grad()
def test_a_compiled_decoder():
    model = RoadModel(small_model())
    for name in "ab":
        model.add_adapter(name, config(target_modules="all-linear"))
    names = ["a", "b", "__base__", "a"]
    plain, mixed = model(IDS).logits, model(IDS, adapter_names=names).logits
    compiled = torch.compile(model, backend="eager")
    assert_close(compiled(IDS).logits, plain, "float32")
    assert_close(compiled(IDS, adapter_names=names).logits, mixed, "float32", moved_from=plain)


def test_a_compiled_model_is_trained():
    model, twin = (road("a", inference_mode=False) for _ in range(2))
    compiled = torch.compile(model, backend="aot_eager")
    for trained in (model, twin):
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (compiled if trained is model else twin)(X).square().mean().backward()
            optimizer.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    check(compiled(X), model, "aaaa")


@pytest.mark.parametrize("compiled", [False, True])
def test_what_an_optimizer_writes_through_data_is_used(compiled):
    """On a CPU, optimizers of bitsandbytes don't change a parameter's version."""
    model = road("ab", inference_mode=False)
    trained = torch.compile(model, backend="aot_eager") if compiled else model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.AdamW8bit(parameters, lr=0.1)
    with torch.no_grad():
        before = model(X), model(X, adapter_names=list("abab"))
    versions = [p._version for p in parameters]
    for _ in range(2):
        optimizer.zero_grad()
        trained(X).square().mean().backward()
        optimizer.step()
    assert [p._version for p in parameters] == versions
    with torch.no_grad():
        after = model(X), model(X, adapter_names=list("abab"))
    assert not torch.allclose(after[0], before[0], atol=1e-2)
    check(after[0], model, "aaaa")
    check(after[1], model, "abab")
    assert torch.equal(after[1][1], before[1][1])


@torch.no_grad()
def test_an_order_that_changes_in_the_middle_of_a_generation():
    model = RoadModel(small_model())
    for name in "ab":
        model.add_adapter(name, config(target_modules="all-linear", variant="road_2"))
    model.set_adapter(["a", "b"])
    kwargs = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(IDS)}
    kwargs |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(IDS, **kwargs).logits
    handle = model.base_model.model.layers[0].register_forward_pre_hook(lambda *_: model.set_adapter(["b", "a"]))
    given = model.generate(IDS, **kwargs).logits
    handle.remove()
    assert all(map(torch.equal, given, expected))
    assert not torch.allclose(model.generate(IDS, **kwargs).logits[0], expected[0], atol=1e-2)


@pytest.mark.parametrize("names", [None, ["b", "b"]])
@torch.no_grad()
def test_a_swap_in_the_middle_of_a_generation(names, tmp_path):
    """Another thread swaps an adapter while the first forward pass is between two layers."""

    def new(seed):
        model = RoadModel(small_model())
        torch.manual_seed(seed)
        for name in "ab":
            model.add_adapter(name, config(target_modules="all-linear"))
        model.set_adapter("b")
        return model

    other, model = new(5), new(6)
    other.save_pretrained(tmp_path / "other")
    kwargs = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    kwargs["attention_mask"] = torch.ones_like(IDS[:2])
    old = model.generate(IDS[:2], adapter_names=names, **kwargs)
    expected = other.generate(IDS[:2], adapter_names=names, **kwargs)
    assert not torch.equal(old, expected)
    errors = []

    def swap():
        try:
            model.hotswap_adapter(tmp_path / "other" / "b", "b")
        except BaseException as error:
            errors.append(error)

    def hook(*_):
        if not threads:
            threads.append(threading.Thread(target=swap))
            threads[0].start()
            threads[0].join(30)

    threads = []
    # Plans are dropped, as if the next call were the model's first.
    for layer in (m for m in model.modules() if isinstance(m, RoadLayer)):
        model._shared.plain.plans.pop(layer, None)
    handle = model.base_model.model.layers[1].register_forward_pre_hook(hook)
    assert torch.equal(model.generate(IDS[:2], adapter_names=names, **kwargs), old)
    handle.remove()
    assert not errors
    assert torch.equal(model.generate(IDS[:2], adapter_names=names, **kwargs), expected)
    assert model._shared.calls == []


@torch.no_grad()
def test_two_swaps_within_one_call(tmp_path):
    model = road("b")
    folders = [saved(tmp_path / str(seed), "b", variant="road_1") for seed in range(2)]
    for seed, folder in enumerate(folders):
        adapter = read_peft(folder)
        theta = {path: (theta + 1 + seed, alpha) for path, (theta, alpha) in adapter.modules.items()}
        write_peft(folder, dataclasses.replace(adapter, modules=theta), overwrite=True)
    names = ["b", "__base__", "b", "b"]
    old = [reference(model, name)[row] for row, name in enumerate(names)]
    handle = model.base_model.down.register_forward_pre_hook(
        lambda *_: [model.hotswap_adapter(folder, "b") for folder in folders] and None
    )
    given = model(X, adapter_names=names)
    handle.remove()
    assert_close(given, torch.stack(old), "float32", moved_from=[reference(model, name)[0] for name in names])
    check(model(X, adapter_names=names), model, names)


@torch.no_grad()
def test_swaps_while_other_threads_call(tmp_path):
    model = road("ab")
    folders = [saved(tmp_path, name) for name in ("x", "y")]
    allowed = []
    for folder in folders:
        model.hotswap_adapter(folder, "b")
        allowed.append((model(X, adapter_names=list("baba")), model(X, adapter_names=list("bbbb"))))
    stop, wrong = threading.Event(), []

    def call():
        while not stop.is_set():
            with torch.no_grad():
                for i, names in enumerate(("baba", "bbbb")):
                    given = model(X, adapter_names=list(names))
                    if not any(torch.equal(given, pair[i]) for pair in allowed):
                        wrong.append(given)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(60):
        model.hotswap_adapter(folders[i % 2], "b")
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert torch.equal(model(X, adapter_names=list("bbbb")), allowed[1][1])


def test_a_swap_keeps_parameters_and_trainability(tmp_path):
    model = road("a", inference_mode=False)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    model.hotswap_adapter(saved(tmp_path, "z"), "a")
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert sum(p.requires_grad for p in model.parameters()) == 4
    check(model(X), model, "aaaa")
    theta = read_peft(saved(tmp_path, "y")).modules["up"][0]
    model.hotswap_adapter(tmp_path / "of y" / "y", "a")
    assert torch.equal(model.base_model.up.road_theta["a"].detach(), torch.from_numpy(theta.copy()))


def fewer(adapter):
    kept = dataclasses.replace(adapter.config, target_modules=["up"])
    return dataclasses.replace(adapter, config=kept, modules={"up": adapter.modules["up"]})


def more(adapter):
    return dataclasses.replace(adapter, modules={**adapter.modules, "middle": adapter.modules["up"]})


def wider(adapter):
    pair = tuple(named_values(part, 2 * OUT) for part in ("theta", "alpha"))
    return dataclasses.replace(adapter, modules={**adapter.modules, "up": pair})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "road_2"}, r"expected variant road_1 as 'a' has, found road_2"),
        ({"group_size": 16}, r"expected group_size 8 as 'a' has, found 16"),
        (fewer, r"the 2 modules of 'a', found 1, differing in down"),
        (more, r"the 2 modules of 'a', found 3, differing in middle"),
        (wider, r"θ of shape \[32\] for up, found \[128\]"),
        ("truncated", r"expected a whole safetensors file"),
        ("nowhere", r"expected a folder, found nothing"),
    ],
)
def test_a_refused_swap_changes_nothing(change, message, tmp_path):
    model = road("ab")
    folder = saved(tmp_path, "z", **(change if isinstance(change, dict) else {}))
    if callable(change):
        folder = tmp_path / "changed"
        write_peft(folder, change(read_peft(tmp_path / "of z" / "z")))
    elif change == "truncated":
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-4])
    elif change == "nowhere":
        folder = tmp_path / "nowhere"
    before = {name: (id(p), p._version) for name, p in model.named_parameters()}
    rows, plain, expected = dict(model._shared.rows), model._shared.plain, model(X)
    with pytest.raises(AdapterError, match=message) as caught:
        model.hotswap_adapter(folder, "a")
    assert "\n" not in str(caught.value)
    assert {name: (id(p), p._version) for name, p in model.named_parameters()} == before
    assert (model._shared.rows, model._shared.plain) == (rows, plain)
    assert torch.equal(model(X), expected)


def test_a_merged_or_unknown_adapter_is_not_swapped(tmp_path):
    model, folder = road("ab"), saved(tmp_path, "z")
    with pytest.raises(AdapterError, match="found 'q'"):
        model.hotswap_adapter(folder, "q")
    model.merge_adapter(["b"])
    with pytest.raises(AdapterError, match="not merged, found 'b'"):
        model.hotswap_adapter(folder, "b")
    model.hotswap_adapter(folder, "a")
    model.unmerge_adapter()
    check(model(X), model, "aaaa")


def table_bytes(model):
    return sum(
        table.nbytes
        for layer in model.modules()
        if isinstance(layer, RoadLayer)
        for table in (layer.bank.first, layer.bank.cross)
    )


@torch.no_grad()
def test_many_adapters_in_little_memory(monkeypatch):
    names = [f"adapter{i}" for i in range(200)]
    model = road(names[:5], max_loaded=4)
    model(X, adapter_names=["adapter1", "adapter2", "adapter3", "__base__"])
    tables = table_bytes(model)
    # The identity and four adapters, with two float32 coefficients per output.
    assert tables == 5 * 2 * 4 * (OUT + IN)
    modules = {name: id(module) for name, module in model.named_modules()}
    for name in names[5:]:
        torch.manual_seed(sum(map(ord, name)))
        model.add_adapter(name, config())
    assert {name: id(module) for name, module in model.named_modules()} == modules
    stored = sum(p.nbytes for name, p in model.named_parameters() if ".road_" in name)
    assert stored == 200 * 2 * 4 * (OUT + IN) // 2
    for start in range(0, 200, 3):
        chosen = [*names[start : start + 3], "__base__", "adapter0", "adapter0", "adapter0"][:4]
        check(model(X, adapter_names=chosen), model, chosen)
    assert table_bytes(model) == tables
    assert len(model._shared.rows) == 4
    check(model(X), model, ["adapter0"] * 4)


def _write(model, folder):
    with torch.no_grad():
        model.base_model.up.road_theta["a"].add_(0.5)


def _delete_and_add(model, folder):
    model.set_adapter("b")
    model.delete_adapter("a")
    model.add_adapter("a", config())


CHANGES = {
    "nothing": lambda model, folder: None,
    "θ written to": _write,
    "swapped": lambda model, folder: model.hotswap_adapter(folder, "a"),
    "deleted and added": _delete_and_add,
    "another group size": lambda model, folder: model.add_adapter("d", config(group_size=16)),
    "another active": lambda model, folder: model.set_adapter("b"),
    "moved": lambda model, folder: model.to(torch.float64).to(torch.float32),
    "merged and unmerged": lambda model, folder: (model.merge_adapter(["b"]), model.unmerge_adapter()),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_call_with_the_same_names_gathers_only_what_has_changed(change, tmp_path, monkeypatch):
    folder = saved(tmp_path, "z")
    model, names = road("abc"), ["a", "b", "__base__", "c"]
    gathered = []
    gather = RoadLayer._gather
    monkeypatch.setattr(
        RoadLayer, "_gather", lambda layer, *args: (gathered.append(layer.module_path), gather(layer, *args))[1]
    )
    # Other lengths are other shapes, for which the memory changes but not what was gathered.
    for x in (X, X[:, :1], X[:, :2]):
        check(model(x, adapter_names=names), model, names, x)
    assert gathered == ["up", "down"]
    CHANGES[change](model, folder)
    gathered.clear()
    check(model(X, adapter_names=names), model, names)
    expected = {"nothing": [], "merged and unmerged": [], "θ written to": ["up"]}
    assert gathered == expected.get(change, ["up", "down"])
    other = names[::-1]
    check(model(X, adapter_names=other), model, other)
    with torch.enable_grad():
        check(model(X, adapter_names=other), model, other)


@torch.no_grad()
def test_threads_with_the_same_names_share_no_memory():
    model, names = road("abc"), list("abca")
    given, barrier = {}, threading.Barrier(4)

    def call(i):
        with torch.no_grad():
            x = X + i
            barrier.wait()
            given[i] = [(x, model(x, adapter_names=names)) for _ in range(20)]

    model(X, adapter_names=names)
    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for calls in given.values():
        for x, y in calls:
            check(y, model, names, x)


@torch.no_grad()
def test_the_least_recently_used_makes_room(monkeypatch):
    from road_torch._kernels import default

    formed = []
    form = default.coefficients
    monkeypatch.setattr(default, "coefficients", lambda *args: formed.append(args) or form(*args))
    model = road("abcd", max_loaded=3)
    assert list(model._shared.rows) == ["a"]
    model(X, adapter_names=list("bcbc"))
    model(X, adapter_names=["b", "__base__", "b", "b"])
    assert set(model._shared.rows) == set("abc")
    formed.clear()
    check(model(X, adapter_names=list("dddd")), model, "dddd")
    assert set(model._shared.rows) == set("abd")
    assert len(formed) == 2
    with pytest.raises(AdapterError, match=r"at most 3 adapters at once, .* found 4"):
        model(X, adapter_names=list("bcdb"))
    assert set(model._shared.rows) == set("abd")
    model.delete_adapter("d")
    check(model(X, adapter_names=list("cbcb")), model, "cbcb")
    model.set_adapter(["c", "b"])
    twice = copy.deepcopy(model)
    assert torch.equal(twice(X), model(X))


@torch.no_grad()
def test_an_adapter_of_a_call_in_flight_makes_no_room():
    model = road("abcd", max_loaded=3)
    names = ["b", "__base__", "b", "b"]

    def hook(*_):
        handle.remove()
        # Of a, b and c, b is now the least recently used one that isn't active.
        check(model(X, adapter_names=list("cccc")), model, "cccc")
        check(model(X, adapter_names=list("dddd")), model, "dddd")
        assert set(model._shared.rows) == set("abd")
        with pytest.raises(AdapterError, match=r"active or in another call among them, found 4"):
            model(X, adapter_names=list("cdcd"))

    handle = model.base_model.down.register_forward_pre_hook(hook)
    check(model(X, adapter_names=names), model, names)
    assert handle.id not in model.base_model.down._forward_pre_hooks


def test_what_is_stored_on_the_cpu_stays_there():
    model = road("abc", max_loaded=2)
    model.add_adapter("trained", config(inference_mode=False))
    theta = model.base_model.up.road_theta["c"]
    model.to("meta")
    layer = model.base_model.up
    assert layer.weight.device.type == layer.road_theta["trained"].device.type == "meta"
    assert layer.road_theta["c"] is theta
    assert [layer.road_alpha[name].device.type for name in "abc"] == ["cpu"] * 3


@pytest.mark.parametrize("number", [0, -1, 1.5, "two"])
def test_max_loaded_is_a_number_from_1_up(number):
    with pytest.raises(AdapterError, match="max_loaded: expected a number from 1 up"):
        RoadModel(Net(IN, OUT), max_loaded=number)


@torch.no_grad()
def test_a_layer_without_the_adapter_that_got_a_used_row():
    model = road("a", max_loaded=2)
    model.add_adapter("b", config(target_modules=["up"]))
    for names in ("bbbb", "abab", "bbab"):
        check(model(X, adapter_names=list(names)), model, names)
    model.add_adapter("c", config(target_modules=["down"]))
    for names in ("cccc", "aacc", "bbbb", "abab"):
        check(model(X, adapter_names=list(names)), model, names)


def test_an_adapter_in_use_is_not_deleted():
    model = road("ab")
    errors = []

    def hook(*_):
        with pytest.raises(AdapterError, match="no call uses, found 'b'"):
            model.delete_adapter("b")
        errors.append(1)

    handle = model.base_model.down.register_forward_pre_hook(hook)
    model(X, adapter_names=list("abab"))
    assert errors
    handle.remove()
    model.delete_adapter("b")
    assert model.adapter_names == ["a"]


def test_a_plain_call_within_a_mixed_one():
    model = road("ab")
    plain = model(X[:1])
    given = []

    def hook(*_):
        if not given:
            given.append(None)
            given[0] = model(X[:1])

    handle = model.base_model.down.register_forward_pre_hook(hook)
    check(model(X, adapter_names=list("baba")), model, "baba")
    assert torch.equal(given[0], plain)
    handle.remove()


@pytest.mark.parametrize("names", [None, list("abca")])
@torch.no_grad()
def test_a_replica_of_data_parallel_is_not_kept(names):
    model = road("abc")
    check(model(X, adapter_names=names), model, names or list("aaaa"))
    replica = copy.copy(model)
    replica._modules = {"base_model": model.base_model._replicate_for_data_parallel()}
    up = model.base_model.up._replicate_for_data_parallel()
    replica.base_model.up = up
    check(replica(X, adapter_names=names), model, names or list("aaaa"))
    gone = weakref.ref(up)
    del replica, up
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("names", [None, list("abca")])
@torch.no_grad()
def test_transforms_and_modes_neither_take_nor_leave_what_calls_gathered(names):
    model, given = road("abc"), {} if names is None else {"adapter_names": names}
    expected = names or list("aaaa")

    def call(x):
        return model(x, **given)

    for _ in range(2):
        check(call(X), model, expected)
        y, tangent = torch.func.jvp(call, (X,), (X,))
        check(y, model, expected)
        check(tangent + call(0 * X), model, expected)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert call(mode.from_tensor(X)).shape == X.shape
        with FlopCounterMode(display=False) as counter:
            check(call(X), model, expected)
        assert counter.get_total_flops() > 0
