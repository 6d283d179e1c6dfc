"""`python -m demo run CONFIG` and `python -m demo ui`."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape

from demo.prefect_api import PrefectApi, RunState
from demo.progress import follow
from demo.services import POOLS, Services, run_prefect, servers, workers
from grace_core.config import load_config
from grace_core.errors import GraceError
from grace_core.failure import MARKDOWN_FILE

ROOT = Path(__file__).resolve().parent.parent
DEPLOYMENT = "grace/full-pipeline"
_INTERRUPTED = 130  # the shell's code for Ctrl-C
_CANCEL_SECONDS = 40.0  # Prefect kills a cancelled run after 30

app = typer.Typer(add_completion=False, no_args_is_help=True)
console = Console()

ServicesFolder = Annotated[
    Path, typer.Option("--services", help="Folder of the servers' databases and logs.")
]


@app.command()
def run(
    config: Annotated[str, typer.Argument(help="Configuration file.")] = "configs/toy.yaml",
    override: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="Replace a value, as in seed=3; repeatable."),
    ] = None,
    services: ServicesFolder = Path("runs/services"),
) -> None:
    """Run the whole pipeline through Prefect and show the results."""
    overrides = override or []
    settings = load_config(ROOT / config, overrides)
    run_dir = ROOT / settings.run_dir
    started, since = time.monotonic(), time.time()
    console.print("Starting Prefect and MLflow ...")
    with servers(ROOT / services, ROOT) as local, workers(local, POOLS[:1]):
        _print_addresses(local)
        flow_run_id = _submit(local, config, overrides)
        try:
            at_root = settings.model_copy(update={"run_dir": run_dir})
            final = follow(local.api, flow_run_id, at_root, console)
        except BaseException:
            _cancel(local.api, flow_run_id)
            raise
        if final.type != "COMPLETED":
            reason = _reason(local, final, run_dir, since)
            raise GraceError(
                f"the flow run ended as {final.state}:\n{reason}\n"
                f"Logs of the servers, which stop now: {local.logs}\n"
                f"Mend it and run `{_same_command(config, overrides)}`: finished stages are kept"
            )
        _show_results(run_dir)
        console.print(f"\n{time.monotonic() - started:.0f} s in all. To browse what ran:")
        _print_addresses(local)
        console.print("The servers stop now; `make ui` brings them up again.")


@app.command()
def ui(services: ServicesFolder = Path("runs/services")) -> None:
    """Serve Prefect and MLflow until Ctrl-C, with workers for runs started in the UI."""
    console.print("Starting Prefect and MLflow ...")
    with servers(ROOT / services, ROOT) as local, workers(local):
        _print_addresses(local)
        console.print("Ctrl-C ends them.")
        signal.pause()


def _submit(local: Services, config: str, overrides: list[str]) -> str:
    """Start a run of the deployment; returns the flow run's id."""
    arguments = ["deployment", "run", DEPLOYMENT, "--param", f"config={config}"]
    if overrides:
        arguments += ["--param", f"overrides={json.dumps(overrides)}"]
    console.print(f"$ prefect {' '.join(arguments)}", markup=False, highlight=False, soft_wrap=True)
    answer = run_prefect(local, *arguments)
    found = re.search(r"UUID: ([0-9a-f-]{36})", answer)
    assert found is not None, answer
    return found.group(1)


def _cancel(api: PrefectApi, flow_run_id: str) -> None:
    """Let a running training save before everything is stopped."""
    console.print("Cancelling the run ...")
    api.cancel(flow_run_id)
    deadline = time.monotonic() + _CANCEL_SECONDS
    while not api.flow_run(flow_run_id).is_final:
        if time.monotonic() > deadline:
            api.mark_cancelled(flow_run_id)
            return
        time.sleep(0.5)


def _same_command(config: str, overrides: list[str]) -> str:
    """What the user gives again: of the commands in the report, the first needs these servers."""
    command = f"make demo CONFIG={shlex.quote(config)}"
    settings = shlex.join(word for one in overrides for word in ("--set", one))
    return f"{command} ARGS={shlex.quote(settings)}" if settings else command


def _reason(local: Services, final: RunState, run_dir: Path, since: float) -> str:
    """The flow run's own report, or what Prefect knows where the run could not leave one.

    since: seconds since the epoch; an earlier report is of another run.
    """
    report = run_dir / MARKDOWN_FILE
    if report.exists() and report.stat().st_mtime >= since:
        return report.read_text(encoding="utf-8").rstrip()
    reasons = local.api.error_logs(final.id, limit=1) or [final.message]
    return reasons[-1].rstrip()


def _show_results(run_dir: Path) -> None:
    results: dict[str, Any] = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    console.print()
    console.print(Markdown((run_dir / "table.md").read_text(encoding="utf-8")))
    console.print("\nReleased models:")
    for label, folder in results["releases"].items():
        console.print(f"  {label:5} {folder}", highlight=False, soft_wrap=True)
    console.print(f"Results: {run_dir / 'results.json'}", highlight=False, soft_wrap=True)
    console.print(f"Report:  {run_dir / 'report' / 'index.html'}", highlight=False, soft_wrap=True)


def _print_addresses(local: Services) -> None:
    console.print(f"  Prefect  {local.prefect}\n  MLflow   {local.mlflow}")


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell's `&` switches it off
        signal.signal(number, _interrupt)
    try:
        exit_code = app(standalone_mode=False)  # typer answers an interruption with its code
    except (KeyboardInterrupt, typer.Abort):
        exit_code = _INTERRUPTED
    except GraceError as error:
        console.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        exit_code = 1
    if exit_code == _INTERRUPTED:
        console.print("interrupted")
    sys.exit(exit_code or 0)


if __name__ == "__main__":
    main()
