"""A law of loss by size and data, fitted to a few points and asked for another one.

    L(N, D) = E + (N0 / N)^a + (D0 / D)^b

after Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", approach 3: least
squares of log L under a Huber loss, from several starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from rankonce.errors import DataError, MissingDependencyError
from rankonce.prompts.features import Floats

# Beyond this distance in log L a point counts linearly, as in the paper.
_HUBER = 1e-3
# E as a part of the smallest loss, and exponents, from which a fit begins.
_STARTS = tuple(product((0.5, 0.8, 0.95), (0.3, 1.0), (0.3, 1.0)))
# Logarithms of a term at the middle of the grid, and exponents.
_BOUNDS = ((-12.0, 3.0), (0.01, 4.0))
_NUM_PARAMETERS = 5
# The numbers as the fit has them, and what share of its range away from a bound one lies on it.
_NAMES = ("E", "the term of size", "the term of data", "a", "b")
_ON_BOUND = 1e-4


@dataclass(frozen=True, kw_only=True)
class Point:
    """A loss that was measured.

    Attributes:
        size: N, weights that are no embedding.
        data: D, requests that were learnt from.
        losses: in nats, one a seed.
    """

    size: float
    data: float
    losses: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """The law with its numbers.

    Attributes:
        floor: E, what neither size nor data take away, in nats.
        size_scale, size_power: N0 and a.
        data_scale, data_power: D0 and b.
    """

    floor: float
    size_scale: float
    size_power: float
    data_scale: float
    data_power: float

    def loss(self, size: float, data: float) -> float:
        """L(N, D) in nats."""
        size_term = (self.size_scale / size) ** self.size_power
        return float(self.floor + size_term + (self.data_scale / data) ** self.data_power)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A loss that nobody has measured yet.

    Attributes:
        law: fitted to the points.
        loss: what it says.
        low, high: where the mean of as many seeds as a point has should lie, with the given
            ``confidence``.
        residual: standard deviation of the points' log L around the law.
        seed_noise: standard deviation of log L between seeds of a point; ``None`` with one seed.
        on_bounds: names of what the fit left on a bound, which the points do not determine.
    """

    law: ScalingLaw
    loss: float
    low: float
    high: float
    confidence: float
    residual: float
    seed_noise: float | None
    on_bounds: tuple[str, ...]


def check_scipy() -> None:
    """Make sure that a law can be fitted, before anything long is computed for it.

    Raises:
        MissingDependencyError: SciPy is not installed.
    """
    try:
        import scipy  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("scipy", extra="bench") from error


def fit_law(points: Sequence[Point]) -> ScalingLaw:
    """Fit the law.

    Args:
        points: more than the law has numbers, of at least two sizes and two amounts of data.

    Raises:
        DataError: there are too few points.
    """
    fit = _Fit(points)
    return fit.law(fit.best())


def predict_loss(
    points: Sequence[Point],
    *,
    size: float,
    data: float,
    confidence: float = 0.9,
    num_samples: int = 500,
    seed: int = 0,
) -> Prediction:
    """Fit the law and say where another point should lie.

    The interval is a parametric bootstrap: the fitted losses are disturbed by as much as the points
    lie off the law, or as much as the mean of their seeds does, whichever is more; the law is
    fitted again, and what it says is disturbed once more. Both deviations are known from few
    numbers, so their squares are drawn too, from their inverse χ²: tails are those of Student's t.
    It counts the noise of seeds and a law that bends; it knows nothing of a law that breaks outside
    the grid.

    Raises:
        DataError: there are too few points, or they differ in their number of seeds.
    """
    fit = _Fit(points)
    num_seeds = len(points[0].losses)
    seed_noise = _noise_of_seeds(points)
    best = fit.best()
    fitted = fit.log_losses(best)
    freedom = len(points) - _NUM_PARAMETERS
    residual = float(np.sqrt(np.sum((fit.targets - fitted) ** 2) / freedom))
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(num_samples):
        spread = _draw_deviation(random, residual, freedom)
        if seed_noise is not None:
            of_seeds = _draw_deviation(random, seed_noise, len(points) * (num_seeds - 1))
            spread = max(spread, of_seeds / num_seeds**0.5)
        again = fit.solve(fitted + spread * random.standard_normal(len(points)), best)[0]
        drawn.append(fit.law(again).loss(size, data) * np.exp(spread * random.standard_normal()))
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
    law = fit.law(best)
    return Prediction(
        law=law,
        loss=law.loss(size, data),
        low=low,
        high=high,
        confidence=confidence,
        residual=residual,
        seed_noise=seed_noise,
        on_bounds=fit.on_bounds(best),
    )


