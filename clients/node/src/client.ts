// The client: one connection, every RPC of parley.v1.ChatService.
import { setTimeout as sleep } from "node:timers/promises";

import {
  type CallOptions as GrpcCallOptions,
  type ChannelOptions,
  type ClientReadableStream,
  type ClientUnaryCall,
  credentials,
  Metadata,
  type ServiceError,
  status,
} from "@grpc/grpc-js";

import { ParleyError } from "./errors.js";
import {
  ChatServiceClient,
  CountTokensRequest,
  GenerateBatchRequest,
  GenerateRequest,
  type GenerateResponse,
  GetModelRequest,
  type GetModelResponse,
} from "./gen/parley/v1/chat.js";
import type { CountTokensInput, GenerateInput } from "./messages.js";
import { type Contact, Patience } from "./patience.js";
import { build } from "./request.js";
import { Stream } from "./stream.js";

/** Certificates and keys, in PEM. */
export interface TlsOptions {
  /** Who vouches for the server; default: the certificate authorities that Node knows. */
  rootCertificates?: Buffer;
  /** This client's own key and certificate chain, where the server asks for them (mutual TLS). */
  privateKey?: Buffer;
  certificateChain?: Buffer;
  /** The name in the server's certificate, where it is not the one connected to. */
  serverName?: string;
}

export interface ClientOptions {
  /** Encrypts the connection; default: plain text. */
  tls?: boolean | TlsOptions;
  /** Sent as `authorization: Bearer …` with each call: over TLS, or to this machine. */
  apiKey?: string;
  /** Lets the key cross a network in plain text, where something else protects it. */
  insecure?: boolean;
  /** Further metadata of each call. */
  metadata?: Record<string, string>;
  /** Milliseconds that each call may take, unless it says otherwise; default: no limit. */
  timeoutMs?: number;
  /**
   * How often in a row, over some 16 s, a call that ends UNAVAILABLE even after gRPC's own retries is made again; on the
   * way a full queue is waited for too. A stream that broke is resumed where it broke. No batch is made again, and no
   * call where no server of the target has ever answered. Default: 8; 0 is never.
   */
  maxResumes?: number;
}

export interface CallOptions {
  /** Milliseconds that queueing and generation may take, resumes included. */
  timeoutMs?: number;
  /** Cancels the call, which frees the model; the call then throws `signal.reason`. */
  signal?: AbortSignal;
}

/** What became of the item at `index` of a batch. */
export type BatchResult =
  | { index: number; response: GenerateResponse; error?: undefined }
  | { index: number; response?: undefined; error: ParleyError };

type Unary<Request, Response> = (
  request: Request,
  metadata: Metadata,
  options: Partial<GrpcCallOptions>,
  callback: (error: ServiceError | null, response: Response) => void,
) => ClientUnaryCall;

type Streaming<Request, Response> = (
  request: Request,
  metadata: Metadata,
  options: Partial<GrpcCallOptions>,
) => ClientReadableStream<Response>;

// Without a port gRPC would try that of HTTPS, and take what else begins like a URL for a host's name.
const TARGET = /^(([^\s:/,[\]]+|\[[^\s/,[\]]+\]):\d+|(dns|unix|ipv4|ipv6|xds):\S+)$/;
const LOCAL_TARGET = /^(dns:\/{0,3}|ipv[46]:)?(localhost|127(\.\d+){3}|\[::1\]):\d+$|^unix:/;
const KEY = /^[!-~]+$/;
const METADATA_VALUE = /^[ -~]*$/;
const ENDLESS_MS = 1e14; // gRPC's timeouts have eight digits, of hours at most
const LONGEST_TIMER_MS = 2 ** 31 - 1; // Node takes a longer one for one of 1 ms
const DEFAULT_MAX_RESUMES = 8; // over some 16 s: longer than a server takes to come back

/** A connection to a Parley server, made with the first call. Every call that fails throws a ParleyError. */
export class Client {
  readonly #stub: ChatServiceClient;
  readonly #metadata = new Metadata();
  readonly #timeoutMs: number | undefined;
  readonly #maxResumes: number;
  readonly #contact: Contact = { isMade: false };
  readonly #closing = new AbortController();

