"""The whole recipe: every stage in order, each skipped if what it would make is there already and still valid.

    distil-jax run --config configs/tiny.py

Ends with a table in the terminal, summary.json in the work directory and report/index.html.
"""

import sys
import time
from typing import Any

from ml_collections import ConfigDict

from distil_jax import evaluate, export, hosts, prepare, project, report, score, train, variants
from distil_jax.data import scores
from distil_jax.workdir import Workdir


def main(config: ConfigDict) -> dict[str, Any]:
    """Runs what is not done; returns the summary."""
    work = Workdir(config)
    for objective_of in (config, *(variants.applied(config, name) for name in variants.taught(config.runs))):
        scores.check(objective_of)  # before the hours that come first
    stages: list[tuple[str, Any]] = [("corpus", prepare.main)]
    if work.teacher_is_trained():
        stages.append(("teacher", lambda c: train.train(c, "teacher")))
    stages.append(("projection", project.main))
    if work.scores_are_stored():
        stages.append(("scores", score.main))
    stages += [(run, lambda c, run=run: train.train(c, run)) for run in config.runs]
    stages += [("evaluate", evaluate.main), ("export", export.make), ("report", report.main)]
    for number, (name, stage) in enumerate(stages, 1):
        done = work.done(name) is not None
        say(f"[{number}/{len(stages)}] {name}: " + ("done already" if done else f"writing {work / name}"))
        started = time.monotonic()
        stage(config)
        if not done:
            say(f"[{number}/{len(stages)}] {name}: {time.monotonic() - started:.1f} s")
    summary = report.read_summary(work)
    if hosts.is_first_process():
        report.print_table(summary)
        print(f"\nreport: {work / 'report' / 'index.html'}\n{export.describe(work.require('export'))}", flush=True)
    export.publish(config, work.require("export"))
    return summary


def say(line: str) -> None:
    """A line to the person who waits, from the first process."""
    if hosts.is_first_process():
        print(line, flush=True)


if __name__ == "__main__":
    from distil_jax.cli import stage_main

    sys.exit(stage_main(main))
