"""The checks of `tests/gpu`, run one after the other in this process: what `make test-gpu` runs under pytest."""

import traceback
from collections.abc import Iterator

from benchmarks.gpu.device import Context
from benchmarks.gpu.record import Figure


def checks(context: Context) -> Iterator[Figure]:
    """How many of the checks hold, and one figure for each that does not."""
    from tests.gpu.checks import CHECKS

    passed = begun = 0
    failures: list[Figure] = []
    for name, check in CHECKS.items():
        if context.left() < 2:
            break
        begun += 1
        try:
            check(context.device.torch_device)
            passed += 1
        except Exception as error:
            traceback.print_exc()
            message = " ".join(str(error).split())[:200]
            failures.append(Figure(figure="a check does not hold", case=f"{name}: {message}", ours=0, at_least=1))
    skipped = f", {len(CHECKS) - begun} not begun in time" if begun < len(CHECKS) else ""
    yield Figure(
        figure="checks that hold", case=f"of {len(CHECKS)}{skipped}", ours=passed, peer=len(CHECKS), at_least=1.0
    )
    yield from failures
