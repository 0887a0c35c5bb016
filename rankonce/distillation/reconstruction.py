"""Choose inputs of a projection and fit its weights anew, by least squares.

After OSSCAR (Meng et al., arXiv 2403.12983). From the paper: pruning of neurons and heads seen
layer by layer as the choice of a projection's inputs that, with the weights fitted anew, changes
its outputs on calibration data least; everything in terms of the products of inputs, H = XᵀX, whose
size does not depend on the data; the change of the error in closed form when an input is removed
or taken back, with low-rank updates of the inverse; and a local search that exchanges inputs.

Not from the paper: inputs are removed one at a time from all of them, and the local search then
exchanges one at a time, the best to take back against the cheapest to remove, until that no longer
pays; its schedule of steps is not followed. The fit is damped towards the weights of before. Layers
are done in their order on inputs that come from the layers already cut; within a layer attention
and MLP see the same pass. In the last layer the score rows alone count.

An error here is that of X (V - W)ᵀ, plus the damping, over that of X Wᵀ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankonce.distillation.calibration_passes import (
    Site,
    attention_sites,
    calibration_passes,
    mlp_sites,
    watch,
)
from rankonce.distillation.shapes import DecoderShape
from rankonce.model.packing import forward_pass
from rankonce.training.data import TokenizedExample

# Of the mean square of the inputs: keeps the inverse well conditioned where neurons are dead.
_DAMPING = 1e-3


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A choice of input blocks and the weights for it.

    Attributes:
        kept: blocks, ascending.
        weight_DN: over all inputs, fp64; 0 at those that were removed.
        error: as a part of the size of the outputs.
        num_exchanges: that the local search made.
    """

    kept: Tensor
    weight_DN: Tensor
    error: float
    num_exchanges: int


def choose_inputs(products_NN: Tensor, weight_DN: Tensor, *, num_kept: int, block: int = 1) -> Fit:
    """Choose which blocks of inputs a projection keeps.

    Args:
        products_NN: XᵀX of the inputs.
        weight_DN: of the projection.
        num_kept: blocks, 1 or more.
        block: neighbouring inputs that go together.
    """
    search = _Search(products_NN, weight_DN, block)
    while search.num_kept > num_kept:
        search.remove(search.cheapest())
    num_exchanges = 0
    # Each exchange lowers the error, so that no choice comes twice; the bound is for rounding.
    while num_kept < search.num_blocks and num_exchanges < search.num_blocks:
        before = search.error
        added = search.best_to_add()
        search.add(added)
        removed = search.cheapest()
        search.remove(removed)
        if search.error >= before * (1 - 1e-9):
            search.add(removed)
            search.remove(added)
            break
        num_exchanges += 1
    weight_DN = search.refit()
    return Fit(
        kept=search.is_kept.nonzero().flatten().cpu(),
        weight_DN=weight_DN,
        error=search.error_of(weight_DN),
        num_exchanges=num_exchanges,
    )


