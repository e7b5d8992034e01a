"""Why a question has no plan, in words: what stands in the way, and how far it is from being met.

Without a limit on cards there is a plan for anything that each model has an option for, so the way is barred by a model
that fits nowhere, by the number of cards, or by a loss that must be survived.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from gpuplan.plan.cutting import Chosen, Cutting, Prices
from gpuplan.plan.packing_terms import Question
from gpuplan.plan.programme import Limits


def at_once(question: Question) -> str:
    """What can be said without solving anything; empty where nothing can."""
    served = {model for _, _, model in question.best()}
    lost = [model for model in question.demands if model not in served]
    names = ", ".join(kind.gpu.name for kind in question.kinds) or "no card"
    if lost:
        return f"no slice of {names} serves {', '.join(lost)}: no option has the memory and the latency for it"
    if question.survive == "card" and _count_max(question) < 2:
        return "to survive the loss of a card takes two, and there is at most one"
    return ""


def by_trying(question: Question, limits: Limits) -> str:
    """What stands in the way of a question that was solved and has no plan."""
    prices = Prices(question)
    here = _cards(question)
    if question.survive is not None:
        alone = Cutting(replace(question, survive=None), prices)
        if alone.minimise({}, limits).found:
            return f"{here} can serve the demand, and not any more after the loss of a {question.survive}"
    programme = Cutting(replace(question, survive=None), prices, growth=(0.0, 1.0))
    solved = programme.minimise({programme.growth: -1.0}, limits)
    if not solved.found:
        slices = sum((kind.count_max or 0) * max(map(len, kind.layouts)) for kind in question.kinds)
        return f"{here} have at most {slices} slices, too few or too small for {len(question.demands)} models at once"
    least = f"{here} can serve {solved.values[programme.growth]:.0%} of the demand at most"
    return f"the number of cards binds: {least}{_enough(question, limits)}"


def _enough(question: Question, limits: Limits) -> str:
    """What the demand would take if there were no limit on cards."""
    free = replace(question, survive=None, fixed=False, kinds=[replace(k, count_max=None) for k in question.kinds])
    prices = Prices(free)
    programme = Cutting(free, prices)
    solved = programme.minimise(programme.cost(), limits)
    if not solved.found:
        return ""
    return f"; {_words(question, programme.chosen(solved))} would do for {solved.objective * prices.unit:.2f} $/h"


def _words(question: Question, chosen: Chosen) -> str:
    counts: Counter[int] = Counter()
    for (kind, _), n in chosen.layouts.items():
        counts[kind] += n
    return " and ".join(f"{n} x {question.kinds[kind].gpu.name}" for kind, n in sorted(counts.items()))


def _cards(question: Question) -> str:
    return " and ".join(f"{k.count_max} x {k.gpu.name}" for k in question.kinds if k.count_max) or "no cards"


def _count_max(question: Question) -> float:
    return sum(math.inf if kind.count_max is None else kind.count_max for kind in question.kinds)
