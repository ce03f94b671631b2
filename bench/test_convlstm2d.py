from collections.abc import Callable

from bench.cases import Case

OP = "convlstm2d"


def test_convlstm2d(case: Case, threads: int, name: str, check_and_time: Callable[[Case, str, int], None]) -> None:
    check_and_time(case, name, threads)