class _Search:
    """The kept inputs with the inverse of their products and the weights fitted for them.

    Attributes:
        inverse: of the products among what is kept; 0 in rows and columns of what is not.
        reach: products times inverse.
        missing: (weights of before - fitted weights) times products.
    """

    def __init__(self, products_NN: Tensor, weight_DN: Tensor, block: int) -> None:
        products = products_NN.double()
        damping = _DAMPING * float(products.diagonal().mean().clamp(min=1e-12))
        eye = torch.eye(len(products), dtype=products.dtype, device=products.device)
        self.products = products + damping * eye
        self.target = weight_DN.double()
        self.inverse = torch.linalg.inv(self.products)
        self.reach = eye
        self.weight = self.target.clone()
        self.missing = torch.zeros_like(self.target)
        self.block = block
        self.num_blocks = len(products) // block
        self.is_kept = torch.ones(self.num_blocks, dtype=torch.bool, device=products.device)
        self.size = float(((self.target @ self.products) * self.target).sum())

    @property
    def num_kept(self) -> int:
        return int(self.is_kept.sum())

    @property
    def error(self) -> float:
        return float(((self.target - self.weight) * self.missing).sum())

    def _columns(self, block: int) -> slice:
        return slice(block * self.block, (block + 1) * self.block)

    def _by_block(self, matrix_DN: Tensor) -> Tensor:
        """Cut columns into blocks: blocks x block x D."""
        return matrix_DN.view(len(matrix_DN), self.num_blocks, self.block).permute(1, 2, 0)

    def _quotients(self, matrix_DN: Tensor, blocks: Tensor, is_counted: Tensor) -> Tensor:
        """Return tr(Mᵀ B⁻¹ M) of every block that counts."""
        eye = torch.eye(self.block, dtype=blocks.dtype, device=blocks.device)
        blocks = torch.where(is_counted[:, None, None], blocks, eye)
        parts = self._by_block(matrix_DN)
        quotients: Tensor = (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))
        return quotients

    def cheapest(self) -> int:
        """Find the block whose removal, the others fitted anew, costs least."""
        count, size = self.num_blocks, self.block
        blocks = self.inverse.view(count, size, count, size).diagonal(dim1=0, dim2=2)
        cost = self._quotients(self.weight, blocks.permute(2, 0, 1), self.is_kept)
        return int(torch.where(self.is_kept, cost, torch.inf).argmin())

    def best_to_add(self) -> int:
        """Find the removed block that lowers the error most when it comes back."""
        count, size = self.num_blocks, self.block
        blocks = self.products.view(count, size, count, size).diagonal(dim1=0, dim2=2)
        known = self.reach.view(count, size, -1) @ self._by_block(self.products).mT
        gain = self._quotients(self.missing, blocks.permute(2, 0, 1) - known, ~self.is_kept)
        return int(torch.where(self.is_kept, -torch.inf, gain).argmax())

    def remove(self, block: int) -> None:
        """Take a block out and fit the others anew."""
        at = self._columns(block)
        share = torch.linalg.solve(self.inverse[at, at], self.inverse[at])
        weight, reach = self.weight[:, at].clone(), self.reach[:, at].clone()
        self.weight -= weight @ share
        self.missing += weight @ (share @ self.products)
        self.reach -= reach @ share
        self.inverse -= self.inverse[:, at].clone() @ share
        self.weight[:, at] = 0
        self.inverse[at] = 0
        self.inverse[:, at] = 0
        self.is_kept[block] = False

    def add(self, block: int) -> None:
        """Take a block back and fit all anew."""
        at = self._columns(block)
        step = -(self.inverse @ self.products[:, at])
        step[at] += torch.eye(self.block, dtype=step.dtype, device=step.device)
        share = torch.linalg.solve(self.products[at] @ step, step.T)
        missing = self.missing[:, at].clone()
        self.weight += missing @ share
        self.missing -= missing @ (share @ self.products)
        self.reach += (self.products @ step) @ share
        self.inverse += step @ share
        self.is_kept[block] = True

    def refit(self) -> Tensor:
        """Fit the kept inputs at once, free of what rounding the updates have gathered."""
        rows = self.is_kept.repeat_interleave(self.block).nonzero().flatten()
        goal = (self.target @ self.products)[:, rows]
        weight = torch.zeros_like(self.target)
        weight[:, rows] = torch.linalg.solve(self.products[rows][:, rows], goal.T).T
        return weight

    def error_of(self, weight_DN: Tensor) -> float:
        """Return the error of weights as a part of the size of the outputs."""
        difference = weight_DN - self.target
        error = float(((difference @ self.products) * difference).sum())
        return error / self.size if self.size else 0.0


@torch.no_grad()
def reconstruct_network(
    network: Any,
    examples: Sequence[TokenizedExample],
    *,
    num_groups: int,
    num_neurons: int,
    on_layer: Callable[[int, list[Fit]], None] = lambda _, __: None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Choose heads and neurons layer by layer and write the fitted projections into the network.

    Args:
        network: with segment attention and its own layers; changed in place: columns of what was
            removed are 0 in the output and down projections.
        num_groups, num_neurons: that each layer keeps.
        on_layer: is told each layer's fits.

    Returns:
        groups, neurons: what each layer keeps.
    """
    shape = DecoderShape.of(network.config)
    groups, neurons = [], []
    count = shape.num_hidden_layers
    for number in range(count):
        sites = [attention_sites(network)[number], mlp_sites(network)[number]]
        attention, mlp = _gather_products(
            network, sites, examples, description=f"layer {number + 1} of {count}"
        )
        fits = []
        for site, products_NN, num_kept, block in (
            (sites[0], attention, num_groups, shape.heads_per_group * shape.head_dim),
            (sites[1], mlp, num_neurons, 1),
        ):
            weight: Tensor = site.module.weight  # type: ignore[assignment]
            fit = choose_inputs(products_NN, weight, num_kept=num_kept, block=block)
            weight.copy_(fit.weight_DN)
            fits.append(fit)
        groups.append(fits[0].kept)
        neurons.append(fits[1].kept)
        on_layer(number, fits)
    return tuple(groups), tuple(neurons)


def _gather_products(
    network: Any,
    sites: Sequence[Site],
    examples: Sequence[TokenizedExample],
    *,
    description: str,
) -> list[Tensor]:
    """Sum XᵀX of the inputs of sites over all passes, fp64."""
    totals: dict[int, Tensor] = {}
    for one in calibration_passes(examples, network.device, description=description):

        def see(number: int, x_TN: Tensor, one: Any = one) -> None:
            rows_TN, _ = one.counted(x_TN[0], score_rows=sites[number].score_rows)
            rows_TN = rows_TN.double()
            found = rows_TN.T @ rows_TN
            totals[number] = totals[number] + found if number in totals else found

        with watch(sites, see):
            forward_pass(network, one.batch.batch)
    return [totals[number] for number in range(len(sites))]
