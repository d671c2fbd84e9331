"""Many short tasks in worker processes that stay alive, one thread each; what has finished is kept at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from red.demo.parallel import available_cores

from benchmarks.study.lines import Lines


def execute(tasks: Mapping[str, Callable[[], dict]], lines: Lines, *, jobs: int | None = None) -> dict[str, str]:
    """Run the tasks that are missing in `lines`, in their order.

    Args:
        tasks: what makes a result, by the key that it is kept under; can be pickled, such as a functools.partial of a module's function.
        jobs: None: one per core; 1 runs them in this process.

    Returns:
        What went wrong, by key, after everything else has been kept.
    """
    missing = {key: task for key, task in tasks.items() if lines.get(key) is None}
    workers = min(jobs or available_cores(), len(missing))
    print(f"{len(tasks)} cells, {len(missing)} of them to do", flush=True)
    failures: dict[str, str] = {}

    def keep(key: str, result: Callable[[], dict]) -> None:
        try:
            lines.add(key, result())
        except Exception as error:  # one student that cannot be made must not end the table
            failures[key] = f"{type(error).__name__}: {error}"
            print(f"{key} failed: {failures[key]}", flush=True)

    if workers <= 1:
        quiet()
        for key, task in missing.items():
            keep(key, task)
        return failures
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # the workers read them when they import torch
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=quiet) as pool:
        waiting = {pool.submit(task): key for key, task in missing.items()}
        try:
            for future in as_completed(waiting):
                keep(waiting[future], future.result)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return failures


def quiet() -> None:
    """One thread, no progress bars."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
