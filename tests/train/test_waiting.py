import time
from contextlib import nullcontext

import pytest
import torch

from zoo.train.device import workers_of
from zoo.train.prefetch import Slice, prefetch, side_stream
from zoo.train.waiting import DataClock, idle, workers_that_suffice

CPU = torch.device("cpu")


def test_waiting_for_batches_is_counted_and_working_with_them_is_not():
    def slow():
        for number in range(3):
            time.sleep(0.02)
            yield number

    clock, seen = DataClock(CPU), []
    for number in clock.timed(slow()):
        seen.append(number)
        time.sleep(0.05)
    assert seen == [0, 1, 2]
    assert 0.06 <= clock.read() < 0.11
    assert clock.read() == 0


def test_so_many_workers_suffice():
    # 4 workers make a batch in 2 s, of which the device needs 0.5: it waits for three quarters
    assert workers_that_suffice(0.75, 4) == 16
    # no worker: reading takes 3 s and the device 1: three workers read a batch a second
    assert workers_that_suffice(0.75, 0) == 3


def test_a_cpu_reads_in_its_own_process(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    cuda = torch.device("cuda")
    assert (workers_of("auto", CPU), workers_of("auto", cuda), workers_of(3, CPU)) == (0, 15, 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert workers_of("auto", cuda) == 0  # two cores each


def test_a_run_that_waits_is_told_once(monkeypatch):
    clock = DataClock(CPU, workers=4)
    clock.on_gpu = True
    assert clock.advice(0.9) is None  # workers start
    assert "--workers 16" in (clock.advice(0.75) or "")
    assert clock.advice(0.75) is None


def test_a_device_is_idle_from_the_end_of_all_its_work_to_the_batch_and_no_longer_than_the_wait():
    assert idle(0.5, [0.3]) == 0.3  # for 0.2 of the wait it still computed
    assert idle(0.5, [0.3, 0.1]) == 0.1  # teachers on a second stream ended later
    assert idle(0.5, [0.3, -0.2]) == 0  # or have not ended yet
    assert idle(0.001, [0.004]) == 0.001  # the batch was there, and copying it took 0.003


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["model", "teachers"])
def test_on_a_gpu_waiting_counts_only_when_all_its_streams_are_out_of_work(where):
    """A loader of 100 ms a batch, and 60 or 160 ms of work on one of two streams."""
    device, pause = torch.device("cuda"), 0.1
    side = side_stream(device, wanted=True)
    assert side is not None
    torch.cuda._sleep(10**6)
    torch.cuda.synchronize()
    began = time.perf_counter()
    torch.cuda._sleep(10**8)
    torch.cuda.synchronize()
    rate = 10**8 / (time.perf_counter() - began)  # cycles a second

    def slow():
        for number in range(6):
            time.sleep(pause)
            yield Slice(number, 0, torch.ones(4).pin_memory().to(device, non_blocking=True))

    for work, most, least in ((0.0, 1.05, 0.9), (0.06, 0.8, 0.1), (0.16, 0.15, 0.0)):
        clock = DataClock(device, beside=side)

        def busy(here, work=work):
            if work and here == where:
                torch.cuda._sleep(int(work * rate))

        def targets(batch, step, busy=busy):
            busy("teachers")
            return batch * 2

        torch.cuda.synchronize()
        began = time.perf_counter()
        for _, found in prefetch(clock.timed(slow()), targets, nullcontext, stream=side):
            busy("model")
            found.sum()
        torch.cuda.synchronize()
        share = clock.read() / (time.perf_counter() - began)
        assert least <= share <= most, (where, work, share)
