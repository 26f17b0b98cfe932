"""Cases by chance: for hypothesis, and a list in which every value of every dimension occurs."""

import os
import random
from dataclasses import fields

import hypothesis
import hypothesis.strategies as st
from between import BETWEEN
from calls import CALLS
from case import Case
from hypothesis import settings
from legal import why_not
from models import HEADS
from modes import MODES
from paddings import PADDINGS
from readers import READERS
from structures import STRUCTURES

EXAMPLES = int(os.environ.get("FASTTUNE_EXAMPLES", "25"))
SEED = os.environ.get("FASTTUNE_SEED")

DIMENSIONS = {
    "head": tuple(HEADS),
    "attention": ("sdpa", "eager"),
    "structure": STRUCTURES,
    "padding": PADDINGS,
    "call": CALLS,
    "mode": MODES,
    "between": BETWEEN,
    "readers": READERS,
}


def cases(**narrower):
    """narrower: the values of a dimension that are drawn, if not all."""
    dimensions = DIMENSIONS | narrower
    strategies = {name: st.sampled_from(values) for name, values in dimensions.items() if name != "readers"}
    readers = st.lists(st.sampled_from(dimensions["readers"]), min_size=1, max_size=3, unique=True).map(tuple)
    return st.builds(Case, **strategies, readers=readers).filter(lambda case: why_not(case) is None)


def drawn(test):
    """The examples of a test that draws: the same ones every time, or by FASTTUNE_SEED; FASTTUNE_EXAMPLES of them."""
    test = settings(max_examples=EXAMPLES, derandomize=SEED is None, print_blob=True)(test)
    return test if SEED is None else hypothesis.seed(int(SEED))(test)


def covering(*pairs, seed=0, **narrower):
    """A list of cases in which every value occurs, and every pair of values of these pairs of dimensions."""
    dimensions, generator = DIMENSIONS | narrower, random.Random(seed)
    missing = {((name, value),) for name, values in dimensions.items() for value in values}
    missing |= {((a, x), (b, y)) for a, b in pairs for x in dimensions[a] for y in dimensions[b]}
    wanted = sorted(missing, key=repr)
    generator.shuffle(wanted)
    found = []
    for combination in wanted:
        if combination not in missing:
            continue
        legal = filter(None, (_with(combination, dimensions, generator) for _ in range(40)))
        best = max(legal, key=lambda case: len(missing & _covers(case, pairs)), default=None)
        if best is not None:
            found.append(best)
            missing -= _covers(best, pairs)
    return found


def _with(combination, dimensions, generator):
    fixed = dict(combination)
    values = {name: fixed.get(name) or generator.choice(of) for name, of in dimensions.items()}
    others = [reader for reader in dimensions["readers"] if reader is not values["readers"]]
    chosen = [values["readers"], *generator.sample(others, generator.choice((0, 2, 2)))]
    generator.shuffle(chosen)
    values["readers"] = tuple(chosen)
    case = Case(**values)
    return case if why_not(case) is None else None


def _covers(case, pairs):
    has = {field.name: (getattr(case, field.name),) for field in fields(case)} | {"readers": case.readers}
    single = {((name, value),) for name, values in has.items() for value in values}
    return single | {((a, x), (b, y)) for a, b in pairs for x in has[a] for y in has[b]}
