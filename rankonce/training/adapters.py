"""Training of adapters: a frozen backbone, low-rank weights beside its linear layers (LoRA, QLoRA).

The backbone may be held in 4 or 8 bits; the adapter's weights are FP32 all the same.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

from rankonce.errors import MissingDependencyError, TrainingError
from rankonce.model.adapters import inject_adapter, is_adapter, load_adapter, read_adapter
from rankonce.model.precision import PRECISIONS, loading_options, settle_4bit_layers

Quantize = Literal["none", "nf4", "int8"]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """An adapter that is trained over a frozen checkpoint (Hu et al. 2021; Dettmers et al. 2023).

    Attributes:
        name: of the domain that it is for.
        rank: columns of the two factors beside a weight.
        alpha: their product is scaled by ``alpha / rank``; ``None`` is twice the rank.
        dropout: share of a layer's inputs that the factors do not see in training.
        targets: names of linear layers, such as ``q_proj``; ``None`` is all of the decoder.
        quantize: how the backbone is held while the adapter learns.
    """

    name: str = "default"
    rank: int = 16
    alpha: int | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    quantize: Quantize = "none"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise TrainingError(f"rank: should be 1 or more, is {self.rank}")
        if not 0 <= self.dropout < 1:
            raise TrainingError(f"dropout: should be in 0..1, is {self.dropout}")
        if self.quantize not in ("none", "nf4", "int8"):
            raise TrainingError(f"quantize: should be none, nf4 or int8, is {self.quantize!r}")

    @property
    def precision(self) -> str:
        """The precision of the backbone, as a name of ``PRECISIONS``."""
        return "fp32" if self.quantize == "none" else self.quantize


def load_network(source: str | Path, adapter: AdapterConfig | None, *, base: str | None) -> Any:
    """Load what a stage trains.

    Args:
        source: a checkpoint, or the folder of a stage that trained the adapter before.
        adapter: ``None`` trains the whole model.
        base: the checkpoint under the adapter.

    Returns:
        A transformers model in FP32 but for quantised linear layers; with an adapter nothing else
        has gradients.

    Raises:
        RankOnceError: the adapter finds no layers, or a library is missing.
    """
    if adapter is None or base is None:
        return AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, attn_implementation="eager"
        )
    network = _load_backbone(base, adapter)
    if is_adapter(source):
        load_adapter(network, read_adapter(source, name=adapter.name), trainable=True)
    else:
        _start_adapter(network, adapter)
    # The path in the adapter's files should hold from any working directory.
    settings = network.peft_config[network.active_adapters()[0]]
    settings.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    return network


def _load_backbone(base: str, adapter: AdapterConfig) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Norms and embeddings stay in FP32, which is what the adapter's gradients are made of.
    precision = replace(PRECISIONS[adapter.precision], dtype=torch.float32)
    network = AutoModelForCausalLM.from_pretrained(
        base, attn_implementation="eager", **loading_options(precision, device)
    )
    if getattr(network, "is_loaded_in_4bit", False):
        settle_4bit_layers(network)
    return network


def _start_adapter(network: Any, adapter: AdapterConfig) -> None:
    """Add an adapter that changes nothing yet: one factor is random, the other zero."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingDependencyError(error.name or "peft", extra="train") from error

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha if adapter.alpha is not None else 2 * adapter.rank,
        lora_dropout=adapter.dropout,
        target_modules="all-linear" if adapter.targets is None else list(adapter.targets),
    )
    try:
        inject_adapter(network, config, f"adapter-{adapter.name}")
    except ValueError as error:
        raise TrainingError(f"targets: {' '.join(str(error).split())[:300]}") from error
