"""Weights inside an SGLang scheduler process: received, loaded, and proved to be all there.

bucket of weights  ---> digest of what arrived ---> model.load_weights (`sglang_loading.py`)
bucket of adapters ---> digest of what arrived ---> B A at the end of the update, added to the base
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor, nn

from asyncrl.engines.sglang.loading import Loader
from asyncrl.utils.threads import started
from asyncrl.weights.broadcast import BroadcastGroup, Rendezvous
from asyncrl.weights.buckets import LORA_A, LORA_B, Bucket, digest, flat_digest
from asyncrl.weights.sender import receive


class ReceivedWeights:
    """The weights of one scheduler process: where they come from and what proves that they are complete.

    The digest is of the tensors as they arrived and were handed to the model's loader. That the loader put them
    everywhere is proved once: before the first update all parameters are set to NaN, and after it none may be left.
    Later updates must bring the names that this one brought. An update of adapters goes to `AddedProducts`.
    """

    def __init__(self, model: nn.Module, tp_rank: int, tp_size: int) -> None:
        self._model, self._tp_rank = model, tp_rank
        self._loader, self._products = Loader(model), AddedProducts(model, tp_size)
        self._factors: dict[str, Tensor] = {}
        self.device = next(model.parameters()).device
        self._checksums = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._group: BroadcastGroup | None = None
        self._entering: tuple[str, Future[BroadcastGroup]]  # the newest group's name, and the way into it
        self._arrived: list[tuple[Bucket, Tensor]] = []
        self._changed = self._lost = False
        self._complete: frozenset[str] | None = None

    def lose(self) -> list[Tensor]:
        """From here on the model has no weights until a whole update has come. Returns what no update brings."""
        self._lost = True
        return list(self._model.buffers())

    def join(self, where: Rendezvous, first_rank: int, address: str) -> None:
        """Leaves the group and begins to enter another. An update that was cut short starts over from its first bucket.

        That takes until all members are there, and with NCCL half a second more or several: it has a thread, and
        generation goes on.
        """
        before, self._group = self._group, None
        self._arrived.clear()
        self._factors.clear()

        def enter() -> BroadcastGroup:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # each thread has its own
            if before is not None:
                before.leave()
            return BroadcastGroup(where, first_rank + self._tp_rank, address)

        self._entering = where.name, started(enter)

    def joined(self, name: str) -> bool:
        """Whether the group of this name is entered. Raises `RuntimeError` if that failed, or another came after it."""
        newest, entering = self._entering
        if name != newest:
            raise RuntimeError(f"the engine was told to enter {newest!r} before it was in {name!r}")
        if entering.done():
            self._group = entering.result()
        return self._group is not None

    def receive(self, buckets: Sequence[Bucket]) -> None:
        """Takes part in the broadcasts and loads what came, each checked after its own, so that no other member waits
        for it."""
        if self._group is None:
            raise RuntimeError("the engine is in no broadcast group")
        receive(self._group, buckets, self._load)

    def _load(self, bucket: Bucket, flat: Tensor) -> None:
        twice = self._names() & set(bucket.names)
        if twice:
            raise RuntimeError(f"parameter {min(twice)!r} arrived twice in one update")
        adapters = all(name.endswith((LORA_A, LORA_B)) for name in bucket.names)
        if self._complete is None and not self._changed and not adapters:
            _poison(self._model)
        self._changed = True
        if adapters:
            self._factors |= bucket.unpack(flat)
        else:
            self._loader.load(bucket, flat)
        self._arrived.append((bucket, self._checksum(flat)))

    def _checksum(self, flat: Tensor) -> Tensor:
        """On a stream of its own, so that the next bucket's broadcast does not wait for it."""
        if self._checksums is None or not flat.is_cuda:  # over gloo it comes to the host
            return flat_digest(flat)
        self._checksums.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._checksums):
            value = flat_digest(flat)
        flat.record_stream(self._checksums)
        return value

    def finish(self) -> str | None:
        """The digest of the update that ends here, None if nothing arrived. Raises `RuntimeError` for a partial one."""
        if not self._changed:
            if self._lost:
                raise RuntimeError("the memory of the weights was given back and no update has come since")
            return None
        if self._complete is None and not self._factors:
            names = [name for name, _ in self._model.named_parameters()]
            missing = [name for name, parameter in self._model.named_parameters() if _has_nan(parameter)]
        else:
            arrived = self._names()
            names = sorted(self._complete or arrived)
            missing = [name for name in names if name not in arrived]
        if missing:
            raise RuntimeError(
                f"the update is partial: {len(missing)} of {len(names)} parameters did not arrive "
                f"({', '.join(missing[:3])}, ...)"
            )
        if self._factors:
            self._products.add(self._factors)
            self._factors.clear()
        self._complete = self._names()
        if self._checksums is not None:
            self._checksums.synchronize()
        whole = digest(self._arrived)
        self._arrived.clear()
        self._changed = self._lost = False
        return whole

    def _names(self) -> frozenset[str]:
        return frozenset(name for bucket, _ in self._arrived for name in bucket.names)


