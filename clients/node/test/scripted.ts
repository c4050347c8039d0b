// A gRPC server that answers as each test tells it to.
import { after } from "node:test";

import { Metadata, Server, ServerCredentials, type ServerWritableStream, status } from "@grpc/grpc-js";

import { ErrorInfo, RetryInfo } from "../dist/gen/google/rpc/error_details.js";
import { Status } from "../dist/gen/google/rpc/status.js";
import {
  ChatServiceService,
  type ChatServiceServer,
  type GenerateRequest,
  GenerateStreamResponse,
} from "../dist/gen/parley/v1/chat.js";

export type StreamCall = ServerWritableStream<GenerateRequest, GenerateStreamResponse>;

/** Serves `handlers` until the tests are over, by default at a free port; returns HOST:PORT. */
export async function serve(
  handlers: Partial<ChatServiceServer>,
  credentials: ServerCredentials = ServerCredentials.createInsecure(),
  address = "127.0.0.1:0",
): Promise<string> {
  const server = new Server();
  server.addService(ChatServiceService, handlers as ChatServiceServer);
  const port = await new Promise<number>((resolve, reject) =>
    server.bindAsync(address, credentials, (error, bound) => (error ? reject(error) : resolve(bound))),
  );
  after(() => server.forceShutdown());
  return `127.0.0.1:${port}`;
}

/** One message of a stream. */
export function delta(fields: Parameters<typeof GenerateStreamResponse.fromPartial>[0]): GenerateStreamResponse {
  return GenerateStreamResponse.fromPartial(fields);
}

/** A google.rpc.Status as the contract has it. */
export function refusal(code: status, reason: string, retryMs?: number): Status {
  const pack = (name: string, value: Uint8Array) => ({
    typeUrl: `type.googleapis.com/google.rpc.${name}`,
    value: Buffer.from(value),
  });
  const info = ErrorInfo.fromPartial({ domain: "parley.v1", reason, metadata: { served: "scripted" } });
  const details = [pack("ErrorInfo", ErrorInfo.encode(info).finish())];
  if (retryMs !== undefined) {
    const retry = RetryInfo.fromPartial({ retryDelay: { seconds: Math.trunc(retryMs / 1e3), nanos: (retryMs % 1e3) * 1e6 } });
    details.push(pack("RetryInfo", RetryInfo.encode(retry).finish()));
  }
  return Status.fromPartial({ code, message: "as scripted", details });
}

/** What a handler gives to end its call with that status. */
export function failure(code: status, reason: string, retryMs?: number) {
  const metadata = new Metadata();
  metadata.set("x-request-id", "request-1");
  metadata.set("grpc-status-details-bin", Buffer.from(Status.encode(refusal(code, reason, retryMs)).finish()));
  return { code, details: "as scripted", metadata };
}
