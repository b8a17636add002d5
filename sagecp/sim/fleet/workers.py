"""Runs tasks of an experiment in several processes, and says how far they are."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, MutableSequence, Sequence

from sagecp.sim.fleet.experiment import Task, TaskResult

_LOOK_S = 0.2


class StoppedError(Exception):
    """Whoever asked for the task does not want it any more."""


def run_tasks(
    tasks: Sequence[Task], *, job_count: int = 1, on_progress: Callable[[Sequence[float]], None] | None = None
) -> list[TaskResult]:
    """Run tasks and return their results in the tasks' order, whatever the number of processes.

    An exception of a task ends all of them, and so does an interruption.

    Args:
        tasks: What to run.
        job_count: Processes; 1: this one.
        on_progress: Called with the share done of each task, every so often.

    Raises:
        BrokenProcessPool: A process was killed.
    """
    report = on_progress or (lambda _shares: None)
    if job_count <= 1 or len(tasks) <= 1:
        return _run_here(tasks, report)
    context = multiprocessing.get_context("spawn")
    # One share per task, and a last number that tells the workers to stop when it is not 0.
    board = context.RawArray("d", len(tasks) + 1)
    executor = concurrent.futures.ProcessPoolExecutor(
        min(job_count, len(tasks)), context, _start_worker, (board, os.getpid())
    )
    try:
        with _interrupts_held_back():
            # Heavy loads take longest: begun first, they do not run alone at the end.
            order = sorted(range(len(tasks)), key=lambda index: -tasks[index].scale)
            futures = {index: executor.submit(_run_in_worker, index, tasks[index]) for index in order}
        waiting = set(futures.values())
        while waiting:
            done, waiting = concurrent.futures.wait(waiting, _LOOK_S, concurrent.futures.FIRST_EXCEPTION)
            for future in done:
                future.result()
            report(list(board)[:-1])
        return [futures[index].result() for index in range(len(tasks))]
    finally:
        board[-1] = 1.0
        executor.shutdown(cancel_futures=True)


def _run_here(tasks: Sequence[Task], report: Callable[[Sequence[float]], None]) -> list[TaskResult]:
    shares = [0.0] * len(tasks)
    results: list[TaskResult] = []

    def note(share: float) -> None:
        shares[len(results)] = share
        report(shares)

    for task in tasks:
        results.append(task.execute(note))
        shares[len(results) - 1] = 1.0
        report(shares)
    return results


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Let processes that are started meanwhile ignore Ctrl-C, which is for their parent, from the start.

    A stop waits until they are started: one in the middle would leave a worker that was told
    half of what to do, and says so with a traceback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stops: list[int] = []
    ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = signal.signal(signal.SIGTERM, lambda number, _frame: stops.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, ctrl_c)
        signal.signal(signal.SIGTERM, stop)
        if stops:
            signal.raise_signal(signal.SIGTERM)


# -- in a worker -----------------------------------------------------------------


class _Board:
    """Where a worker says how far it is, and reads whether to stop."""

    shares: MutableSequence[float]
    parent_pid: int


def _start_worker(shares: MutableSequence[float], parent_pid: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _Board.shares = shares
    _Board.parent_pid = parent_pid


def _run_in_worker(index: int, task: Task) -> TaskResult:
    shares = _Board.shares

    def note(share: float) -> None:
        if shares[-1] or os.getppid() != _Board.parent_pid:
            raise StoppedError
        shares[index] = share

    note(0.0)
    result = task.execute(note)
    shares[index] = 1.0
    return result
