"""Traces of some steps, as XProf reads them."""

import jax
import jax.numpy as jnp
import pytest

from abe_jax.workdir import trace


@pytest.mark.parametrize(
    ("steps", "until", "traced"),
    [(0, 6, []), (2, 6, [12, 13]), (9, 4, [12, 13]), (2, 2, [])],
)
def test_the_steps_that_were_asked_for(steps, until, traced, tmp_path, monkeypatch):
    running, seen = [], []
    monkeypatch.setattr("jax.profiler.start_trace", running.append)
    monkeypatch.setattr("jax.profiler.stop_trace", running.clear)
    profile = trace.Trace(tmp_path, start=10, steps=steps)
    for step in range(10, 10 + until):
        profile.before_step(step, jnp.zeros(()))
        if running:
            seen.append(step)
    profile.close()
    assert (seen, running) == (traced, [])


def test_a_real_trace_lies_in_the_workdir(tmp_path):
    profile = trace.Trace(tmp_path, start=0, steps=1)
    state = jnp.zeros(())
    for step in range(4):
        profile.before_step(step, state)
        state = jax.jit(lambda x: x + 1)(state)
    profile.close()
    (found,) = (tmp_path / "plugins" / "profile").glob("*/*.xplane.pb")
    assert found.stat().st_size > 0
