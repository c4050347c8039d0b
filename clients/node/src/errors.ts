// Failed calls as typed errors, rebuilt from the google.rpc.Status in their trailers.
import { type Metadata, type ServiceError, status } from "@grpc/grpc-js";

import { BadRequest, ErrorInfo, RetryInfo } from "./gen/google/rpc/error_details.js";
import { Status } from "./gen/google/rpc/status.js";
import { ErrorReason } from "./gen/parley/v1/errors.js";

const DOMAIN = "parley.v1";
// What gRPC has UNAVAILABLE and INTERNAL for.
const CLOSED = "Channel closed before call started";
const NOT_ENCODED = "Request message serialization failure: ";
const TYPE_PREFIX = "type.googleapis.com/google.rpc.";

/** Why a call failed, as the contract names it; errors.proto documents each. */
export type Reason = Exclude<keyof typeof ErrorReason, "UNSPECIFIED" | "UNRECOGNIZED">;

/** One thing wrong with a request: `field` is a path such as `messages[1].role`. */
export interface Violation {
  field: string;
  description: string;
}

/** A call, or one item of a batch, failed. */
export class ParleyError extends Error {
  override readonly name = "ParleyError";

  constructor(
    message: string,
    /** The gRPC status code. */
    readonly code: status,
    /** The contract's name for the cause; undefined where the server named none, as when it was not reached. */
    readonly reason?: Reason | (string & {}),
    /** Further facts, as the reason defines them: `prompt_tokens`, `served`, `field`, … */
    readonly metadata: Readonly<Record<string, string>> = {},
    /** Every wrong field, of an INVALID_REQUEST. */
    readonly violations: readonly Violation[] = [],
    /** Milliseconds after which another try makes sense; undefined where the server tells none. */
    readonly retryDelayMs?: number,
    /** The request's id, to find it in the server's log. */
    readonly requestId?: string,
    options?: ErrorOptions,
  ) {
    super(message, options);
  }

  /** The error of a failed call. `headers`: of its response; a server that died in between sent no trailers. */
  static fromCall(error: ServiceError, headers?: Metadata): ParleyError {
    // Of a message that is marked as compressed and must not be, gRPC tells neither.
    const { code = status.INTERNAL, details: text = "the server's answer cannot be read" } = error as Partial<ServiceError>;
    const details = decode(Status, first(error.metadata, "grpc-status-details-bin"));
    if (text === CLOSED) return new ParleyError("the client was closed", status.CANCELLED);
    if (text.startsWith(NOT_ENCODED)) {
      const message = `invalid request: ${text.slice(NOT_ENCODED.length)}`;
      return new ParleyError(message, status.INVALID_ARGUMENT, "INVALID_REQUEST", {}, [], undefined, undefined, { cause: error });
    }
    const requestId = (first(error.metadata, "x-request-id") ?? first(headers, "x-request-id"))?.toString();
    return build(code, details?.message || text, details, requestId, { cause: error });
  }

  /** The error of an item of a batch. */
  static fromStatus(proto: Status, requestId?: string): ParleyError {
    return build(proto.code, proto.message, proto, requestId);
  }
}

function build(
  code: status,
  message: string,
  details: Status | undefined,
  requestId?: string,
  options?: ErrorOptions,
): ParleyError {
  const info = detail(details, "ErrorInfo", ErrorInfo);
  const retry = detail(details, "RetryInfo", RetryInfo)?.retryDelay;
  return new ParleyError(
    message,
    code,
    info?.domain === DOMAIN ? info.reason : undefined,
    info?.metadata,
    detail(details, "BadRequest", BadRequest)?.fieldViolations.map(({ field, description }) => ({ field, description })),
    retry && Number(retry.seconds) * 1000 + retry.nanos / 1e6,
    requestId,
    options,
  );
}

interface Decoder<T> {
  decode(bytes: Uint8Array): T;
}

function detail<T>(details: Status | undefined, name: string, type: Decoder<T>): T | undefined {
  return decode(type, details?.details.find(({ typeUrl }) => typeUrl === TYPE_PREFIX + name)?.value);
}

/** A mangled detail must not hide the error itself. */
function decode<T>(type: Decoder<T>, bytes: string | Uint8Array | undefined): T | undefined {
  try {
    return bytes instanceof Uint8Array ? type.decode(bytes) : undefined;
  } catch {
    return undefined;
  }
}

function first(metadata: Metadata | undefined, key: string): string | Buffer | undefined {
  return metadata?.get(key)[0];
}
