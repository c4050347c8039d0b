"""Chat with the models of a Parley server.

    from parley_client import Client, user

    with Client("localhost:50051") as client:
        reply = client.chat([user("Give me a short introduction to large language models.")], max_new_tokens=512)
        print(reply.content)

`AsyncClient` is the same for asyncio.
"""

from parley_client.aio import AsyncClient, AsyncStream
from parley_client.batch import BatchResult
from parley_client.client import Client, Stream
from parley_client.credentials import tls_credentials
from parley_client.errors import (
    Cancelled,
    ConnectionFailed,
    DeadlineExceeded,
    Draining,
    IncompleteStream,
    Internal,
    InvalidRequest,
    MessageTooLarge,
    ModelNotFound,
    NotReady,
    ParleyError,
    PermissionDenied,
    PromptTooLong,
    QueueFull,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    Unsupported,
    Violation,
    WorkerLost,
)
from parley_client.health import HealthStatus
from parley_client.logprobs import TokenLogprob, TopLogprob
from parley_client.messages import AnyTool, Message, Role, Tool, ToolCall, assistant, system, tool, user
from parley_client.model_info import ModelInfo
from parley_client.options import ChatOptions, GenerationOptions
from parley_client.piece import Piece
from parley_client.reply import Choice, FinishReason, Reply, Timings, Usage
from parley_client.request import AnyMessage, chat_request

__all__ = [
    "AnyMessage",
    "AnyTool",
    "AsyncClient",
    "AsyncStream",
    "BatchResult",
    "Cancelled",
    "ChatOptions",
    "Choice",
    "Client",
    "ConnectionFailed",
    "DeadlineExceeded",
    "Draining",
    "FinishReason",
    "GenerationOptions",
    "HealthStatus",
    "IncompleteStream",
    "Internal",
    "InvalidRequest",
    "Message",
    "MessageTooLarge",
    "ModelInfo",
    "ModelNotFound",
    "NotReady",
    "ParleyError",
    "PermissionDenied",
    "Piece",
    "PromptTooLong",
    "QueueFull",
    "Reply",
    "Role",
    "Stream",
    "Timings",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "TopLogprob",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Unsupported",
    "Usage",
    "Violation",
    "WorkerLost",
    "assistant",
    "chat_request",
    "system",
    "tls_credentials",
    "tool",
    "user",
]
