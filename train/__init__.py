"""Small training programs: ResNets with any attention block, trained on images."""

import sys
from importlib.util import find_spec

# The modules of the extra `train`.
NEEDED = (
    *("filelock", "matplotlib", "optax", "orbax", "pooch", "requests", "scipy"),
    *("sklearn", "tqdm", "tyro"),
)


def _check_installed() -> None:
    """Ends a command with one line if the extra is missing.

    Raises:
      ImportError: it is missing, and this is not a command.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if not missing:
        return
    message = (
        "The training commands need packages that are not installed "
        f"({', '.join(missing)}); install the extra train: "
        'pip install -e ".[train]"'
    )
    if sys.argv[0] != "-m":  # As `python -m` sets it until it has found the command.
        raise ImportError(message)
    print(message, file=sys.stderr)
    raise SystemExit(2)


_check_installed()
