"""One error of each class."""

from __future__ import annotations

from parleyd import errors
from parleyd.errors import ParleyError, Violation

EXAMPLES: dict[type[ParleyError], ParleyError] = {
    errors.InvalidRequest: errors.InvalidRequest([Violation("a.b", "wrong"), Violation("c", "wrong too")]),
    errors.PromptTooLong: errors.PromptTooLong(9, 8),
    errors.ModelNotFound: errors.ModelNotFound("x", ["y"]),
    errors.Unsupported: errors.Unsupported("tools", "no"),
    errors.QueueFull: errors.QueueFull("full", 1.5),
    errors.ClientLimit: errors.ClientLimit("enough", 2.5),
    errors.Unauthenticated: errors.Unauthenticated("secret"),
    errors.PermissionDenied: errors.PermissionDenied("no"),
    errors.DeadlineExceeded: errors.DeadlineExceeded(),
    errors.NotReady: errors.NotReady(),
    errors.Draining: errors.Draining(),
    errors.WorkerLost: errors.WorkerLost(),
    errors.SlowReader: errors.SlowReader(60.0),
    errors.EngineFault: errors.EngineFault("secret"),
}
