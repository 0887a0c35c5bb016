"""What ahead-of-time compilation needs to know of a kernel.

``rankonce.benchmarks.machine_code`` compiles every variant and reads registers, spills and
instructions. Pointers and arguments named strides are taken as divisible by 16, as a launch would
find them.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One specialisation of a kernel, as a launch would compile it.

    Attributes:
        name: operation, shape and dtype, for tables.
        kernel: the ``@triton.jit`` function.
        signature: Triton's type of every argument that is not a constexpr, for example ``*bf16``.
        constexprs: values of the others.
        num_warps, num_stages: launch options.
        min_capability: the oldest chip that it compiles for; 89 where it writes FP8.
        max_capability: the newest chip that this variant is chosen for.
        expects: instructions that its PTX for sm_90 must contain.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int
    num_stages: int
    min_capability: int = 80
    max_capability: int = 1000
    expects: tuple[str, ...] = ()
