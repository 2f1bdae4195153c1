"""What the Prefect faces of all stages share. Prefect is imported here, in each ``task.py`` and in flows/ only."""

from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed

from tasks.common.progress import Report, Share
from tasks.common.stage import Ref


def settle(ref: Ref) -> Ref | State:
    """A stage that was found whole ends its task run in the state ``Cached``, so the UI shows what was not redone."""
    if ref.cached:
        return Completed(name="Cached", message=f"found whole, digest {ref.digest[:12]}", data=ref)
    return ref


def reporter(what: str) -> Report:
    """A report that shows the share done, the rate and the time left as a progress artifact of the running task."""
    artifact: list[UUID] = []

    def report(share: float) -> None:
        described = f"{what}: {share.words}" if isinstance(share, Share) else what
        if not artifact:
            made: Any = create_progress_artifact(progress=100.0 * share, description=described)
            artifact.append(made)
        else:
            update_progress_artifact(artifact[0], progress=100.0 * share, description=described)

    return report


def worth_retrying(_: Any, __: Any, state: State) -> bool:
    """Whether a failed task may succeed when run again: a broken connection, not bad input or a bug."""
    try:
        state.result()
    except (ConnectionError, TimeoutError):
        return True
    except BaseException:
        return False
    return False
