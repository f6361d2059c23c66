"""Reads command lines and tells how the program ends for each, by the thousand.

Each is parsed and checked in a fork of this process, up to the point where a model
would be made: a real start takes seconds. Lines of JSON in, lines of JSON out.
"""

import json
import os
import sys
import tempfile
import warnings


def _check(config, workdir, *_, **__):
    """What a run refuses before it makes a model."""
    import types

    from abe_jax import data, models, optimizer, parallel
    from abe_jax.data import samplers
    from abe_jax.workdir import claim, fields, locate

    fields.require_in_range(config)
    claim.require_outside_data(locate(workdir), config.data)
    mesh = types.SimpleNamespace(size=1)
    parallel.require_divisible(config.train.batch_size, mesh, config.train.chunks)
    models.check(config.model)
    splits = data.create(config.data)
    samplers.create(
        splits.train.labels,
        name=config.data.sampler,
        batch_size=config.train.batch_size,
        images_per_class=config.data.images_per_class,
        seed=config.seed,
    ).batch(0)
    optimizer.create(config.train)


def _end(arguments: list[str]) -> tuple[int, str]:
    """Exit status and standard error of one command line."""
    with tempfile.TemporaryFile() as errors:
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                os.dup2(errors.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                from abe_jax import main

                sys.argv = ["abe-jax", *arguments]
                main.run()
            except SystemExit as ended:
                status = 0 if ended.code is None else int(ended.code)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        errors.seek(0)
        text = errors.read().decode(errors="replace")
        return os.waitstatus_to_exitcode(status), text


def main() -> None:
    warnings.simplefilter("ignore")  # JAX warns of forks; no child touches a device
    from abe_jax import host_memory

    host_memory.use_large_pages()  # before abe_jax.main does, in each fork
    from abe_jax import processes, report, train

    train.train_and_evaluate = _check
    report.evaluate_and_report = _check
    processes.describe_devices = lambda: "no device"
    processes.is_first = lambda: False
    for line in sys.stdin:
        print(json.dumps(_end(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
