"""A livekit-agents `AgentServer` whose jobs run on our own event loop.

Registration, retries, dispatch, load reports and drain stay livekit-agents'. Only its process pool
is replaced, through the module attribute `ipc.proc_pool.ProcPool`, and only while one server
starts: other AgentServers of this process keep theirs. One private name of `AgentServer` is read,
`_connecting`, which nothing public tells. A version in which this is different is noticed at the
start, not at the first job.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Protocol

from livekit import rtc
from livekit.agents import AgentServer, JobRequest, ipc
from livekit.agents import __version__ as AGENTS_VERSION
from livekit.agents.job import RunningJobInfo

from src.orchestrator.rooms.agent_server import IncompatibleAgents

__all__ = [
    "AgentServer", "InLoop", "JobHost", "JobRequest", "RunningJobInfo", "check_agents", "connected",
]  # fmt: skip

_CLOSE_S = 10.0
_POOL_NAMES = (
    "processes", "start", "aclose", "launch_job", "get_by_job_id", "set_target_idle_processes",
)  # fmt: skip


class JobHost(Protocol):
    """Who does the work."""

    def begin_job(self, info: RunningJobInfo) -> asyncio.Future[None]:
        """Done when the job has ended. May raise: the job is then not taken."""
        ...

    def close_job(self, info: RunningJobInfo) -> None:
        """Ask it to end."""
        ...


def _changed(what: str) -> IncompatibleAgents:
    return IncompatibleAgents(
        f"livekit-agents {AGENTS_VERSION} is not built as we expect: {what}; "
        "set livekit.entry to direct, or install livekit-agents 1.8"
    )


def check_agents() -> None:
    """Raises IncompatibleAgents."""
    pool = getattr(getattr(ipc, "proc_pool", None), "ProcPool", None)
    gone = [name for name in _POOL_NAMES if not hasattr(pool, name)]
    if gone:
        raise _changed(f"its process pool has no {', '.join(gone)}")
    states = getattr(getattr(ipc, "job_executor", None), "JobStatus", None)
    if not all(hasattr(states, name) for name in ("RUNNING", "SUCCESS")):
        raise _changed("its jobs have other states")


def connected(server: AgentServer) -> bool:
    """Registered at the LiveKit server now. Raises IncompatibleAgents."""
    connecting = getattr(server, "_connecting", None)
    if not isinstance(connecting, bool):
        raise _changed("it does not tell whether it is connected")
    return not connecting and server.id != "unregistered"


class InLoop:
    """`with InLoop(host):` an AgentServer that starts inside takes our pool."""

    def __init__(self, host: JobHost) -> None:
        self._host = host
        self._original: Any = None
        self._made = False

    def __enter__(self) -> InLoop:
        module: Any = ipc.proc_pool
        self._original, module.ProcPool = module.ProcPool, self._make
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        module: Any = ipc.proc_pool
        module.ProcPool = self._original

    def check(self) -> None:
        """After the start. Raises IncompatibleAgents."""
        if not self._made:
            raise _changed("it starts without asking for the process pool")

    def _make(self, **options: Any) -> InLoopPool:
        self._made = True
        return InLoopPool(self._host)


class Job:
    """The part of livekit-agents' `JobExecutor` that its server uses."""

    def __init__(self, info: RunningJobInfo, host: JobHost) -> None:
        self.id = info.job.id
        self.running_job: RunningJobInfo | None = info
        self.status = ipc.job_executor.JobStatus.RUNNING
        self._info = info
        self._host = host
        self.ended = host.begin_job(info)

    async def join(self) -> None:
        await asyncio.wait([self.ended])

    async def aclose(self) -> None:
        """Who does the work has the tasks, and ends those that do not end by themselves."""
        self._host.close_job(self._info)
        await asyncio.wait([self.ended], timeout=_CLOSE_S)

    def logging_extra(self) -> dict[str, Any]:
        return {"job_id": self.id}


class InLoopPool(rtc.EventEmitter[str]):
    """The part of livekit-agents' `ProcPool` that its server uses.

    It starts what it is given: how many may come is decided where jobs are accepted.
    """

    def __init__(self, host: JobHost) -> None:
        super().__init__()
        self._host = host
        self._jobs: dict[str, Job] = {}

    @property
    def processes(self) -> list[Job]:
        return list(self._jobs.values())

    def set_target_idle_processes(self, count: int) -> None:
        """We keep none."""

    def get_by_job_id(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    async def start(self) -> None: ...

    async def launch_job(self, info: RunningJobInfo) -> None:
        job = self._jobs[info.job.id] = Job(info, self._host)
        self.emit("process_job_launched", job)
        job.ended.add_done_callback(lambda _: self._done(job))

    async def aclose(self) -> None:
        await asyncio.gather(*(job.aclose() for job in self.processes))

    def _done(self, job: Job) -> None:
        job.status = ipc.job_executor.JobStatus.SUCCESS
        self.emit("process_closed", job)
        del self._jobs[job.id]
