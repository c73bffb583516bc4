"""Every number that a verdict depends on, with its reason. docs/verdicts.md quotes this table."""

from typing import NamedTuple


class Threshold(NamedTuple):
    """enter: where a verdict begins. leave: where it ends, looser, so that noise does not flip it."""

    enter: float
    leave: float


SETTLED = 20  # updates at the start that are not judged: imbalance peaks in the first ten under every method
PATIENCE = 50  # updates that are summed before anything is said: one batch is a few sequences, not the data
STEADY = 3  # rows in a row that must agree before a verdict changes
STEADY_UPDATES = 100  # or fewer rows that hold so many updates, where rows are far apart
DEAD_WINDOW = 100  # updates over which an expert must be without tokens to be dead, as in the metric dead_experts
DEAD = 0.01  # share of the mean load below which an expert is dead, as in the metric dead_experts
DEAD_SHARE = 0.25  # of the experts dead is collapse: at E = 4 and k = 1 one dead expert is a CV of 1/3 of the ceiling
FROZEN = 1e-4  # router gradient over expert gradient: renormalised top-1 shows 1e-5 in fp32, live routers above 1e-2

# Share of the ceiling of the load CV: 1/3 is one expert of eight with 42 % of the tokens. Shazeer's unbalanced run
# (arXiv 1701.06538 table 6), the classic collapse, had 38 %.
COLLAPSED = Threshold(1 / 3, 1 / 4)
# Share of the ceiling above which a layer is not called balanced: 0.15 is one expert of eight with 26 %.
UNEVEN = Threshold(0.15, 0.12)
# Token entropy over ln E: at 0.9 and E = 8 the likeliest expert has about 0.3 instead of 0.125.
UNDECIDED = Threshold(0.9, 0.85)
# Normalised mutual information beyond its floor, and at least as much again as the floor. An even start of a byte model
# shows 0.00 for domains; balanced top-1 runs on the standard library reach 0.03 to 0.08 in a few hundred steps.
SPECIALISED = Threshold(0.03, 0.02)
# Where the data has no domains: a router at random, without noise, shows 0.5 for tokens (the input carries them), so
# that less than 0.2 is a choice that noise decides.
SPECIALISED_BY_TOKEN = Threshold(0.2, 0.15)
SWING = 0.1  # share of the load that changes hands, beyond chance, below which a swing does not matter
CHANCE = 2.5  # times what differences between the batches explain, from which a movement is the router's
# Part of a swing that is still there later: 1 for independent windows, more for a drift, 0 for a perfect return.
BACK = Threshold(0.4, 0.6)
HISTORY = 48  # rows in which a slow swing is looked for; its period may be a third of them
SPREAD = 0.2  # gap between the per-expert losses, over the loss, from which more sampling is suggested
