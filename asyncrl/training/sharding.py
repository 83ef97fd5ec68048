"""Learner ranks: how they meet, how a model is split between them (FSDP2), and whole tensors out of the parts.

    every rank:  forward   all-gather a layer -> compute -> drop it
                 backward  all-gather a layer -> compute -> reduce-scatter its gradient, summed over the ranks
                 optimizer on its own rows of every parameter

What is held for a step is gathered in its first forward pass, and its gradients are summed in the last backward pass.
All of these wait for every rank, so ranks make the same calls in the same order.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from asyncrl.weights.broadcast import Rendezvous
from asyncrl.weights.dtensor import whole

TIMEOUT_S = 1800.0
"""Bound on one collective of the learner ranks. The driver hears of a rank that died long before."""
_SIOCGIFADDR = 0x8915  # of Linux: the IPv4 address of an interface, in the bytes 20 to 23 of the answer


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the learner's. The default is a learner of one rank, which shares nothing out."""

    rank: int = 0
    num_ranks: int = 1
    mesh: DeviceMesh | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks, on every rank, in place; CPU tensors go over gloo and others over NCCL."""
        if self.mesh is not None:
            dist.all_reduce(values)
        return values

    def share(self, value: float) -> float:
        """The first rank's value, on every rank."""
        return float(self.sum(torch.tensor(value if self.is_first else 0.0, dtype=torch.float64)))

    def gather(self, item: Any) -> list[Any]:
        """Every rank's item, in order, on the first rank; nothing elsewhere. Tensors should be on the CPU."""
        if self.mesh is None:
            return [item]
        items = [None] * self.num_ranks if self.is_first else None
        dist.gather_object(item, items)
        return items or []


def join_ranks(
    where: Rendezvous, rank: int, device: str, address: str = "127.0.0.1", store: TCPStore | None = None
) -> Ranks:
    """Blocks until every learner rank has come; `address` is this rank's own node, `store` the opened meeting point, at
    the first rank."""
    prefer_interface(address)
    timeout = timedelta(seconds=where.timeout_s)
    if device == "cuda":
        torch.cuda.set_device(0)  # the only GPU that the process sees
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=store or TCPStore(where.host, where.port, where.world_size, timeout=timeout, wait_for_workers=False),
        rank=rank,
        world_size=where.world_size,
        timeout=timeout,
    )
    return Ranks(rank, where.world_size, init_device_mesh(device, (where.world_size,)))


def prefer_interface(address: str) -> None:
    """Has gloo and NCCL of this process use the interface that has this address, unless the environment names one.

    Of its own accord gloo tells the others the address that the host's name resolves to, often a loopback one.
    """
    name = interface_of(address)
    if name is None:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if not ipaddress.ip_address(address).is_loopback:  # over which NCCL reaches nobody
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # this one, and not all whose names begin so


def interface_of(address: str) -> str | None:
    """The interface whose IPv4 address this is; None if there is none, and on other systems than Linux."""
    if sys.platform != "linux":
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("40s", name.encode()))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def shard(module: nn.Module, layers: Iterable[nn.Module], ranks: Ranks, *, bfloat16: bool, hold: bool) -> None:
    """Leaves this rank its rows of every parameter of `module`; `layers` inside it are gathered one at a time, and with
    `hold` stay together until `before_pass` says otherwise.

    With `bfloat16` a layer's weights are rounded before they travel, which a matrix product under autocast would do
    after; what is outside the layers (embedding, last norm, head) stays float32. Gradients are float32 and summed, not
    averaged: the loss has its denominators from the whole batch.

    The values of weights and buffers are the first rank's; other ranks may give an empty model. Every rank.
    """
    full = {name: parameter.detach() for name, parameter in module.named_parameters()}
    plain = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bfloat16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for part, policy in [*((layer, rounded) for layer in layers), (module, plain)]:
        sharded = fully_shard(part, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=not hold)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that divides
    for name, parameter in module.named_parameters():
        _spread(full.pop(name), parameter, ranks)
    for buffer in module.buffers():
        dist.broadcast(buffer, 0)


def before_pass(module: nn.Module, *, last: bool) -> None:
    """Of a module that is held: whether the next backward pass is the last one of a step. That one sums the gradients
    of all passes over the ranks, and lets go of the other ranks' parts."""
    held = cast(FSDPModule, module)
    held.set_requires_gradient_sync(last)
    held.set_is_last_backward(last)
    held.set_reshard_after_backward(last)


def held_bytes(module: nn.Module) -> int:
    """What holding takes beside the rank's own parts, at most: whole weights, and whole gradients in float32."""
    return sum(4 * parameter.numel() * (1 + parameter.requires_grad) for parameter in module.parameters())


@torch.no_grad()
def _spread(full: Tensor, parameter: Tensor, ranks: Ranks) -> None:
    """The rows of the first rank's `full` to those who own them in `parameter`."""
    device = parameter.device
    sent = full.to(device) if ranks.is_first else torch.empty(full.shape, dtype=full.dtype, device=device)
    dist.broadcast(sent, 0)
    own(parameter).copy_(sent[own_rows(parameter)])


def own(tensor: Tensor) -> Tensor:
    """This rank's rows; a tensor that is not split is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> slice:
    """Which rows of the full tensor this rank has."""
    if not isinstance(tensor, DTensor):
        return slice(0, len(tensor))
    most = -(-len(tensor) // tensor.device_mesh.size())
    first = min(tensor.device_mesh.get_local_rank() * most, len(tensor))
    return slice(first, min(first + most, len(tensor)))


def split_like(full: Tensor, parameter: Tensor) -> Tensor:
    """The inverse of `whole`: `full` split between the ranks as `parameter` is. No rank asks another for anything."""
    if not isinstance(parameter, DTensor):
        return full
    rows = full[own_rows(parameter)].to(parameter.device, copy=True)
    return DTensor.from_local(
        rows,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def collect(tensors: Iterable[tuple[str, Tensor]], ranks: Ranks, *, to_host: bool = False) -> dict[str, Tensor]:
    """Full tensors by name at the first rank, in host memory where they were split or `to_host`; empty elsewhere.

    One at a time: beyond its own parts, no rank but the first holds more than a single full tensor.
    """
    found = {}
    for name, tensor in tensors:
        full = whole(tensor.detach())
        if ranks.is_first:
            found[name] = full.cpu() if to_host or isinstance(tensor, DTensor) else full
    return found
