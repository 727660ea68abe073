"""Tasks on torch's threads: every task once, on as many threads as torch has, and errors come out."""

import threading

import pytest
import torch

from memzoo.kernels import threads

MUCH = threads.SERIAL_WORK + 1


@pytest.fixture(params=["openmp", "python"])
def two_threads(request, monkeypatch):
    if request.param == "openmp" and threads._openmp() is None:
        pytest.skip("torch has no OpenMP library with GOMP_parallel here")
    if request.param == "python":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("tasks", [1, 2, 7])
def test_every_task_runs_once(two_threads, tasks):
    runs = [0] * tasks

    def kernel(runs, first, last):
        for task in range(first, last):
            runs[task] += 1

    threads.run_tasks(kernel, (runs,), tasks, MUCH)
    assert runs == [1] * tasks


def test_little_work_stays_on_this_thread_and_much_does_not(two_threads):
    seen = set()
    both = threading.Barrier(2)

    def kernel(wait, first, last):
        seen.add(threading.get_ident())
        if wait:
            both.wait(timeout=20)  # only two threads at once get past it

    threads.run_tasks(kernel, (False,), 2, threads.SERIAL_WORK)
    assert seen == {threading.get_ident()}
    threads.run_tasks(kernel, (True,), 2, MUCH)
    assert len(seen) == 2


def test_an_error_of_any_thread_comes_out(two_threads):
    def kernel(first, last):
        if last == 4:
            raise KeyError("the last task")

    with pytest.raises(KeyError, match="the last task"):
        threads.run_tasks(kernel, (), 4, MUCH)
    threads.run_tasks(lambda first, last: None, (), 4, MUCH)  # and the threads go on working
