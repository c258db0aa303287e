"""Ablations: ``python -m experiments.ablate suite=NAME [key=value ...]``.

NAME is a file of ``experiments/configs/suite`` (or of ``suite/`` in a folder given by ``hydra.searchpath=[file://DIR]``).
Trains and scores every row with every seed and writes ``report.md``, ``table.csv``, ``plot.png`` and ``drawings.png``
into ``runs/ablate/NAME``. What rows share is trained once. The same command resumes; nothing that is done is repeated.

Every training and every scoring is a job of a Hydra multirun: ``hydra/launcher=submitit_slurm`` runs them on a cluster,
where ``hydra.launcher.timeout_min=...`` must suffice for one. A job that is killed there is done by the next command.
``report_only=true`` writes the report again from the folder. Exit code 1: some row failed, which the report says.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.ablate_jobs import Place, perform
from experiments.ablate_report import collect, report
from experiments.ablate_suite import Plan, Suite, plan, read_suite
from experiments.run import exit_code

CONFIGS = "experiments.configs"


def launched(cfg: DictConfig) -> None:
    """One job, in whatever process Hydra's launcher chose."""
    jobs = plan(read_suite(plain(cfg.suite), ""), "")
    perform(jobs.jobs[cfg.job], jobs, _place(cfg), torch.device(cfg.device))


def launch(jobs: Plan, place: Place, arguments: list[str]) -> None:
    """Have all jobs done that are not: first what others need, then those. A job whose needs failed is left out."""
    program = hydra.main(config_path="configs", config_name="ablate", version_base="1.3")(launched)
    for kinds in (("tokenizer", "vision"), ("model",), ("scores",)):
        due = [
            name
            for name, job in jobs.jobs.items()
            if job.kind in kinds and not place.done(job) and all(place.done(jobs.jobs[need]) for need in job.needs)
        ]
        if due:
            given, sys.argv = sys.argv, ["ablate", "--multirun", *arguments, f"job={','.join(due)}"]
            try:
                program()  # reads sys.argv
            except SystemExit:  # a launch failed, and Hydra has said why; what is done counts
                print(f"some of {', '.join(due)} are not finished", file=sys.stderr)
            finally:
                sys.argv = given


def ablate(arguments: list[str]) -> bool:
    """Run a suite and report; returns whether every row has its scores.

    Raises:
        ValueError: no such suite, or one with settings that do not exist.
    """
    cfg, name = composed(arguments)
    out = Path(cfg.out)
    if not cfg.report_only:
        suite: Suite = read_suite(plain(cfg.suite), name)
        jobs, place = plan(suite, name), _place(cfg)
        out.mkdir(parents=True, exist_ok=True)
        given = [argument for argument in arguments if not argument.startswith("out=")]
        try:
            launch(jobs, place, [*given, f"out={out}"])
        finally:  # what is done by now is reported, also after an interrupt
            collect(suite, jobs, place, [*given, f"out={out}"])
            failed = report(out)
    else:
        failed = report(out)
    print(out / "report.md")
    return not failed


def composed(arguments: list[str]) -> tuple[Any, str]:
    """The command's configuration, and the suite's name."""
    try:
        with initialize_config_module(CONFIGS, version_base="1.3"):
            cfg = compose("ablate", arguments, return_hydra_config=True)
        name = cfg.hydra.runtime.choices.suite
        cfg.out = cfg.out or f"runs/ablate/{name}"
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(str(error)) from None
    return cfg, name


def plain(config: Any) -> Any:
    """A part of a configuration as lists and dictionaries.

    Raises:
        ValueError: a value that is missing.
    """
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(str(error)) from None


def _place(cfg: Any) -> Place:
    return Place(scores=Path(cfg.out), trained=Path(cfg.trained))


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if any(argument in ("-h", "--help") for argument in given):
        print(__doc__)
        return 0
    # It is a multirun by itself; and to Hydra, a bare null is nothing.
    words = ["suite='null'" if word == "suite=null" else word for word in given if word not in ("-m", "--multirun")]
    finished: list[bool] = []
    code = exit_code(lambda: finished.append(ablate(words)))
    return code or int(not all(finished))


if __name__ == "__main__":
    sys.exit(main())
