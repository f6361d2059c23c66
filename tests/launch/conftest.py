"""What stands in for Python where the scripts of launch/ are run for real."""

import os
import sys

import pytest

# Stands in for Python: says what it was told, and behaves as the environment asks.
STAND_IN = f"""#!{sys.executable}
import os, signal, subprocess, sys, time
process = sys.argv[-1].removeprefix("--process_id=")
roles = os.environ.get("ROLES", ",,").split(",")
role = roles[int(process) if process.isdigit() else 0]

def save(number, _):
    print("saved on", signal.Signals(number).name, flush=True)
    # In which a second signal would show.
    time.sleep(float(os.environ.get("SAVE_SECONDS", "0.5")))
    if role != "stubborn":
        sys.exit(128 + number)

signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
ready = os.path.join(os.path.dirname(__file__), "ready")
if process.isdigit():
    open(ready + process, "w").close()
names = "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "CUDA_VISIBLE_DEVICES"
print(*[name + "=" + os.environ[name] for name in names if name in os.environ])
print(*sys.argv[1:], flush=True)
if role in ("stubborn", "parent"):
    subprocess.Popen(["sleep", "600"])  # it has the same output
if role == "fail":
    for other in range(len(roles) if process.isdigit() else 0):
        while not os.path.exists(ready + str(other)):
            time.sleep(0.01)
    print("no luck", file=sys.stderr)
    sys.exit(7)
if role in ("wait", "stubborn", "parent"):
    time.sleep(600)
print("the last line")
"""


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """Without what this machine may have set, and with the stand-in as $PYTHON."""
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    names = ("CUDA_", "JAX_", "SLURM_", "XLA_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    return {**kept, "PYTHON": str(stand_in)}
