"""tests/mutants/*.toml name places that are there and tests that are there (scripts/mutants.py runs them)."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("mutants", ROOT / "scripts" / "mutants.py")
mutants = sys.modules["mutants"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutants)
DATA = list(mutants.read_data(ROOT / "tests" / "mutants"))


@pytest.mark.parametrize(("data", "name"), DATA, ids=[name for _, name in DATA])
def test_every_place_and_every_test_is_there(data, name):
    by_hand = list(mutants.by_hand(data, name))  # raises where a text does not occur once
    for mutant in by_hand:
        assert mutant.equivalent or mutant.tests, f"{name}: nobody has to see {mutant}"
    for file in data.get("tests", {}):
        assert (ROOT / file).exists(), f"{name}: {file}"
    for test in {test for tests in data.get("tests", {}).values() for test in tests} | {
        test for mutant in by_hand for test in mutant.tests
    }:
        file, _, node = test.partition("::")
        assert (ROOT / file).exists(), f"{name}: {file}"
        function = node.partition("[")[0]
        assert not function or re.search(rf"^def {function}\(", (ROOT / file).read_text(), re.MULTILINE), (
            f"{name}: {test}"
        )


def test_a_line_may_be_passed_over_only_with_a_reason():
    for data, name in DATA:
        for entry in (*data.get("passed_over", ()), *data.get("equivalent", ())):
            assert entry["reason"], f"{name}: {entry}"
