"""A learner on one process or several: one processor, one GPU, or many over several nodes.

Every process knows the units of a step and runs its share of the passes; losses and gradients are
sums over all of them, divided by the targets of the whole step. With ``none`` each process holds
the whole model (DDP); with ``fsdp`` weights, gradients and optimizer state are cut among them
(FSDP2: Zhao et al. 2023).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor

from rankonce.errors import MissingDependencyError, NumericsError, TrainingError
from rankonce.model.work import DecoderWork
from rankonce.training.objectives import Learner, Unit
from rankonce.training.steps import share_passes

Sharding = Literal["none", "fsdp"]
# How long processes wait for the first one, which alone writes, renders and measures.
_PATIENCE = timedelta(hours=12)
# A trained step is three times its forward pass: gradients of inputs and of weights.
_STEP_PER_FORWARD = 3.0


class Processes:
    """The processes that run together, as ``torchrun`` or ``accelerate launch`` started them.

    Attributes:
        rank, count: of this process among all of them.
        device: of this process.

    Raises:
        TrainingError: the launch asks for sharding of its own.
    """

    def __init__(self) -> None:
        try:
            from accelerate import Accelerator
            from accelerate.utils import InitProcessGroupKwargs
        except ImportError as error:
            raise MissingDependencyError("accelerate", extra="train") from error

        # Precision belongs to a stage, accelerate's to the process: it is left off there. Without
        # being told of processors, accelerate sees several processes as one each.
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision="no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
        )
        # DDP or nothing: other ways to cut a model are ours to choose.
        launched = self.accelerator.distributed_type.value
        if launched in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            raise TrainingError(
                f"launch: accelerate's {launched} should be off; set sharding to fsdp instead"
            )
        self.rank: int = self.accelerator.process_index
        self.count: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process is here."""
        self.accelerator.wait_for_everyone()

    def sum(self, values: Sequence[float | Tensor]) -> list[float]:
        """Add up numbers over the processes."""
        numbers = torch.stack(
            [torch.as_tensor(one, dtype=torch.float64, device=self.device) for one in values]
        )
        if self.count > 1:
            torch.distributed.all_reduce(numbers)
        return [float(number) for number in numbers]


@dataclass(frozen=True, kw_only=True)
class StepSums:
    """What a step came to, over all processes.

    Attributes:
        loss: mean over the targets.
        num_tokens: that went through the model.
        flop: multiplications and additions of forward and backward.
    """

    loss: float
    num_tokens: int
    flop: float


