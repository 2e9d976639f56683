"""The command line: parses arguments, calls what does the work, and turns every ending into its exit code."""

import asyncio
import inspect
import os
import signal
import sys
from contextlib import suppress
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from fastdistill.control.terminal import printable
from fastdistill.core.errors import ExitCode, FatalError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fastdistill.control.session import Pipeline, RunResult

app = typer.Typer(
    name="fastdistill",
    help="Turn a teacher LLM into training data that can be proved.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
pipeline_app = typer.Typer(no_args_is_help=True, help="Check, preview and run a pipeline.")
runs_app = typer.Typer(no_args_is_help=True, help="Look at earlier runs.")
data_app = typer.Typer(no_args_is_help=True, help="Get data sets ready.")
prepare_app = typer.Typer(no_args_is_help=True, help="Turn a published data set into records.")
app.add_typer(pipeline_app, name="pipeline")
app.add_typer(runs_app, name="runs")
app.add_typer(data_app, name="data")
data_app.add_typer(prepare_app, name="prepare")

Config = Annotated[Path, typer.Option("--config", "-c", help="The pipeline's YAML file.")]
ConfigEnv = Annotated[Path | None, typer.Option(help="A second layer: what differs in this environment.")]
ConfigRun = Annotated[Path | None, typer.Option(help="A third layer: what differs in this run.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="One value: models.teacher.model=llama3", metavar="A.B=C")]
_ROOT = "The artifacts root; by default FASTDISTILL_ARTIFACTS_DIR, or ./artifacts."
OutputDir = Annotated[Path | None, typer.Option("--output-dir", "-o", help=_ROOT)]
RunId = Annotated[str | None, typer.Option(help="A name of your own for the run's folder.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no table.")]
GroupBy = Annotated[str | None, typer.Option(help="A record's field: its samples belong together.")]
Json = Annotated[Path | None, typer.Option(help="Write all of it to this file.")]


def main(arguments: "Sequence[str] | None" = None) -> NoReturn:
    """The `fastdistill` command; without `arguments`, those of the process."""
    while (lowest := os.open(os.devnull, os.O_RDWR)) <= 2:  # closed by who called: uvloop aborts if it is given one
        os.set_inheritable(lowest, True)  # or the processes that judge have none
    os.close(lowest)
    nothing = Path(os.devnull)
    sys.stdout, sys.stderr = sys.stdout or nothing.open("w"), sys.stderr or nothing.open("w")
    if isinstance(sys.stdout, TextIOWrapper):  # as stderr is: a run must not end for a dash in an ASCII locale
        sys.stdout.reconfigure(errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores the latter
            signal.signal(number, signal.default_int_handler)
    try:
        try:
            app(arguments)
        except SystemExit as ended:  # also of a command that ends well
            if ended.code == 1:  # typer and rich so tell of a broken pipe
                raise BrokenPipeError from ended
            sys.stdout.flush()
            raise
    except BrokenPipeError:
        sys.exit(ExitCode.UNREAD)
    except FatalError as error:
        fail(str(error), error.exit_code)
    except OSError as error:
        fail(f"{error.filename or 'the output'}: {error.strerror or error}", ExitCode.ENVIRONMENT)
    except (SystemExit, KeyboardInterrupt, asyncio.CancelledError) as ended:
        # On Ctrl-C typer ends without a word.
        if getattr(ended, "code", ExitCode.INTERRUPTED) != ExitCode.INTERRUPTED:
            raise
        fail("interrupted; what was paid for is stored: run the same command again to go on", ExitCode.INTERRUPTED)
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # or the interpreter tries once more, and ends with a code of its own
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(ExitCode.OK)


def fail(message: str, code: ExitCode) -> NoReturn:
    """Ends the command with one clear message and no traceback."""
    lines = [printable(line) for line in message.splitlines()]  # a server or a record may be quoted
    with suppress(OSError):  # the terminal may have gone, which is what ends the command
        print("\n".join([f"error: {lines[0]}", *(f"       {line}" for line in lines[1:])]), file=sys.stderr)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        from fastdistill.control.reports import version_of

        print(f"fastdistill {version_of('fastdistill')}")


def with_pipeline(command: "Callable[..., None]") -> "Callable[..., None]":
    """Puts the options that name a pipeline in the place of a command's first parameter, the pipeline itself."""

    def loaded(
        config: Config, config_env: ConfigEnv = None, config_run: ConfigRun = None, set_: Set = None, **options: Any
    ) -> None:
        command(_load(config, config_env, config_run, set_), **options)

    _, *own = inspect.signature(command).parameters.values()
    named = [part for part in inspect.signature(loaded).parameters.values() if part.kind is not part.VAR_KEYWORD]
    parts = [part.replace(kind=part.KEYWORD_ONLY) for part in (*named, *own)]  # so that a required one may come last
    loaded.__signature__ = inspect.Signature(parts)  # type: ignore[attr-defined]  # what typer reads
    loaded.__annotations__ = {part.name: part.annotation for part in parts}
    loaded.__name__, loaded.__doc__ = command.__name__, command.__doc__
    return loaded


@pipeline_app.command()
@with_pipeline
def run(
    pipeline: "Pipeline",
    output_dir: OutputDir = None,
    run_id: RunId = None,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="One part of N: 0/4, 1/4, 2/4 or 3/4.")] = None,
    quiet: Quiet = False,
) -> None:
    """Distil the data set. After a crash or Ctrl-C, run the same command again: it goes on where it was."""
    if shard is not None:
        index, _, of = shard.partition("/")
        if not (index.isdecimal() and of.isdecimal() and int(index) < int(of)):
            fail(f"--shard {shard}: four shards are 0/4, 1/4, 2/4 and 3/4", ExitCode.CONFIG)
        pipeline = pipeline.shard(int(index), int(of))
    _to_its_end(partial(pipeline.run, output_dir=output_dir, run_id=run_id), quiet)


@pipeline_app.command()
def validate(config: Config, config_env: ConfigEnv = None, config_run: ConfigRun = None, set_: Set = None) -> None:
    """Check a config: every error at once, each with its path. Nothing is spent and no server is asked."""
    pipeline = _load(config, config_env, config_run, set_)
    print(f"{config}: valid; {len(pipeline.steps)} steps, run id {pipeline.run_id}")


@pipeline_app.command()
@with_pipeline
def info(pipeline: "Pipeline", output_dir: OutputDir = None) -> None:
    """Show the resolved pipeline: steps, models, and where it would write."""
    from fastdistill.control.show import show_info

    show_info(pipeline, output_dir)


@pipeline_app.command()
@with_pipeline
def preview(
    pipeline: "Pipeline",
    output_dir: OutputDir = None,
    n: Annotated[int, typer.Option("-n", min=1, help="How many samples.")] = 5,
) -> None:
    """Run a few samples and show prompts, answers and verdicts. The answers are stored: the run will not pay again."""
    from fastdistill.control.show import show_preview

    show_preview(pipeline, output_dir, n)


@pipeline_app.command()
@with_pipeline
def estimate(
    pipeline: "Pipeline",
    output_dir: OutputDir = None,
    n: Annotated[int, typer.Option("-n", min=2, help="How many samples to probe with.")] = 30,
) -> None:
    """Project tokens, time, cost and accepted samples from a random few, which are run and stored for real."""
    from fastdistill.control.show import show_estimate

    show_estimate(pipeline, output_dir, n)


@runs_app.command("list")
def list_runs(output_dir: OutputDir = None) -> None:
    """All runs, the latest first."""
    from fastdistill.control.show import show_runs

    show_runs(output_dir)


@runs_app.command("show")
def show(run: str, output_dir: OutputDir = None) -> None:
    """One run: how it ended, its funnel, its files. RUN is an id or its beginning."""
    from fastdistill.control.show import show_run

    show_run(run, output_dir)


@app.command()
def explain(run: str, sample_id: str, output_dir: OutputDir = None) -> None:
    """Where a row comes from: input, prompt, model, parameters, every candidate and verdict.

    SAMPLE_ID is a sample id or its beginning, a row's fd_id, a task id, or a place like train.jsonl:8.
    """
    from fastdistill.control.show import show_sample

    show_sample(run, sample_id, output_dir)


@app.command("regate")
def regate_run(
    run: str,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The steps after generation, or the whole pipeline.")
    ] = None,
    config_env: ConfigEnv = None,
    config_run: ConfigRun = None,
    set_: Set = None,
    output_dir: OutputDir = None,
    run_id: RunId = None,
    quiet: Quiet = False,
) -> None:
    """Judge the stored candidates of RUN again, under other gates: a new run, and no teacher is asked."""
    from fastdistill.control.regate import regate

    layers = [layer for layer in (config, config_env, config_run) if layer is not None]
    _to_its_end(partial(regate, run, layers, set_ or (), output_dir=output_dir, run_id=run_id), quiet)


@app.command("audit")
@with_pipeline
def audit_gates(
    pipeline: "Pipeline",
    output_dir: OutputDir = None,
    mutants: Annotated[int, typer.Option(min=1, help="Mutants of a sample and an operator, at most.")] = 2,
    seed: Annotated[int, typer.Option(help="Which mutants are drawn.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Measure the gates against the truth: gold answers must pass, broken ones must not. No teacher is asked."""
    from fastdistill.control.audit import audit, show_audit
    from fastdistill.control.progress import live

    reports = audit(pipeline, output_dir=output_dir, mutants=mutants, seed=seed, watch=None if quiet else live)
    if not quiet:
        show_audit(reports, output_dir)


@app.command("diff")
def diff_runs(
    run_a: str, run_b: str, group_by: GroupBy = None, json: Json = None, output_dir: OutputDir = None
) -> None:
    """Which samples RUN_B won and lost against RUN_A, by gate and reason, and whether that is more than chance."""
    from fastdistill.control.diff import show_diff

    show_diff(run_a, run_b, output_dir, group_by, json)


@app.command("merge")
def merge_stores(
    roots: Annotated[list[Path], typer.Argument(help="Artifacts roots of other machines, or copies of them.")],
    output_dir: OutputDir = None,
) -> None:
    """Bring the answers of several artifacts roots into one. What was there already stays as it is."""
    from fastdistill.control.merge import merge

    merge(roots, output_dir)


@app.command()
def push(
    run: str,
    repo: Annotated[str, typer.Option(help="The data set's name on the Hub: OWNER/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Only its owner may see it, if it is new.")] = False,
    exported: Annotated[
        Path | None, typer.Option("--from", help="A folder of `fastdistill export`, in place of the run's dist.")
    ] = None,
    output_dir: OutputDir = None,
) -> None:
    """Upload a finished run's data set to the Hugging Face Hub, in one commit."""
    from fastdistill.control.push import push_run

    print(push_run(run, repo, private=private, exported=exported, output_dir=output_dir))


@app.command("eval")
@with_pipeline
def evaluate_model(
    pipeline: "Pipeline",
    data: Annotated[Path, typer.Option(help="The records to evaluate on; the same file for all models.")],
    role: Annotated[str, typer.Option(help="A name under `models:`; one that is not there begins as the teacher.")],
    model: Annotated[str | None, typer.Option(help="The model's name at its server.")] = None,
    base_url: Annotated[str | None, typer.Option(help="Where it is served.")] = None,
    provider: Annotated[str | None, typer.Option(help="Which kind of server that is.")] = None,
    draws: Annotated[int, typer.Option("-n", "--draws", min=1, help="Answers to each record.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Records at most.")] = None,
    output_dir: OutputDir = None,
    run_id: RunId = None,
    quiet: Quiet = False,
) -> None:
    """Ask a served model the records of an evaluation split, and judge its answers by the pipeline's gates."""
    from fastdistill.control.evaluate import evaluation

    given = {"model": model, "base_url": base_url, "provider": provider}
    changes = {field: value for field, value in given.items() if value is not None}
    plan = evaluation(pipeline, data, role=role, changes=changes, draws=draws, limit=limit)
    _to_its_end(partial(plan.run, output_dir=output_dir, run_id=run_id), quiet)


@app.command("compare")
def compare_runs(
    runs: Annotated[list[str], typer.Argument(help="Two or more; the last is compared with each of the others.")],
    group_by: GroupBy = None,
    epsilon: Annotated[float, typer.Option(min=0, help="Scores no further apart agree.")] = 0.1,
    json: Json = None,
    output_dir: OutputDir = None,
) -> None:
    """Models side by side, like teacher, student before and student after: rates, tests, agreement of scores."""
    from fastdistill.control.compare import show_comparison

    show_comparison(runs, output_dir, group_by, epsilon, json)


@app.command("lineage")
def lineage(run: str, group_by: GroupBy = None, output_dir: OutputDir = None) -> None:
    """The chain of runs behind RUN (`lineage: {parent: RUN}`), each tested against its parent and the first."""
    from fastdistill.control.lineage import show_lineage

    show_lineage(run, output_dir, group_by)


@app.command()
def export(
    run: str,
    formats: Annotated[
        list[str], typer.Option("--format", "-f", help="parquet, jsonl, trl, axolotl, llamafactory, mlx or openai.")
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="An export's option: ExportSFT.validation=0.05", metavar="A.B=C")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="A new folder; by default `export` in the run's folder.")] = None,
    output_dir: OutputDir = None,
) -> None:
    """Write a finished run's data set again, as other trainers read it. Nothing is asked and nothing is judged."""
    from fastdistill.control.export import export_run

    export_run(run, formats, set_ or (), to, output_dir)


@app.command()
@with_pipeline
def doctor(pipeline: "Pipeline", output_dir: OutputDir = None) -> None:
    """Ask each model's endpoint what it is and what it honours (a few tiny requests), and look at this machine."""
    from fastdistill.control.doctor import examine

    if not examine(pipeline, output_dir):
        sys.exit(ExitCode.TEACHER)


Published = Annotated[Path, typer.Option(help="The file as it was published.")]
Samples = Annotated[int, typer.Option(min=1, help="Training records, at most.")]
Seed = Annotated[int, typer.Option(help="Which records are drawn.")]
Prepared = Annotated[Path | None, typer.Option(help="Folder to write; by default in ~/.cache/fastdistill/datasets.")]


@prepare_app.command()
def wikisql(
    source: Annotated[str | None, typer.Option(help="data.tar.bz2 or its folder; downloaded by default.")] = None,
    samples: Samples = 1000,
    seed: Seed = 13,
    output: Prepared = None,
) -> None:
    """WikiSQL: questions, schemas and gold SQL that really run on the databases written beside them."""
    from fastdistill.data.wikisql import prepare_wikisql

    prepared = prepare_wikisql(source, samples=samples, seed=seed, output=output)
    for name, split in (("train", prepared.train), ("eval", prepared.eval)):
        left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(split.left_out.items())) or "none"
        print(f"{name}: {split.records:,} records over {split.tables:,} tables; left out: {left_out}")
    print(f"written to {prepared.folder}")


@prepare_app.command()
def mbpp(source: Published, samples: Samples = 1000, seed: Seed = 13, output: Prepared = None) -> None:
    """MBPP: Python functions to write, with their tests (sanitized-mbpp.json, mbpp.jsonl, or CodeT's)."""
    from fastdistill.data.problems import prepare_problems

    print(prepare_problems("MBPP", source, samples, seed, output))


@prepare_app.command()
def humaneval(source: Published, samples: Samples = 1000, seed: Seed = 13, output: Prepared = None) -> None:
    """HumanEval: Python functions to complete, with their tests (HumanEval.jsonl, HumanEval.jsonl.gz)."""
    from fastdistill.data.problems import prepare_problems

    print(prepare_problems("HumanEval", source, samples, seed, output))


@prepare_app.command()
def gsm8k(
    source: Annotated[Path, typer.Option(help="The folder with train.jsonl and test.jsonl, or one such file.")],
    samples: Samples = 1000,
    seed: Seed = 13,
    output: Prepared = None,
) -> None:
    """GSM8K: grade-school problems with their final answers and worked solutions."""
    from fastdistill.data.problems import prepare_problems

    print(prepare_problems("GSM8K", source, samples, seed, output))


def _to_its_end(work: "Callable[..., RunResult]", quiet: bool) -> None:
    """Runs, tells what the run came to, and ends with its exit code."""
    if quiet:
        result = work()
    else:
        from fastdistill.control.progress import live, summary

        result = work(watch=live)
        summary(result)
    if result.exit_code is not ExitCode.OK:
        fail(str(result.manifest["message"]), result.exit_code)


def _load(config: Path, config_env: Path | None, config_run: Path | None, set_: list[str] | None) -> "Pipeline":
    from fastdistill.control.config import load_pipeline

    return load_pipeline([layer for layer in (config, config_env, config_run) if layer is not None], set_ or ())


if __name__ == "__main__":
    main()
