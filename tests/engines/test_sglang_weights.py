"""How weights get into a model like SGLang's, whose loader fuses layers, and adapters on top. Needs no SGLang."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from asyncrl.engines.sglang import loading as sglang_loading
from asyncrl.engines.sglang.loading import Loader
from asyncrl.engines.sglang.weights import AddedProducts
from asyncrl.weights.buckets import LORA_A, LORA_B, make_buckets

SIZE, RANK = 8, 2
ROWS = {"q": slice(0, 8), "k": slice(8, 12), "v": slice(12, 16)}


class Fused(nn.Module):
    """One parameter holds three layers, as the loader knows; another is a layer of its own."""

    num_loads = 0

    def __init__(self, dtype=torch.float32, lost=()):
        super().__init__()
        self.qkv = nn.Linear(SIZE, 16, bias=False, dtype=dtype)
        self.out = nn.Linear(SIZE, SIZE, dtype=dtype)
        self.lost = lost

    def load_weights(self, weights):
        self.num_loads += 1
        for name, tensor in weights:
            layer = name.removesuffix(".weight")
            if layer not in self.lost:
                place = self.qkv.weight.data[ROWS[layer]] if layer in ROWS else getattr(self, layer).weight.data
                self.put(place, tensor)

    def put(self, place, tensor):
        place.copy_(tensor)


class Padded(Fused):
    """Longer than what comes, as an embedding is for the sake of tensor-parallel ranks; the order of writes matters."""

    def put(self, place, tensor):
        place.fill_(7)
        place[:3].copy_(tensor[:3])
        place[3:, ::2].copy_(tensor[3:, ::2])


class Scaled(Fused):
    def put(self, place, tensor):
        place.copy_(tensor * 2)


class Foreach(Fused):
    """By an operation that returns nothing."""

    def put(self, place, tensor):
        torch._foreach_copy_([place], [tensor])


class Reading(Fused):
    """What it does depends on the values, of which the first update shows only one case."""

    def put(self, place, tensor):
        place.copy_(tensor if tensor.sum() > 0 else -tensor)


class Threaded(Fused):
    """As some of SGLang's loaders copy out of host memory: where nothing of it is seen."""

    def put(self, place, tensor):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(place.copy_, tensor).result()


class Overlapping(Fused):
    """Large and small, and one over the other."""

    def put(self, place, tensor):
        place[:2].copy_(tensor[:2])
        place.copy_(tensor)
        place[1:2].copy_(tensor[:1])


@pytest.mark.parametrize("small", [1 << 24, 40, 0])
@pytest.mark.parametrize(
    ("kind", "num_loads"),
    [(Fused, 1), (Padded, 1), (Overlapping, 1), (Scaled, 3), (Foreach, 3), (Reading, 3), (Threaded, 3)],
)
def test_a_loader_that_only_copies_is_called_once_and_repeated(kind, num_loads, small, monkeypatch):
    monkeypatch.setattr(sglang_loading, "_SMALL", small)
    model, plain = kind(torch.bfloat16), kind(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    loader = Loader(model)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name: torch.randn(rows, SIZE, generator=generator) for name, rows in (("q", 8), ("v", 4), ("out", 8))
        }
        [bucket] = make_buckets(weights.items(), "bfloat16", 1 << 20)
        flat = bucket.pack(weights, bucket.empty(torch.device("cpu")))
        plain.load_weights(bucket.unpack(flat))
        loader.load(bucket, flat.clone())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, plain.get_parameter(name)), (seed, name)
    assert model.num_loads == num_loads


def adapters(seed, *layers, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in layers:
        rows = ROWS[layer].stop - ROWS[layer].start if layer in ROWS else SIZE
        found[layer + LORA_A] = torch.randn(RANK, SIZE, generator=generator).to(dtype)
        found[layer + LORA_B] = torch.randn(rows, RANK, generator=generator).to(dtype)
    return found


def product(factors, layer):
    return factors[layer + LORA_B].float() @ factors[layer + LORA_A].float()


def test_the_product_is_added_where_the_loader_puts_the_layer_and_nothing_else_changes():
    model = Fused()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    added = AddedProducts(model, 1)
    for seed in (1, 2, 3):
        factors = adapters(seed, "q", "v", "out")
        added.add(factors)
        for layer in ("q", "v"):
            expected = before["qkv.weight"][ROWS[layer]] + product(factors, layer)
            assert torch.equal(model.qkv.weight[ROWS[layer]], expected)
        assert torch.equal(model.qkv.weight[ROWS["k"]], before["qkv.weight"][ROWS["k"]])
        assert torch.equal(model.out.weight, before["out.weight"] + product(factors, "out"))
        assert torch.equal(model.out.bias, before["out.bias"])


def test_nothing_drifts_over_many_updates():
    model = Fused(torch.bfloat16)
    added, first = AddedProducts(model, 1), adapters(0, "q", dtype=torch.bfloat16)
    added.add(first)
    wanted = model.qkv.weight.detach().clone()
    for seed in range(1, 20):
        added.add(adapters(seed, "q", dtype=torch.bfloat16))
    assert not torch.equal(model.qkv.weight, wanted)
    added.add(first)
    assert torch.equal(model.qkv.weight, wanted)


def test_a_loader_that_drops_a_layer_is_found_out_and_the_base_is_left():
    model = Fused(lost=("v",))
    before = model.qkv.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"put 64 of 96 weights .* set lora.sync=merged"):
        AddedProducts(model, 1).add(adapters(0, "q", "v"))
    assert torch.equal(model.qkv.weight, before)


def test_half_an_adapter_and_a_model_that_computes_from_its_weights_are_refused():
    factors = adapters(0, "q")
    del factors["q" + LORA_A]
    with pytest.raises(RuntimeError, match="adapter of 'q' arrived in half"):
        AddedProducts(Fused(), 1).add(factors)
    model = Fused()
    model.post_load_weights = lambda: None
    with pytest.raises(RuntimeError, match=r"set lora\.sync=merged"):
        AddedProducts(model, 1).add(adapters(0, "q"))
