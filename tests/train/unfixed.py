"""`zoo` on ranks, with one of the things taken out that make them equal to one process.

Started as `unfixed.py NAME distill ...`.
"""

import sys

import torch
from torch import nn

from zoo.cli import main
from zoo.train import loop, slices, state
from zoo.train.mesh import rank


def one_stream() -> None:
    slices.SliceSeeds.begin = lambda seeds, index: None


def own_noise() -> None:
    same = loop.damped

    def damped(model: nn.Module, sigma: float):
        torch.manual_seed(torch.initial_seed() + rank())
        return same(model, sigma)

    loop.damped = damped


def own_statistics() -> None:
    slices.sum_over_ranks = lambda x: 2 * x


def outside() -> None:
    def init(learned: state.Learned, model: nn.Module, parts: object) -> None:
        nn.Module.__init__(learned)
        learned.model, learned.parts = model, nn.ModuleList()

    state.Learned.__init__ = init


def own_losses() -> None:
    loop.over_ranks = lambda sums: [2 * value for value in sums]


WITHOUT = {
    "all slices draw from one stream": one_stream,
    "the noise of DAMP is a rank's own": own_noise,
    "batch statistics are a rank's own": own_statistics,
    "learned weights are outside of what is reduced": outside,
    "losses are not reduced": own_losses,
}

WITHOUT[sys.argv[1]]()
sys.argv[0] = "zoo"
main(sys.argv[2:])