def _draw_deviation(random: np.random.Generator, deviation: float, freedom: int) -> float:
    return float(deviation * np.sqrt(freedom / random.chisquare(freedom)))


def _noise_of_seeds(points: Sequence[Point]) -> float | None:
    """Standard deviation of log L between the seeds of a point, pooled over the points."""
    if len({len(point.losses) for point in points}) > 1:
        raise DataError("points: should all have the same number of losses, one a seed")
    if len(points[0].losses) == 1:
        return None
    return float(np.sqrt(np.mean([np.var(np.log(point.losses), ddof=1) for point in points])))


class _Fit:
    """Points as logarithms around their middle, in which the law's numbers barely depend on each
    other: (log E, log of each term at the middle, a, b)."""

    def __init__(self, points: Sequence[Point]) -> None:
        if len(points) <= _NUM_PARAMETERS:
            raise DataError(
                f"points: should be more than {_NUM_PARAMETERS}, the numbers of the law, "
                f"are {len(points)}"
            )
        for name in ("size", "data"):
            if len({getattr(point, name) for point in points}) < 2:
                raise DataError(f"points: should have at least two different values of {name}")
        self.targets: Floats = np.log([np.mean(p.losses) for p in points])
        sizes, data = (np.log([getattr(p, name) for p in points]) for name in ("size", "data"))
        self._middle = (float(sizes.mean()), float(data.mean()))
        self._sizes: Floats = sizes - self._middle[0]
        self._data: Floats = data - self._middle[1]

    def log_losses(self, numbers: Floats) -> Floats:
        """What the law says of the points."""
        floor, size_term, data_term, a, b = numbers
        terms = (size_term - a * self._sizes, data_term - b * self._data)
        said: Floats = np.logaddexp(floor, np.logaddexp(*terms))
        return said

    def solve(self, targets: Floats, start: Floats) -> tuple[Floats, float]:
        """Fit from one start; return the numbers and the cost."""
        from scipy.optimize import least_squares

        low, high = _bounds(targets)
        found: Any = least_squares(
            lambda numbers: self.log_losses(numbers) - targets,
            np.clip(start, low + 1e-6, high - 1e-6),
            bounds=(low, high),
            loss="huber",
            f_scale=_HUBER,
        )
        return found.x, float(found.cost)

    def best(self) -> Floats:
        """Fit from every start and keep what fits best."""
        smallest = float(np.exp(self.targets.min()))
        middle = float(np.exp(self.targets.mean()))
        fits = []
        for share, a, b in _STARTS:
            rest = np.log((middle - share * smallest) / 2)
            fits.append(
                self.solve(self.targets, np.array([np.log(share * smallest), rest, rest, a, b]))
            )
        return min(fits, key=lambda fit: fit[1])[0]

    def on_bounds(self, numbers: Floats) -> tuple[str, ...]:
        """Name what lies on a bound."""
        low, high = _bounds(self.targets)
        away = np.minimum(numbers - low, high - numbers)
        return tuple(np.array(_NAMES)[away < _ON_BOUND * (high - low)].tolist())

    def law(self, numbers: Floats) -> ScalingLaw:
        """Write the numbers as the law has them."""
        floor, size_term, data_term, a, b = numbers.tolist()
        return ScalingLaw(
            floor=float(np.exp(floor)),
            size_scale=float(np.exp(self._middle[0] + size_term / a)),
            size_power=a,
            data_scale=float(np.exp(self._middle[1] + data_term / b)),
            data_power=b,
        )


def _bounds(targets: Floats) -> tuple[Floats, Floats]:
    """The smallest and largest numbers that a fit may give."""
    term, power = _BOUNDS
    # E is less than every loss, also where few points make a drawn one tiny.
    most = float(targets.min())
    low = np.array([min(term[0], most - 1), term[0], term[0], power[0], power[0]])
    return low, np.array([most, term[1], term[1], power[1], power[1]])
