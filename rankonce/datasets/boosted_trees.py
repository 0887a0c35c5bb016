"""Boosted trees over columns of rows (LightGBM: Ke et al., 2017)."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankonce.errors import MissingDependencyError
from rankonce.prompts.features import Floats, Ints

_MAX_TREES = 1000
_PATIENCE_TREES = 50
# Small steps and strong smoothing: 34k rows are few for 40 columns. One thread, because threads
# that wait for each other at every split are many times slower wherever the cores are shared.
_PARAMETERS = {
    "learning_rate": 0.03,
    "num_leaves": 15,
    "min_data_in_leaf": 100,
    "feature_fraction": 0.5,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "lambda_l2": 10.0,
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 1,
    "verbosity": -1,
}


def fit_trees(
    columns_RF: Floats,
    labels_R: Ints,
    *,
    early_R: NDArray[np.bool_],
    seeds: Sequence[int] = (1,),
    num_labels: int = 2,
    categories: Sequence[int] = (),
) -> Callable[[Floats], Floats]:
    """Fit trees that predict labels of 0, 1, ...

    The number of trees is the one of least log-loss on the rows that are not early; then all rows
    are fitted with it.

    Args:
        columns_RF: nan where something is not known.
        early_R: rows that choose the number of trees are not among these.
        seeds: of the draws of rows and columns; the prediction is the mean over them.
        num_labels: L, how many labels there may be.
        categories: columns whose numbers are codes, in no order.

    Returns:
        A function from columns to P(label), (rows, L).

    Raises:
        MissingDependencyError: LightGBM is not installed.
    """
    try:
        import lightgbm
    except ModuleNotFoundError as error:
        raise MissingDependencyError("lightgbm", extra="eval") from error

    objective: dict[str, Any] = (
        {"objective": "binary"}
        if num_labels == 2
        else {"objective": "multiclass", "num_class": num_labels}
    )
    kinds: Any = list(categories)

    def fit(seed: int) -> Any:
        parameters = {**_PARAMETERS, **objective, "seed": seed}
        part = lightgbm.Dataset(columns_RF[early_R], labels_R[early_R], categorical_feature=kinds)
        rest = lightgbm.Dataset(columns_RF[~early_R], labels_R[~early_R], reference=part)
        trial = lightgbm.train(
            parameters,
            part,
            num_boost_round=_MAX_TREES,
            valid_sets=[rest],
            callbacks=[lightgbm.early_stopping(_PATIENCE_TREES, verbose=False)],
        )
        whole = lightgbm.Dataset(columns_RF, labels_R, categorical_feature=kinds)
        return lightgbm.train(parameters, whole, num_boost_round=trial.best_iteration)

    models = [fit(seed) for seed in seeds]

    def predict(columns: Floats) -> Floats:
        shares = np.mean([model.predict(columns, num_threads=1) for model in models], axis=0)
        return np.asarray(np.stack([1 - shares, shares], axis=1) if num_labels == 2 else shares)

    return predict
