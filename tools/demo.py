"""`make demo`: starts the service on a free port, streams one real answer from it, and stops it again."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from parley_client import Client, ParleyError, user

PROMPT = "Give me a short introduction to large language models."
MAX_NEW_TOKENS = 96
READY_TIMEOUT_S = 600  # the first start converts the model
ANSWER_TIMEOUT_S = 300
STOP_TIMEOUT_S = 60


def main() -> int:
    """The exit code is 0 only if the answer was complete and the service stopped cleanly."""
    # As on Ctrl-C, so that being stopped stops the service too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parleyd = Path(sys.executable).parent / "parleyd"
    command = [str(parleyd), "serve", "--port", "0", "--drain-delay", "0", "--log-level", "warning"]
    # In a session of its own: the terminal's Ctrl-C is for this program, which then stops the service in order.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as service:
        try:
            is_answered = _ask(service)
        except ParleyError as error:
            print(f"demo: {error}", file=sys.stderr)
            is_answered = False
        except KeyboardInterrupt:
            is_answered = False
            print("\ndemo: interrupted", file=sys.stderr)
        finally:
            code = _stop(service)
    if code != 0:
        print(f"demo: parleyd ended with exit code {code}", file=sys.stderr)
    return 0 if is_answered and code == 0 else 1


def _ask(service: subprocess.Popen[str]) -> bool:
    assert service.stdout is not None
    announcement = service.stdout.readline().strip()
    if not announcement.startswith("listening on "):
        print("demo: parleyd did not start", file=sys.stderr)
        return False
    target = announcement.removeprefix("listening on ")
    print(f"parleyd listens on {target}; loading the model…", flush=True)
    with Client(target, timeout=ANSWER_TIMEOUT_S) as client:
        client.wait_until_ready(timeout=READY_TIMEOUT_S)
        print(f"\nyou: {PROMPT}\n\n{client.model_info().model}: ", end="", flush=True)
        with client.stream([user(PROMPT)], max_new_tokens=MAX_NEW_TOKENS) as stream:
            for piece in stream:
                print(piece, end="", flush=True)
        print(f"\n\n({len(stream.reply.token_ids)} tokens; finish reason: {stream.reply.finish_reason})", flush=True)
    return True


def _stop(service: subprocess.Popen[str]) -> int:
    service.terminate()
    try:
        return service.wait(STOP_TIMEOUT_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        service.kill()
        return service.wait()


if __name__ == "__main__":
    sys.exit(main())
