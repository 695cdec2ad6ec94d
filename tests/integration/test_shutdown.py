"""Every way to end a server, with a job running: nothing is lost, nothing is left behind."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import RunningServer, StartServer

pytestmark = pytest.mark.integration


def stop_in_the_middle_of_a_job(server: "RunningServer", number: signal.Signals) -> None:
    job_id = server.submit(steps=1000)
    server.wait_for_steps(job_id, 5)
    server.process.send_signal(number)
    assert server.process.wait(60) == 0
    row = server.job(job_id)
    assert (row.status.value, row.handed_back) == ("queued", 1)
    assert server.files() == []
    assert server.remaining_processes() == []
    assert not (server.data_dir / "run").exists(), "the folder of the broker's socket was left"
    assert server.wait_for_exit() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_stop_it(start_server: "StartServer", number: signal.Signals) -> None:
    stop_in_the_middle_of_a_job(start_server(), number)


def test_nohup_keeps_it_up_and_lost_output_does_not_matter(start_server: "StartServer") -> None:
    server = start_server(prefix=["nohup"])
    server.process.send_signal(signal.SIGHUP)
    server.stop_listening()
    job_id = server.submit()
    server.wait_until(server.has_nobody_listening, timeout_s=30, what="a line after which nobody listens")
    assert server.wait_for(job_id, "succeeded", "failed").status.value == "succeeded"
    assert server.http.delete(f"/v1/videos/{job_id}").status_code == 200
    stop_in_the_middle_of_a_job(server, signal.SIGTERM)


def test_stop_while_it_is_still_starting(start_server: "StartServer", tmp_path: Path) -> None:
    server = start_server(expect_ready=False)
    # Now there is a sampling process that has only just begun.
    server.wait_until(lambda: server.said("celery@"), timeout_s=30, what="the start of the worker")
    assert server.stop() == 0
    assert server.remaining_processes() == []
    assert [line for line in server.lines if "exited with" in line] == []
