"""Ray's Jobs API as the control plane sees it (`orchestrator.runs.client.JobClient`)."""

from __future__ import annotations

from typing import Any

from cluster.dashboard import Dashboard, last_line
from cluster.package import code_package
from orchestrator.errors import ClusterError
from orchestrator.runs.client import JobStatus


class RayJobClient:
    """Submits, watches and stops jobs on one cluster, shipping this project's code with each."""

    def __init__(self, dashboard: Dashboard, *, local: bool):
        self.dashboard, self.local = dashboard, local

    def submit(self, submission_id: str, entrypoint: str, *, env: dict[str, str], metadata: dict[str, str]) -> None:
        """Start a job with the project's code; a submission id that exists already is left as it is.

        The entrypoint reserves nothing (its CPUs belong to the workers), so it starts even on a full cluster.
        """
        if self.status(submission_id) is not None:
            return
        body = {
            "submission_id": submission_id,
            "entrypoint": entrypoint,
            "entrypoint_num_cpus": 0,
            "runtime_env": {"working_dir": self._upload_code(), "env_vars": env},
            "metadata": metadata,
        }
        answer = self.dashboard.post("/api/jobs/", body)
        if answer.ok:
            return
        # Two submitters at once: Ray lets one win and tells the other; the job is there, which is what was asked for.
        if "already exists" in answer.text or self.status(submission_id) is not None:
            return
        raise ClusterError(
            f"Ray at {self.dashboard.address} did not take job {submission_id}: {last_line(answer.text)}",
            hint="Look at the head node's dashboard_agent.log, then submit again: the same job is never started twice.",
            submission_id=submission_id,
        )

    def status(self, submission_id: str) -> tuple[JobStatus, str] | None:
        """State and Ray's message, or None when the cluster does not know the job."""
        answer = self.dashboard.get(f"/api/jobs/{submission_id}")
        if answer.status_code == 404:
            return None
        job = _json(answer, self.dashboard.address)
        return JobStatus(job["status"]), job.get("message") or ""

    def stop(self, submission_id: str) -> None:
        """Ask Ray to end the job (SIGTERM, then SIGKILL after 3 s); no error when it has ended or is unknown."""
        answer = self.dashboard.post(f"/api/jobs/{submission_id}/stop")
        if answer.ok or answer.status_code == 404:
            return
        known = self.status(submission_id)
        if known is not None and not known[0].final:
            raise ClusterError(
                f"Ray at {self.dashboard.address} did not stop job {submission_id}: {last_line(answer.text)}",
                hint="Try again; if it stays, stop it in Ray's dashboard.",
                submission_id=submission_id,
            )

    def logs(self, submission_id: str) -> str:
        """What the job's driver printed so far; empty for an unknown job."""
        answer = self.dashboard.get(f"/api/jobs/{submission_id}/logs")
        return "" if answer.status_code == 404 else _json(answer, self.dashboard.address).get("logs") or ""

    def active(self) -> list[str]:
        """Submission ids of the jobs that are waiting or running, ours and others'."""
        jobs = self.dashboard.get("/api/jobs/").json()
        return sorted(
            job["submission_id"] for job in jobs if job.get("submission_id") and not JobStatus(job["status"]).final
        )

    def newest(self, prefix: str) -> str | None:
        """The entrypoint of the newest job of this prefix that succeeded, if this very code was its own; else None."""
        jobs = [
            job
            for job in self.dashboard.get("/api/jobs/").json()
            if (job.get("submission_id") or "").startswith(prefix)
        ]
        done = [job for job in jobs if JobStatus(job["status"]) is JobStatus.SUCCEEDED]
        if not done:
            return None
        job = max(done, key=lambda job: job.get("end_time") or 0)
        ours = f"gcs://{code_package()[0]}"
        return job["entrypoint"] if (job.get("runtime_env") or {}).get("working_dir") == ours else None

    def delete(self, submission_id: str) -> None:
        """Forget a job that has ended, with its record; no error when it is unknown."""
        self.dashboard.delete(f"/api/jobs/{submission_id}")

    def describe(self) -> dict[str, Any]:
        """Address, dashboard URL, versions of Ray; `python` only when the cluster is local."""
        found = self.dashboard.version()
        described = {
            "address": self.dashboard.address,
            "dashboard": self.dashboard.address,
            "ray": found["ray_version"],
            "session": found.get("session_name", ""),
            "local": self.local,
        }
        if self.local:
            import platform

            described["python"] = platform.python_version()
        return described

    def _upload_code(self) -> str:
        name, data = code_package()
        path = f"/api/packages/gcs/{name}"
        # The question also pins the package for ten minutes, so it cannot be collected before the job starts.
        if self.dashboard.get(path).status_code == 404:
            answer = self.dashboard.put(path, data)
            if not answer.ok:
                raise ClusterError(
                    f"Ray at {self.dashboard.address} did not take the project's code: {last_line(answer.text)}",
                    hint="Look at the head node's dashboard log.",
                )
        return f"gcs://{name}"


def _json(answer: Any, address: str) -> dict[str, Any]:
    try:
        return answer.json()
    except ValueError as error:
        raise ClusterError(
            f"{address} does not answer like Ray's Jobs API: {answer.text[:120]!r}.",
            hint="Give the address of the Ray dashboard, as http://HOST:8265.",
            address=address,
        ) from error
