"""Running the cases of a set, in one process or several, and a file of results that grows."""

import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path

import torch

from resdiag.errors import ResdiagError, UsageError
from resdiag.pathologies.grammar import Case
from resdiag.pathologies.result import Result, try_case


def run_cases(
    cases: Sequence[Case],
    *,
    jobs: int = 1,
    to: Path | None = None,
    tell: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Try every case that `to` does not hold yet; each result is appended to it at once.

    Args:
        cases: The cases.
        jobs: Processes, each with one thread of PyTorch; 1 runs them here.
        to: File with one JSON object per line; None keeps nothing.
        tell: Called with every result, those of the file first.

    Returns:
        The results in the order of the cases. They do not depend on `jobs`.

    Raises:
        UsageError: The file holds something else.
        ResdiagError: A process died.
    """
    known = {_key(result.case): result for result in (read_results(to) if to else [])}
    open_cases = [case for case in cases if _key(case) not in known]
    for case in cases:
        if _key(case) in known:
            tell(known[_key(case)])
    for result in _try_all(open_cases, jobs):
        known[_key(result.case)] = result
        if to is not None:
            _append(to, result)
        tell(result)
    return [known[_key(case)] for case in cases]


def read_results(path: Path) -> list[Result]:
    """The results in a file; empty where there is none. A last line that was cut off is left out.

    Raises:
        UsageError: It holds something else, or its folder does not exist.
    """
    if not path.parent.is_dir():
        raise UsageError(f"no such folder: {path.parent}")
    if not path.exists():
        return []
    text = path.read_text("utf-8")
    complete = text.splitlines()[: text.count("\n")]
    found = []
    for number, line in enumerate(complete, 1):
        try:
            found.append(Result.from_dict(json.loads(line)))
        except (ValueError, TypeError, AttributeError) as error:
            hint = "--to takes a new file, or one that this command has written"
            raise UsageError(f"{path}, line {number}: not a result of the suite", hint) from error
    return found


def _append(path: Path, result: Result) -> None:
    """Write one line behind the last complete one."""
    line = json.dumps(result.to_dict(), allow_nan=False, separators=(",", ":")) + "\n"
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.seek(file.read().rfind(b"\n") + 1)
        file.truncate()
        file.write(line.encode())


def _key(case: Case) -> tuple[str, int, str]:
    return case.set, case.drawn, case.name


def _try_all(cases: Sequence[Case], jobs: int) -> Iterator[Result]:
    if jobs == 1 or len(cases) < 2:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from map(try_case, cases)
        finally:
            torch.set_num_threads(threads)
        return
    # a forked child of a process whose threads run would inherit their locks
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        try:
            yield from _as_they_finish(pool, cases, 2 * jobs)
        except BrokenProcessPool as error:
            raise ResdiagError(
                "a process of the suite died", "repeat the command: with --to it goes on"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _as_they_finish(
    pool: ProcessPoolExecutor, cases: Sequence[Case], ahead: int
) -> Iterator[Result]:
    """Results in the order in which they are ready; few cases wait at a time."""
    left = iter(cases)
    running: set[Future[Result]] = {pool.submit(try_case, case) for case in islice(left, ahead)}
    while running:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        running |= {pool.submit(try_case, case) for case in islice(left, len(done))}
        yield from (future.result() for future in done)