class ParallelLearner:
    """Runs the passes of a step on every process and sums what they come to.

    Args:
        learner: the same weights on every process; the first one's are taken.
        sharding: ``none`` or ``fsdp``.
        precision: ``fp32``, or ``bf16`` for products in bf16 with weights kept in fp32.
        max_tokens_per_pass: bounds the memory.

    Raises:
        TrainingError: ``fsdp`` is asked of one process or of an architecture without layers.
    """

    def __init__(
        self,
        learner: Learner,
        processes: Processes,
        *,
        sharding: Sharding = "none",
        precision: str = "fp32",
        max_tokens_per_pass: int,
    ) -> None:
        self.learner, self.processes = learner, processes
        self.max_tokens_per_pass = max_tokens_per_pass
        self.is_sharded = sharding == "fsdp"
        self.work = DecoderWork.of(learner.network)
        # A cache of rounded weights would hold the whole model beside a process's part of it.
        self._autocast = torch.autocast(
            processes.device.type,
            dtype=torch.bfloat16,
            enabled=precision == "bf16",
            cache_enabled=not self.is_sharded,
        )
        # What is called in training; DDP is another module around the learner.
        self.module: Any = learner
        if self.is_sharded:
            _shard(learner, processes, rounds=precision == "bf16")
        else:
            self.module = processes.accelerator.prepare_model(learner)

    @property
    def network(self) -> Any:
        """The transformers model."""
        return self.learner.network

    def accumulate_gradients(self, units: Sequence[Unit]) -> StepSums:
        """Leave the gradients of a step's mean loss in the parameters.

        Raises:
            NumericsError: the loss is NaN or infinite, on every process alike.
        """
        taught = [unit for unit in units if unit.num_targets]
        if not taught:
            return StepSums(loss=0.0, num_tokens=0, flop=0.0)
        num_targets = sum(unit.num_targets for unit in taught)
        passes = self._share(taught)
        loss, flop = torch.zeros((), dtype=torch.float64, device=self.processes.device), 0.0
        for number, (part, weight) in enumerate(passes, start=1):
            with self._synchronizes(number == len(passes)):
                batch = self.learner.objective.pack(part, self.processes.device)
                with self._autocast:
                    part_loss = weight * self.module(batch) / num_targets
                # DDP and FSDP average gradients over the processes; the sum is wanted.
                self.processes.accelerator.backward(part_loss * self.processes.count)
            loss += part_loss.detach()
            flop += weight * _STEP_PER_FORWARD * self._forward_flop(batch)
        total, total_flop = self.processes.sum([loss, flop])
        if not abs(total) < float("inf"):
            raise NumericsError(f"loss: is {total}; lower the learning rate or look at the data")
        return StepSums(
            loss=total, num_tokens=sum(unit.num_tokens for unit in taught), flop=total_flop
        )

    @torch.no_grad()
    def mean_loss(self, units: Sequence[Unit]) -> float:
        """Mean loss over the targets of units, without dropout."""
        taught = [unit for unit in units if unit.num_targets]
        if not taught:
            return 0.0
        was_training = self.learner.training
        self.learner.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for part, weight in self._share(taught):
            with self._autocast:
                batch = self.learner.objective.pack(part, self.processes.device)
                total += weight * self.learner(batch)
        self.learner.train(was_training)
        return self.processes.sum([total])[0] / sum(unit.num_targets for unit in taught)

    def gather_weights(self) -> dict[str, Tensor] | None:
        """Collect the weights of a sharded network on the first process; others get an empty one.

        ``None`` where every process has them anyway.
        """
        if not self.is_sharded:
            return None
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: dict[str, Any] = get_model_state_dict(self.network, options=options)
        # Tied weights come under every name and would be written as often.
        own_names = {name for name, _ in self.network.named_parameters()}
        every_name = {name for name, _ in self.network.named_parameters(remove_duplicate=False)}
        return {k: v for k, v in weights.items() if k not in every_name - own_names}

    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradients down to a norm and return what it was."""
        norm = self.processes.accelerator.clip_grad_norm_(self.learner.parameters(), max_norm)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _share(self, units: Sequence[Unit]) -> list[tuple[list[Unit], float]]:
        return share_passes(
            units,
            max_tokens_per_pass=self.max_tokens_per_pass,
            rank=self.processes.rank,
            num_processes=self.processes.count,
        )

    def _synchronizes(self, is_last: bool) -> AbstractContextManager[Any]:
        """Let DDP exchange gradients once a step; FSDP does so pass by pass, to hold its part."""
        if is_last or self.module is self.learner:
            return nullcontext()
        context: AbstractContextManager[Any] = self.module.no_sync()
        return context

    def _forward_flop(self, batch: Any) -> float:
        logits = self.learner.objective.num_logits(batch, self.work.vocabulary)
        return self.work.flop(batch.batch.segment_pass, num_logits=logits)


def _shard(learner: Learner, processes: Processes, *, rounds: bool) -> None:
    """Cut a learner's weights among the processes, layer by layer.

    This is PyTorch's own FSDP2, which accelerate's plugin reaches on GPUs only: what is tested on
    two processors is what runs on GPUs.

    Args:
        rounds: gather the weights of decoder layers in bf16, as their products take them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if processes.count == 1:
        raise TrainingError("sharding: fsdp needs several processes; start them with torchrun")
    layers = getattr(learner.network.base_model, "layers", None)
    if layers is None:
        name = type(learner.network).__name__
        raise TrainingError(f"sharding: {name} has no layers of the usual form; use none")
    for tensor in [*learner.parameters(), *learner.buffers()]:
        on_device = tensor.detach().to(processes.device)
        torch.distributed.broadcast(on_device, src=0)
        tensor.data.copy_(on_device)
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    # Hidden states stay in fp32 between layers, as on one process.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if rounds else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    # Also the root is cut again after its forward: what is gathered once would miss the weights
    # that an average puts in place.
    fully_shard(learner, mesh=mesh, reshard_after_forward=True)
