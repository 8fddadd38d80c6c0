"""The command line: ``muxtune COMMAND [OVERRIDE ...]``.

The first word picks the command; the rest are Hydra's overrides and flags, composed with the
command's own primary config (``conf/COMMAND.yaml``). Errors that a user can act on are printed
without a traceback and end with exit code 2.
"""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from muxtune import __version__
from muxtune.errors import ConfigError, MuxTuneError

EXIT_ERROR = 2
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143
TRACEBACK = "MUXTUNE_TRACEBACK"
COMMANDS = {
    "plan": "show the plan for a set of tasks on one instance, and why",
    "simulate": "run a workload on a simulated fleet",
    "capacity": "the smallest fleet that keeps a service level, and what it costs",
    "train": "fine-tune real tasks on this machine; PEFT adapters come out",
    "profile": "measure this machine, for predictions that hold on it",
    "validate": "score a profile on step configurations and runs that it cannot have known",
    "compare": "the same tasks on both backends: predicted beside measured",
    "export": "the log of a run as a trace: muxtune export FOLDER TRACE.csv",
    "report": "one table and one plot of a sweep's folder: muxtune report FOLDER",
}
HELP = ("-h", "--help")


def usage() -> str:
    lines = "\n".join(f"  {name:9} {what}" for name, what in COMMANDS.items())
    return f"""MuxTune {__version__}: many fine-tuning tasks on one frozen backbone.

usage: muxtune COMMAND [key=value ...] [-m] [--help]

commands:
{lines}

  key=value  override one setting; group=option picks a whole group of settings
  -m         run every combination of comma-separated values; ends in one table and one plot

examples:
  muxtune plan workload.tasks_file=tasks.yaml
  muxtune simulate workload=philly planner=muxtune
  muxtune simulate -m planner=exclusive,batched,muxtune workload.load=0.5,1,2
  muxtune train workload.tasks_file=tasks.yaml output_dir=adapters

`muxtune COMMAND --help` lists a command's settings. {TRACEBACK}=1 shows tracebacks."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code; never raises for what a user can mend."""
    if arguments is None:  # this is the process's own command line
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in HELP:
        print(usage())
        return 0
    if words[0] == "--version":
        print(f"muxtune {__version__}")
        return 0
    try:
        return _run(words[0], words[1:])
    except SystemExit as stop:  # argparse inside Hydra
        return stop.code if isinstance(stop.code, int) else EXIT_ERROR
    except KeyboardInterrupt:
        _print_error("stopped by the keyboard")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        return EXIT_ERROR
    except Exception as error:
        message = explain(error)
        if message is None or os.environ.get(TRACEBACK, "0") not in {"", "0"}:
            raise
        _print_error(message)
        return EXIT_ERROR


def _run(command: str, words: list[str]) -> int:
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        names = ", ".join(COMMANDS)
        raise ConfigError("command", f"'{command}' does not exist", f"{hint}choose one of: {names}")
    if command == "report":
        return _report(words)
    if command == "export":
        return _export(words)
    return _run_with_hydra(command, words)


def _report(words: list[str]) -> int:
    if len(words) != 1 or words[0] in HELP:
        print("usage: muxtune report FOLDER\n\nFOLDER is what a run with -m has written.")
        return 0 if words and words[0] in HELP else EXIT_ERROR
    return _show_sweep(words[0])


def _export(words: list[str]) -> int:
    """Today's service as tomorrow's question."""
    if len(words) != 2 or words[0] in HELP:
        print(
            "usage: muxtune export FOLDER TRACE.csv\n\nFOLDER is what a run has written. Ask about "
            "its tasks with\nmuxtune capacity workload=trace workload.trace=TRACE.csv model=NAME"
        )
        return 0 if words and words[0] in HELP else EXIT_ERROR
    from pathlib import Path

    from muxtune.report.exporting import export_trace
    from muxtune.report.run_folder import RunFolder

    target = Path(words[1])
    text = export_trace(words[0])
    path = RunFolder(target.parent).write_text(target.name, text)
    print(f"wrote {path}: {text.count(chr(10)) - 1} tasks")
    return 0


def _show_sweep(folder: str) -> int:
    from muxtune.report.sweep import report_sweep, sweep_table
    from muxtune.report.tables import make_console, make_table

    report = report_sweep(folder)
    console = make_console()
    console.print(make_table("Sweep", *sweep_table(report.rows, report.varied)))
    for path in filter(None, (report.csv_path, report.plot_path, report.html_path)):
        console.print(f"wrote {path}", soft_wrap=True)
    for row in report.failures:
        _print_error(f"run {row['run']} failed: {row.get('error', '')}")
    return EXIT_ERROR if report.failures else 0


def _run_with_hydra(command: str, words: list[str]) -> int:
    import hydra

    from muxtune.commands import run_job
    from muxtune.config import conf_dir, register_schemas
    from muxtune.report.sweep_callback import SweepCallback

    register_schemas()
    SweepCallback.folders.clear()
    failures: list[MuxTuneError] = []

    def job(config: Any) -> None:
        # Hydra would print a line of its own for an exception of a single run; so it is handed
        # over. In a sweep, in whatever process, the run's folder tells.
        error = run_job(config)
        if error is not None:
            failures.append(error)

    if command == "train":
        from muxtune.commands.resuming import resumed_words

        words = resumed_words(words)
    with _as_program(command, words):
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=command)(job)()
    if SweepCallback.folders:
        return _show_sweep(str(SweepCallback.folders[0]))
    if failures:
        raise failures[0]
    return 0


@contextmanager
def _as_program(command: str, words: list[str]) -> Iterator[None]:
    """Hydra reads sys.argv; with HYDRA_FULL_ERROR it raises instead of printing and exiting."""
    saved, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [f"muxtune {command}", *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = saved
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def explain(error: Exception) -> str | None:
    """What to tell the user about an error; None for one that is a defect of the program."""
    if isinstance(error, MuxTuneError):
        return str(error)
    told = _explain_hydra(error)  # first, because some of Hydra's are OSErrors too
    if told is None and isinstance(error, OSError):
        where = f"'{error.filename}': " if error.filename else ""
        return f"output_dir: {where}{error.strerror or error}. Choose another with output_dir=PATH"
    return told


def _explain_hydra(error: Exception) -> str | None:
    try:
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException
    except ImportError:
        return None
    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return None
    lines = str(error).split("Config search path:")[0].splitlines()
    cause = str(error.__cause__).splitlines()[0] if error.__cause__ else ""
    # Names that start with base_ are our schemas, which nobody chooses. A key that a schema does
    # not have cannot be appended either; one of an open mapping can.
    hidden = ("\tbase_", "See https://", "    full_key", "    object_", "    reference_")
    if "is not in struct" not in cause:
        hidden += ("To append to your config",)
    shown = [line for line in lines if line.strip() and not line.startswith(hidden)]
    remedy = "`muxtune COMMAND --help` lists what exists"
    return " ".join(
        part for part in ("configuration:", "\n".join(shown), f"({cause})." * bool(cause), remedy)
        if part
    )  # fmt: skip


def _print_error(message: str) -> None:
    from rich.text import Text

    from muxtune.report.tables import make_console

    text = Text.assemble(("error: ", "bold red"), message)
    make_console(stderr=True).print(text, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
