"""The closed loop and the study as the UI's run form starts them: by the path of a configuration."""

from pathlib import Path
from typing import Annotated

from prefect import flow
from prefect.runtime import flow_run
from pydantic import Field

from flows import attribution, closed_loop, config, study_config


def _title() -> str:
    return Path(str(flow_run.parameters["conf"])).stem


@flow(name="closed-loop-of", flow_run_name=_title, log_prints=False)
def run(
    conf: Annotated[str, Field(min_length=1)] = "conf/closed_loop/demo.yaml",
    directory: str = "",
    settings: tuple[str, ...] = (),
) -> str:
    """Run the closed loop of a configuration, or go on with it: pool, score, select, pretrain, evaluate, report.

    Args:
        conf: Path of the YAML file, on the machine of the worker.
        directory: Directory of the run. Empty: runs/NAME of the configuration.
        settings: Fields of the configuration to override, each as a.b=value.

    Returns:
        The digest of the run.
    """
    loop = config.load(Path(conf), settings)
    return str(closed_loop.closed_loop.fn(loop, directory or f"runs/{loop.name}"))


@flow(name="study-of", flow_run_name=_title, log_prints=False)
def study(
    conf: Annotated[str, Field(min_length=1)],
    directory: str = "",
    settings: tuple[str, ...] = (),
) -> str:
    """Run a retrieval study, or go on with it: every method on every pool, with the paper's metrics.

    Args:
        conf: Path of the YAML file, on the machine of the worker.
        directory: Directory of the study. Empty: runs/NAME of the configuration.
        settings: Fields of the configuration to override, each as a.b=value.

    Returns:
        The digest of the study.
    """
    wanted = study_config.load(Path(conf), settings)
    return str(attribution.attribution.fn(wanted, directory or f"runs/{wanted.name}"))
