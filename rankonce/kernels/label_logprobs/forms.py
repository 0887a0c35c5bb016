"""The token ids of labels, on the host and on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# The Triton path keeps the logits of all forms of a row in registers.
MAX_FORMS = 256


@dataclass(frozen=True, kw_only=True)
class LabelForms:
    """The surface forms of L labels, one after the other: N token ids.

    Attributes:
        ids, labels: token id and label of every form, for the host.
        ids_N, labels_N: the same on the device, int64.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    num_labels: int
    ids_N: Tensor
    labels_N: Tensor


def place_forms(label_ids: Sequence[Sequence[int]], device: torch.device) -> LabelForms:
    """Lay out the forms of labels; the copy to the device is made once for the same labels."""
    return _place_forms(tuple(map(tuple, label_ids)), device)


@lru_cache(maxsize=1024)
def _place_forms(label_ids: tuple[tuple[int, ...], ...], device: torch.device) -> LabelForms:
    ids = tuple(token_id for forms in label_ids for token_id in forms)
    labels = tuple(label for label, forms in enumerate(label_ids) for _ in forms)
    # A tensor made in inference mode could not take part in training later.
    with torch.inference_mode(False):
        return LabelForms(
            ids=ids,
            labels=labels,
            num_labels=len(label_ids),
            ids_N=torch.tensor(ids, dtype=torch.long, device=device),
            labels_N=torch.tensor(labels, dtype=torch.long, device=device),
        )
