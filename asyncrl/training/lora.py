"""LoRA: adapters beside the frozen linear layers of a model. The only file that imports `peft`.

    y = W x + scale * B (A x)        W frozen; A [rank, in] and B [out, rank] trained, float32; scale = alpha / rank
                                     (Hu et al., 2106.09685)

B starts at zero, so version 0 is the base model. The rollout actors get W + scale * B A, which is computed for each
update from W as it was loaded: added to W in place it would drift by a rounding at every step. Or they get A and
scale * B alone, and add their product to the base that they started with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from asyncrl.config.schema import LoraConfig
from asyncrl.models.loading import decoder_layers
from asyncrl.training.sharding import Ranks, collect, own, own_rows
from asyncrl.weights.buckets import LORA_A, LORA_B
from asyncrl.weights.dtensor import replicate

FOLDER = "adapter"
"""Within a checkpoint: engines take every *.safetensors beside the model's for weights."""

_TENSORS, _SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
"""What `peft` puts before the names of the model that it wraps."""


class Adapters:
    """The adapters of one model. They are part of it, so they are split between ranks with it."""

    def __init__(self, model: nn.Module, settings: LoraConfig, *, bfloat16: bool = False) -> None:
        """Puts adapters of the dtype of `model` into it, and freezes the rest.

        With `bfloat16` the frozen layers are kept in it: a matrix product under autocast would round them anyhow.
        Raises `ValueError` for targets that the model lacks or that are no linear layers of its decoder layers,
        `ImportError` without `peft`.
        """
        self._settings, self._model = settings, model
        self._scale = settings.alpha / settings.rank
        self._config = _inject(model, settings)
        inside = [module for layer in decoder_layers(model) for module in layer.modules()]
        self._layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
        _check_targets(model, self._layers, inside, settings)
        if bfloat16:
            for module in inside:
                if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                    module.to(torch.bfloat16)

    def named(self) -> dict[str, nn.Parameter]:
        """The adapters' parameters by their names in the model."""
        return {
            name: parameter for name, parameter in self._model.named_parameters() if name.endswith((LORA_A, LORA_B))
        }

    def published(self) -> Mapping[str, Tensor]:
        """What the rollout actors get, as `lora.sync` says: merged weights, or the adapters with the scale in B."""
        if self._settings.sync == "merged":
            return self.merged(dict(self._model.named_parameters()))
        return {
            name: parameter.detach() * self._scale if name.endswith(LORA_B) else parameter
            for name, parameter in self.named().items()
        }

    def merged(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The weights that named tensors of the model stand for, under the names of the model without adapters."""
        return _Merged(tensors, self._scale)

    def without(self, score: Callable[[Any], tuple[Tensor, Tensor]]) -> Callable[[Any], tuple[Tensor, Tensor]]:
        """`score` by the frozen base alone: the reference model of a KL term, for no memory."""

        def score_base(item: Any) -> tuple[Tensor, Tensor]:
            with self._off():
                return score(item)

        return score_base

    @contextmanager
    def _off(self) -> Iterator[None]:
        # The library's own switch also takes the gradient away from the adapters, which split parameters do not follow.
        for layer in self._layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self._layers:
                layer._disable_adapters = False

    def tensors(self, ranks: Ranks) -> dict[str, Tensor]:
        """Whole, by the names of `peft`, at the first rank; nothing elsewhere. Every rank."""
        return collect(self._named().items(), ranks)

    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Writes what `tensors` gave into a checkpoint, as `peft` loads it."""
        (folder / FOLDER).mkdir()
        self._config.save_pretrained(folder / FOLDER)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / FOLDER / _TENSORS, metadata={"format": "pt"})

    @torch.no_grad()
    def load(self, checkpoint: Path) -> None:
        """The adapters of a checkpoint, whatever number of ranks saved them.

        Raises `ValueError` if it has others than this model, or none.
        """
        folder = checkpoint / FOLDER
        if not folder.is_dir():
            raise ValueError(
                f"{checkpoint} was saved without adapters and lora.rank is {self._settings.rank}: resume with "
                "lora.rank=0, or start a new run from it with model.path"
            )
        found, named = load_file(folder / _TENSORS), self._named()
        saved = json.loads((folder / _SETTINGS).read_text())
        same = (saved["r"], saved["lora_alpha"]) == (self._settings.rank, self._settings.alpha)
        if not same or _shapes(found) != _shapes(named):
            raise ValueError(
                f"{checkpoint} has adapters of rank {saved['r']} and alpha {saved['lora_alpha']} for "
                f"{sorted(saved['target_modules'])}, which are not those of the [lora] section: resume with the "
                "settings that the run began with"
            )
        for name, parameter in named.items():
            own(parameter).copy_(found[name][own_rows(parameter)])

    def _named(self) -> dict[str, Tensor]:
        """By the names of `peft`'s files."""
        return {_PREFIX + name.replace(".default.", "."): parameter for name, parameter in self.named().items()}