  /** `target`: where the server listens, "HOST:PORT" or any other gRPC target. */
  constructor(target = "localhost:50051", options: ClientOptions = {}) {
    if (!TARGET.test(target)) {
      const examples = "such as localhost:50051 or [::1]:50051";
      throw new TypeError(`${JSON.stringify(target)} is no HOST:PORT, ${examples}, nor another target of gRPC's`);
    }
    const tls = options.tls === true ? {} : options.tls || undefined;
    const apiKey = options.apiKey ?? undefined;
    // gRPC's own error would tell the key.
    if (apiKey !== undefined && (typeof apiKey !== "string" || !KEY.test(apiKey))) {
      throw new TypeError("apiKey: is empty, or has blanks, line ends or letters beyond ASCII: no key has");
    }
    if (apiKey !== undefined && !tls && !options.insecure && !LOCAL_TARGET.test(target)) {
      throw new TypeError(`an API key must not cross the network to ${target} in plain text: give tls, or insecure`);
    }
    const channel = tls
      ? credentials.createSsl(tls.rootCertificates, tls.privateKey, tls.certificateChain)
      : credentials.createInsecure();
    this.#stub = new ChatServiceClient(target, channel, channelOptions(target, tls?.serverName));
    for (const [key, value] of Object.entries(options.metadata ?? {})) {
      // gRPC's own error would tell the value, which may be a key.
      if (typeof value === "string" && !METADATA_VALUE.test(value))
        throw new TypeError(`metadata: ${key}: is no text in printable ASCII`);
      this.#metadata.set(key, value);
    }
    if (apiKey !== undefined) this.#metadata.set("authorization", `Bearer ${apiKey}`);
    this.#timeoutMs = options.timeoutMs;
    this.#maxResumes = options.maxResumes ?? DEFAULT_MAX_RESUMES;
  }

  /** Lets the calls in progress end, and then the connection; no other call can begin, nor one go on elsewhere. */
  close(): void {
    this.#closing.abort();
    this.#stub.close();
  }

  /** Answers a conversation and waits for the whole answer. */
  async generate(request: GenerateInput, options: CallOptions = {}): Promise<GenerateResponse> {
    return this.#unary(this.#stub.generate, build(GenerateRequest, request), options);
  }

  /** The same answer as it is made; resumed by itself where its connection breaks. See `Stream`. */
  stream(request: GenerateInput, options: CallOptions = {}): Stream {
    const deadline = this.#deadline(options);
    return new Stream(
      build(GenerateRequest, request),
      (part) => this.#streaming(this.#stub.generateStream, part, deadline, options.signal),
      (ms) => this.#pause(ms, deadline, options.signal),
      new Patience(this.#maxResumes, this.#contact),
    );
  }

  /** Answers up to 1,024 conversations, each as it finishes. An item that fails does so alone. */
  async *batch(requests: GenerateInput[], options: CallOptions = {}): AsyncGenerator<BatchResult, void> {
    const batch = build(GenerateBatchRequest, { requests });
    const open = new Set(batch.requests.keys());
    const deadline = this.#deadline(options);
    const messages = this.#streaming(this.#stub.generateBatch, batch, deadline, options.signal);
    let isBegun = false;
    try {
      for await (const { index, response, error } of messages) {
        isBegun = true;
        open.delete(index);
        if (response) yield { index, response };
        else yield { index, error: ParleyError.fromStatus(error!, batch.requests[index]?.requestId || undefined) };
      }
    } catch (error) {
      if (!isBegun || open.size > 0) throw error; // else every result is here: how the call ends says nothing more
    }
    if (open.size > 0) throw new ParleyError(`the batch ended without ${open.size} of its results`, status.INTERNAL);
  }

  /** Tokens of the conversation as the model would read it, after the chat template. Counts over-long ones too. */
  async countTokens(request: CountTokensInput, options: CallOptions = {}): Promise<number> {
    const counted = build(CountTokensRequest, request);
    return (await this.#unary(this.#stub.countTokens, counted, options)).promptTokens;
  }

  /** What is served, its limits and its defaults. */
  model(name = "", options: CallOptions = {}): Promise<GetModelResponse> {
    return this.#unary(this.#stub.getModel, build(GetModelRequest, { model: name }), options);
  }

  #checkOpen(signal: AbortSignal | undefined): void {
    signal?.throwIfAborted();
    if (this.#closing.signal.aborted) throw new ParleyError("the client was closed", status.CANCELLED);
  }

  #deadline({ timeoutMs = this.#timeoutMs }: CallOptions): number | undefined {
    if (timeoutMs === undefined) return undefined;
    // gRPC would throw where nobody can catch it, and the call never end.
    if (typeof timeoutMs !== "number" || Number.isNaN(timeoutMs)) {
      throw new TypeError(`timeoutMs: ${String(timeoutMs)} is no number of milliseconds`);
    }
    return timeoutMs > ENDLESS_MS ? undefined : Date.now() + timeoutMs;
  }

  /** The time before a call is made again, which finds out why the pause was cut short. */
  async #pause(ms: number, deadline: number | undefined, signal: AbortSignal | undefined): Promise<void> {
    const remainingMs = deadline === undefined ? ms : Math.max(deadline - Date.now(), 0);
    const wake = AbortSignal.any([this.#closing.signal, ...(signal ? [signal] : [])]);
    await sleep(Math.min(ms, remainingMs, LONGEST_TIMER_MS), undefined, { signal: wake }).catch(() => {});
  }

  /** Made again where that may help: nothing of its answer has been seen yet. */
  async #unary<Request, Response>(
    method: Unary<Request, Response>,
    request: Request,
    options: CallOptions,
  ): Promise<Response> {
    const deadline = this.#deadline(options);
    const patience = new Patience(this.#maxResumes, this.#contact);
    for (;;) {
      try {
        const response = await this.#unaryOnce(method, request, deadline, options.signal);
        patience.noteProgress();
        return response;
      } catch (error) {
        const delayMs = patience.delayBeforeAgain(error);
        if (delayMs === undefined) throw error;
        await this.#pause(delayMs, deadline, options.signal);
      }
    }
  }

  #unaryOnce<Request, Response>(
    method: Unary<Request, Response>,
    request: Request,
    deadline: number | undefined,
    signal: AbortSignal | undefined,
  ): Promise<Response> {
    return new Promise((resolve, reject) => {
      this.#checkOpen(signal);
      let headers: Metadata | undefined;
      const call = method.call(this.#stub, request, this.#metadata.clone(), { deadline }, (error, response) => {
        signal?.removeEventListener("abort", cancel);
        if (signal?.aborted) reject(signal.reason);
        else if (error) reject(ParleyError.fromCall(error, headers));
        else resolve(response);
      });
      call.once("metadata", (received: Metadata) => (headers = received));
      const cancel = () => call.cancel();
      signal?.addEventListener("abort", cancel, { once: true });
    });
  }

