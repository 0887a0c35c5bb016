"""``python -m rankonce.cli``, as ``torchrun -m`` starts it."""

from rankonce.cli import main

if __name__ == "__main__":
    main()
