"""The checkpoint that servers of a load benchmark share, and the ranker that judges them."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoTokenizer

from rankonce.model.sizes import build_model
from rankonce.ranker import EMBEDDED_MODEL, Ranker, RankerConfig


@contextmanager
def shared_checkpoint(model: Path, *, size: str | None, seed: int) -> Iterator[Path]:
    """Give the folder of a checkpoint, or make one with random weights inside this context.

    Args:
        model: a checkpoint, which stands where ``size`` is ``None``.
        size: of random weights; the tokenizer is that of the embedded ranker.

    Raises:
        ModelError: no size has this name.
    """
    if size is None:
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"random-{size}"
        build_model(size, seed=seed).save_pretrained(path)
        AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(path)
        yield path


def load_offline_ranker(model: Path) -> Ranker:
    """Load the ranker whose scores every answer is compared with."""
    return Ranker.from_pretrained(
        model, device="cpu", config=RankerConfig(chat=False, prefix_cache_mb=0)
    )