def check_peft() -> None:
    """Raises `ValueError` where the library is not installed: of a whole run, before its actors find out."""
    try:
        metadata.distribution("peft")  # a folder of that name is no package
    except metadata.PackageNotFoundError:
        raise ValueError(
            "lora.rank above 0 needs the package peft, which is not installed: pip install 'asyncrl[lora]', or set "
            "lora.rank=0"
        ) from None


def refuse_adapters(checkpoint: Path) -> None:
    """Raises `ValueError` if a checkpoint has adapters, for a learner that has none."""
    if (checkpoint / FOLDER).is_dir():
        raise ValueError(
            f"{checkpoint} was saved with adapters and lora.rank is 0: resume with the [lora] settings that the run "
            "began with, or start a new run from it with model.path"
        )


class _Merged(Mapping[str, Tensor]):
    """Each tensor is computed when it is asked for, so no second copy of the model exists. Of split tensors the result
    is split in the same way, and every rank asks for the same ones in the same order."""

    def __init__(self, tensors: Mapping[str, Tensor], scale: float) -> None:
        self._scale = scale
        self._factors = {
            f"{name.removesuffix(LORA_A)}.weight": (tensor, tensors[name.replace(LORA_A, LORA_B)])
            for name, tensor in tensors.items()
            if name.endswith(LORA_A)
        }
        self._base = {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in tensors.items()
            if not name.endswith((LORA_A, LORA_B))
        }

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        base = self._base[name]
        if base.is_floating_point():
            base = base.float()
        if name not in self._factors:
            return base
        a, b = self._factors[name]
        return base + self._scale * (b @ replicate(a))

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def _inject(model: nn.Module, settings: LoraConfig) -> Any:
    """Changes `model` in place; returns the library's configuration, for `save`."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("lora.rank above 0 needs the package peft: pip install 'asyncrl[lora]'") from error
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=getattr(model, "name_or_path", None),
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=settings.targets,
        lora_dropout=0.0,  # the learner's log-probs would not be the engine's
        bias="none",
    )
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        reason = " ".join(str(error).split())  # some of them show a module, line by line
        raise ValueError(
            f"lora.targets {settings.targets!r} does not fit {type(model).__name__}: {reason}; set "
            'lora.targets="all-linear", or name linear layers'
        ) from error
    config.inference_mode = True  # of what is published
    return config


def _check_targets(model: nn.Module, layers: list[Any], inside: list[nn.Module], settings: LoraConfig) -> None:
    """An adapter on the head would have no effect, as the log-probs are computed from the head's weight alone."""
    within = set(map(id, inside))
    for name, module in model.named_modules():
        if any(module is layer for layer in layers) and not (
            id(module) in within and isinstance(module.base_layer, nn.Linear)
        ):
            raise ValueError(
                f"adapters go to linear layers of the decoder layers, and lora.targets {settings.targets!r} names "
                f"{name!r}: leave it out"
            )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
