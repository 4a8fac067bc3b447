"""HyperTrick: what is expected of it holds for draws, in the rule and inside Optuna."""

import random
import statistics

import pytest

from zoo.train.hypertrick import hypertrick_pruner, stops


def survivors(draws: random.Random, workers: int, phases: int, rate: float, best: float) -> list:
    """Run workers that finish in any order; return how many begin each phase, and if 0 ends it."""
    reported = [[] for _ in range(phases)]
    alive = list(range(workers))
    counts = [workers]
    for phase in range(phases):
        draws.shuffle(alive)
        left = []
        for worker in alive:
            reported[phase].append(best if worker == 0 else draws.random())
            if not stops(reported[phase], workers=workers, phase=phase, rate=rate):
                left.append(worker)
        alive = left
        counts.append(len(alive))
    return [counts, 0 in alive]


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5])
def test_of_each_phase_the_share_that_the_rate_names_stops(rate):
    draws, phases, workers = random.Random(0), 4, 200
    runs = [survivors(draws, workers, phases, rate, best=-1.0)[0] for _ in range(100)]
    for phase in range(1, phases + 1):
        mean = statistics.mean(run[phase] for run in runs) / workers
        assert mean == pytest.approx((1 - rate) ** phase, rel=0.05)
    work = statistics.mean(sum(run[:-1]) for run in runs) / (workers * phases)
    expected = (1 - (1 - rate) ** phases) / (phases * rate)  # of training each to the end
    assert work == pytest.approx(expected, rel=0.03)


def test_the_best_never_stops_and_one_that_is_not_finite_always_does():
    draws = random.Random(1)
    assert all(survivors(draws, 20, 4, 0.5, best=-1.0)[1] for _ in range(100))
    assert stops([float("nan")], workers=8, phase=0, rate=0.25)


def test_the_first_go_on_whatever_they_found():
    # (1 - √0.25) 8 = 4 in the first phase, and 4 · 0.75 = 3 in the second
    worse = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert not stops(worse[:4], workers=8, phase=0, rate=0.25)
    assert stops(worse, workers=8, phase=0, rate=0.25)
    assert not stops(worse[:3], workers=8, phase=1, rate=0.25)
    assert stops(worse[:4], workers=8, phase=1, rate=0.25)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_a_study_of_optuna_keeps_the_better_trials(direction):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sign = 1 if direction == "minimize" else -1

    def objective(trial) -> float:
        loss = trial.suggest_float("x", 0, 1)
        for step in (10, 20, 40):
            trial.report(sign * loss, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return sign * loss

    study = optuna.create_study(
        direction=direction, pruner=hypertrick_pruner(200, rate=0.25),
        sampler=optuna.samplers.RandomSampler(seed=0),
    )  # fmt: skip
    study.optimize(objective, n_trials=200)
    done = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    begun = [sum(step in t.intermediate_values for t in study.trials) for step in (10, 20, 40)]
    assert begun[0] == 200
    assert begun[1] == pytest.approx(150, abs=15)  # r of the first phase's have stopped
    assert begun[1] > begun[2] > len(done)
    assert min(t.params["x"] for t in study.trials) == study.best_params["x"]


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="a rate between 0 and 1"):
        hypertrick_pruner(8, rate=1.0)
