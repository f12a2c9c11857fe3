"""An outage never rejects a good row, and a bad row never looks like an outage."""

import pytest

from loader.load.sqlstate import Action, action


@pytest.mark.parametrize("code", [None, "08006", "40P01", "53100", "53300", "57P01", "58030", "55P03"])
def test_what_recovers_is_tried_again(code: str | None) -> None:
    assert action(code) is Action.RETRY


@pytest.mark.parametrize("code", ["22003", "23503", "23514", "54001", "P0001"])
def test_what_only_postgres_knows_of_a_row_rejects_it(code: str) -> None:
    assert action(code) is Action.REJECT


@pytest.mark.parametrize("code", ["42P01", "42501", "28P01", "3D000", "25006"])
def test_what_a_person_must_mend_keeps_the_files(code: str) -> None:
    assert action(code) is Action.STOP
