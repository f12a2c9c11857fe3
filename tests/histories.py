"""Random histories of a model, as many as a test has time for."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test


def check(model: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        model,
        settings=settings(
            max_examples=examples, stateful_step_count=steps,
            suppress_health_check=list(HealthCheck), print_blob=True,
        ),
    )  # fmt: skip