  async *#streaming<Request, Response>(
    method: Streaming<Request, Response>,
    request: Request,
    deadline: number | undefined,
    signal: AbortSignal | undefined,
  ): AsyncGenerator<Response, void> {
    this.#checkOpen(signal);
    let headers: Metadata | undefined;
    const call = method.call(this.#stub, request, this.#metadata.clone(), { deadline });
    call.once("metadata", (received: Metadata) => (headers = received));
    const cancel = () => call.cancel();
    signal?.addEventListener("abort", cancel, { once: true });
    try {
      for await (const message of call) yield message as Response;
    } catch (error) {
      signal?.throwIfAborted();
      throw ParleyError.fromCall(error as ServiceError, headers);
    } finally {
      signal?.removeEventListener("abort", cancel);
      call.cancel();
    }
  }
}

/** As the Python client's: turns among addresses, retries until the first message, a dead connection noticed in 40 s. */
function channelOptions(target: string, serverName: string | undefined): ChannelOptions {
  const retryPolicy = {
    maxAttempts: 4,
    initialBackoff: "0.1s",
    maxBackoff: "2s",
    backoffMultiplier: 2,
    retryableStatusCodes: ["UNAVAILABLE"],
  };
  const serviceConfig = {
    loadBalancingConfig: [{ round_robin: {} }],
    methodConfig: [{ name: [{ service: "parley.v1.ChatService" }], retryPolicy }],
    retryThrottling: { maxTokens: 1000, tokenRatio: 0.5 },
  };
  return {
    "grpc.max_receive_message_length": -1,
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 10_000,
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 5_000,
    // Else connections, and their waits between tries, are those of all clients of the process, and of closed ones.
    "grpc.use_local_subchannel_pool": 1,
    // The proxy that $http_proxy names cannot know what this machine calls localhost.
    "grpc.enable_http_proxy": LOCAL_TARGET.test(target) ? 0 : 1,
    "grpc.service_config": JSON.stringify(serviceConfig),
    ...(serverName === undefined ? {} : { "grpc.ssl_target_name_override": serverName }),
  };
}
