"""What a process logs on stderr, as another reads it, or does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_logs_can_be_json() -> None:
    script = """
import logging
from parleyd.telemetry import logging as telemetry_logging
from parleyd.telemetry.call import Call, current_call
telemetry_logging.configure("info", "json")
current_call.set(Call("Generate", "abc"))
logging.getLogger("parleyd").info("hi")
"""
    stderr = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stderr
    event = json.loads(stderr)
    assert (event["message"], event["request_id"], event["levelname"]) == ("hi", "abc", "INFO")
    assert "request" not in event


def test_a_log_that_nobody_reads_stops_nobody_and_tells_how_much_of_it_is_lost() -> None:
    script = """
import logging, os, sys
from parleyd.telemetry import logging as telemetry_logging
telemetry_logging.configure("info")
for i in range(20000):
    logging.info("line %d", i)
print("on", flush=True)
sys.stdin.readline()
telemetry_logging.flush()
logging.info("the last one")
telemetry_logging.flush()
os._exit(0)
"""
    command = [sys.executable, "-c", script]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "on\n"
        lines = process.communicate("read\n", timeout=60)[1].splitlines()
    told = [int(line.split(" line ")[1]) for line in lines if " line " in line]
    assert told == list(range(len(told)))
    assert lines[len(told)].endswith(f"nobody read the log: {20000 - len(told)} lines are lost")
    assert lines[-1].endswith("the last one")


def test_a_process_that_never_rests_loses_no_line(tmp_path: Path) -> None:
    script = """
import logging
from parleyd.telemetry import logging as telemetry_logging
telemetry_logging.configure("info")
for i in range(10000):
    logging.info("line %d", i)
    sum(range(10000))
"""
    with open(tmp_path / "log", "w") as log:
        subprocess.run([sys.executable, "-c", script], stderr=log, check=True)
    told = [line.rpartition(" line ")[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert told == [str(i) for i in range(10000)]


def test_what_is_written_in_parts_is_whole_and_no_more_at_once_than_a_pipe_takes_whole() -> None:
    script = """
import logging, os, select, threading
from parleyd.telemetry import logging as telemetry_logging
write, all_logged = os.write, threading.Event()
def write_half(fd, data):
    all_logged.wait()
    assert len(data) <= select.PIPE_BUF
    return write(fd, data[: (len(data) + 1) // 2])
os.write = write_half
telemetry_logging.configure("info")
for i in range(1000):
    logging.info("line %d", i)
all_logged.set()
telemetry_logging.flush()
"""
    stderr = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stderr
    assert [line.rpartition(" line ")[2] for line in stderr.splitlines()] == [str(i) for i in range(1000)]


def test_what_cannot_be_logged_as_it_is_ends_neither_its_caller_nor_the_log() -> None:
    script = r"""
import logging, os, threading
from parleyd.telemetry import logging as telemetry_logging
telemetry_logging.configure("info")
logging.info("half a pair: \ud800")
logging.info("%d", "no number")
telemetry_logging.flush()
os.close(2)
logging.info("to nobody")
telemetry_logging.flush()
print(*(thread.name for thread in threading.enumerate()))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert r"root half a pair: \ud800" in ended.stderr
    assert "log" in ended.stdout.split()


def test_logs_tell_no_url_that_a_library_asks_for() -> None:
    script = """
import http.server, threading
try:
    import httpx2 as httpx
except ImportError:  # what earlier versions of huggingface_hub use
    import httpx
from parleyd.telemetry import logging as telemetry_logging
telemetry_logging.configure("debug")
class Redirect(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(302)
        self.send_header("Location", "/there?signature=secret")
        self.end_headers()
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Redirect)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/here?signature=secret"
print(httpx.get(url, trust_env=False).headers["location"])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "secret" in result.stdout
    assert "secret" not in result.stderr


def test_logs_tell_nothing_of_what_clients_send_as_the_state_of_their_traces() -> None:
    script = """
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from parleyd.telemetry import logging as telemetry_logging
from parleyd.telemetry.call import Call
from parleyd.telemetry.tracing import Tracing
telemetry_logging.configure("info")
exporter = InMemorySpanExporter()
trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a secret"}
Tracing(SimpleSpanProcessor(exporter)).call_ended(Call("Generate", "abc", trace_context=trace), "OK")
print(f"{exporter.get_finished_spans()[0].context.trace_id:x}")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "af7651916cd43dd8448eb211c80319c\n"
    assert "secret" not in result.stderr
