import time

import torch

from zoo.train.device import workers_of
from zoo.train.waiting import DataClock, workers_that_suffice

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