class AddedProducts:
    """The weights that adapters make of the base that the model was loaded with, which is kept beside it.

    SGLang fuses and splits weights in ways that its loader alone knows. Loading is copying, so it also puts B A where W
    would go; W is then added. In the model's dtype the product is rounded before the sum, which merged weights are not.
    """

    def __init__(self, model: nn.Module, tp_size: int) -> None:
        self._model, self._tp_size = model, tp_size
        self._base: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def add(self, factors: Mapping[str, Tensor]) -> None:
        """Makes the weights W + B A from A [rank, in] and B [out, rank], by their names.

        Raises `RuntimeError` for one without the other and for a model into which products cannot be loaded.
        """
        stems = {name.removesuffix(LORA_A).removesuffix(LORA_B) for name in factors}
        halves = sorted(stem for stem in stems if not {stem + LORA_A, stem + LORA_B} <= factors.keys())
        if halves:
            raise RuntimeError(f"the adapter of {halves[0]!r} arrived in half")
        if not self._base:
            self._keep_base(stems, factors)
        for parameter in self._base:
            parameter.zero_()
        self._model.load_weights(_products(stems, factors))  # type: ignore[operator]
        for parameter, base in self._base.items():
            parameter.add_(base)

    def _keep_base(self, stems: set[str], factors: Mapping[str, Tensor]) -> None:
        """Finds the parameters that products go to, by loading some over NaN, and keeps what they held."""
        if hasattr(self._model, "post_load_weights"):
            raise RuntimeError("the model computes more from its weights when they are loaded: set lora.sync=merged")
        whole = {parameter: parameter.detach().to("cpu", copy=True) for parameter in self._model.parameters()}
        _poison(self._model)
        self._model.load_weights(_products(stems, factors))  # type: ignore[operator]
        num_written = 0
        for parameter, values in whole.items():
            written = int((~parameter.isnan()).sum()) if parameter.is_floating_point() else 0
            parameter.copy_(values)
            if written:
                num_written += written
                self._base[parameter] = parameter.detach().clone()
        wanted = sum(len(factors[stem + LORA_B]) * factors[stem + LORA_A].shape[1] for stem in stems)
        if num_written * self._tp_size < wanted:
            self._base.clear()
            raise RuntimeError(
                f"SGLang's loader put {num_written} of {wanted} weights of the adapters' layers into the model on each "
                f"of {self._tp_size} ranks: set lora.sync=merged"
            )


def _products(stems: set[str], factors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """B A under the names of the weights, one at a time."""
    for stem in sorted(stems):
        a, b = factors[stem + LORA_A], factors[stem + LORA_B]
        yield f"{stem}.weight", (b.float() @ a.float()).to(a.dtype)


@torch.no_grad()
def _poison(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.fill_(torch.nan)


def _has_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isnan().any())
