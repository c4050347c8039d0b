// The client against a server that answers by script: errors, resuming, credentials.
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { createServer } from "node:http2";
import { type AddressInfo, createServer as createTcpServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";

import { Metadata, ServerCredentials } from "@grpc/grpc-js";

import {
  Client,
  type ClientOptions,
  FinishReason,
  GenerateBatchResponse,
  type GenerateInput,
  type GenerateRequest,
  GenerateResponse,
  GetModelResponse,
  ParleyError,
  Role,
  status,
  ToolChoice_Mode,
  user,
} from "../dist/index.js";
import { delta, failure, refusal, serve, type StreamCall } from "./scripted.ts";

const QUESTION = { messages: [user("Hi")] };

function connect(target: string, options?: ClientOptions): Client {
  const client = new Client(target, { timeoutMs: 20_000, ...options });
  after(() => client.close());
  return client;
}

test("an error tells reason, metadata, delay and request id", async () => {
  const target = await serve({
    generate: (_, callback) => callback(failure(status.RESOURCE_EXHAUSTED, "QUEUE_FULL", 1500)),
  });
  await assert.rejects(connect(target).generate(QUESTION), (error) => {
    assert(error instanceof ParleyError);
    const { code, reason, message, metadata, retryDelayMs, requestId, violations } = error;
    assert.deepEqual([code, reason, message], [status.RESOURCE_EXHAUSTED, "QUEUE_FULL", "as scripted"]);
    assert.deepEqual([metadata, retryDelayMs, requestId], [{ served: "scripted" }, 1500, "request-1"]);
    assert.deepEqual(violations, []);
    return true;
  });
});

test("a server that is not there has no reason", async () => {
  await assert.rejects(connect("localhost:1").generate(QUESTION), { code: status.UNAVAILABLE, reason: undefined });
});

test("what one client has found refuses no call of another", async () => {
  const listener = createTcpServer().listen(0, "127.0.0.1");
  await once(listener, "listening");
  const target = `127.0.0.1:${(listener.address() as AddressInfo).port}`;
  listener.close();
  await once(listener, "close");
  const early = connect(target, { maxResumes: 0 });
  for (const _ of Array(4)) await assert.rejects(early.model(), { code: status.UNAVAILABLE }); // it waits ever longer
  await serve({ getModel: (_, callback) => callback(null, GetModelResponse.fromPartial({ model: "m" })) }, undefined, target);
  assert.equal((await connect(target, { maxResumes: 0 }).model()).model, "m");
});

test("an answer that is marked as compressed and must not be is an error of its call", async () => {
  const server = createServer().on("stream", (stream) => {
    stream.respond({ ":status": 200, "content-type": "application/grpc" });
    stream.write(Buffer.from([1, 0, 0, 0, 1, 0]));
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  after(() => server.close());
  const client = connect(`127.0.0.1:${(server.address() as AddressInfo).port}`);
  const unreadable = { code: status.INTERNAL, reason: undefined, message: /cannot be read/ };
  await assert.rejects(client.generate(QUESTION), unreadable);
  await assert.rejects(Array.fromAsync(client.stream(QUESTION)), unreadable);
});

test("a batch that breaks after its last result has ended well", async () => {
  const target = await serve({
    generateBatch: (call) => {
      call.write(GenerateBatchResponse.fromPartial({ index: 0, response: {} }));
      call.emit("error", failure(status.UNAVAILABLE, "WORKER_LOST"));
    },
  });
  const client = connect(target);
  assert.equal((await Array.fromAsync(client.batch([QUESTION]))).length, 1);
  await assert.rejects(Array.fromAsync(client.batch([QUESTION, QUESTION])), { reason: "WORKER_LOST" });
});

test("a batch tells each item's answer or error", async () => {
  const target = await serve({
    generateBatch: (call) => {
      call.write(GenerateBatchResponse.fromPartial({ index: 1, response: { seed: 7n } }));
      call.write(
        GenerateBatchResponse.fromPartial({ index: 0, error: refusal(status.RESOURCE_EXHAUSTED, "QUEUE_FULL", 250) }),
      );
      call.end();
    },
  });
  const results = await Array.fromAsync(connect(target).batch([{ ...QUESTION, requestId: "mine" }, QUESTION]));
  assert.deepEqual(results.map(({ index }) => index), [1, 0]);
  assert.equal(results[0]?.response?.seed, 7n);
  assert.equal(results[1]?.error?.reason, "QUEUE_FULL");
  assert.equal(results[1]?.error?.retryDelayMs, 250);
  assert.equal(results[1]?.error?.requestId, "mine");
  await assert.rejects(Array.fromAsync(connect(target).batch([QUESTION, QUESTION, QUESTION])), /without 1 of its/);
});

/** Serves the ids 0 to 9, what a request already has left out, and breaks each call after `breakAfter` of them. */
async function breaking(breakAfter: number, code = status.UNAVAILABLE) {
  const calls: StreamCall["request"][] = [];
  const target = await serve({
    generateStream: (call) => {
      calls.push(call.request);
      const from = call.request.resume?.tokenIds.length ?? 0;
      const to = Math.min(from + breakAfter, 10);
      for (let id = from; id < to; id += 1) {
        const head = id === from ? { requestId: "request-1", model: "scripted", seed: 2n ** 64n - 1n } : {};
        const finishReason = id === 9 ? FinishReason.STOP : FinishReason.UNSPECIFIED;
        call.write(delta({ ...head, content: `${id}`, tokenIds: [id], finishReason }));
      }
      if (to < 10) call.emit("error", failure(code, "WORKER_LOST", 10));
      else call.end();
    },
  });
  return { calls, target };
}

test("a stream that breaks is resumed by seed and ids, and reads as one", async () => {
  const { calls, target } = await breaking(3);
  const stream = connect(target).stream({ ...QUESTION, generationConfig: { temperature: 0.5 } });
  const deltas = await Array.fromAsync(stream);
  assert.equal(deltas.map(({ content }) => content).join(""), "0123456789");
  assert.deepEqual(stream.tokenIds, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
  assert.equal(deltas.filter(({ requestId }) => requestId).length, 1);
  assert.deepEqual(calls.map(({ resume }) => resume?.tokenIds.length ?? 0), [0, 3, 6, 9]);
  assert.deepEqual(calls[1]?.generationConfig, { ...calls[0]?.generationConfig, seed: 2n ** 64n - 1n });
});

test("a full queue ends no resumption that has begun", async () => {
  const reasons = ["WORKER_LOST", "QUEUE_FULL", undefined, "QUEUE_FULL"];
  const target = await serve({
    generateStream: (call) => {
      const reason = reasons.shift();
      if (reason === "WORKER_LOST") call.write(delta({ requestId: "r", seed: 1n, content: "a", tokenIds: [1] }));
      const code = reason === "QUEUE_FULL" ? status.RESOURCE_EXHAUSTED : status.UNAVAILABLE;
      if (reason !== undefined) return void call.emit("error", failure(code, reason, 5));
      call.write(delta({ requestId: "r", seed: 1n, content: "b", tokenIds: [2], finishReason: FinishReason.STOP }));
      call.end();
    },
  });
  const deltas = await Array.fromAsync(connect(target).stream(QUESTION));
  assert.deepEqual(deltas.map(({ content }) => content), ["a", "b"]);
  await assert.rejects(Array.fromAsync(connect(target).stream(QUESTION)), { reason: "QUEUE_FULL" });
});

test("a stream is not resumed when that would not help", async () => {
  const other = await breaking(3, status.INTERNAL);
  await assert.rejects(Array.fromAsync(connect(other.target).stream(QUESTION)), { code: status.INTERNAL });
  const { calls, target } = await breaking(3);
  const several = { ...QUESTION, generationConfig: { numReturnSequences: 2, doSample: true } };
  await assert.rejects(Array.fromAsync(connect(target).stream(several)), { code: status.UNAVAILABLE });
  await assert.rejects(Array.fromAsync(connect(target, { maxResumes: 0 }).stream(QUESTION)), { reason: "WORKER_LOST" });
  assert.equal(calls.length, 2);
});

test("a delay longer than any of Node's timers is waited for", async () => {
  const stop = new AbortController();
  let calls = 0;
  const target = await serve({
    generateStream: (call) => {
      calls += 1;
      call.write(delta({ requestId: "r", seed: 1n, content: "a", tokenIds: [1] }));
      call.emit("error", failure(status.UNAVAILABLE, "WORKER_LOST", 2 ** 31));
      setTimeout(() => stop.abort(new Error("enough")), 200);
    },
  });
  const options = { signal: stop.signal, timeoutMs: Infinity };
  await assert.rejects(Array.fromAsync(connect(target).stream(QUESTION, options)), /enough/);
  assert.equal(calls, 1);
});

test("a server that cannot resume does not hide why the stream broke", async () => {
  const target = await serve({
    generateStream: (call) => {
      if (call.request.resume) return void call.emit("error", failure(status.INVALID_ARGUMENT, "INVALID_REQUEST", 1));
      call.write(delta({ requestId: "r", seed: 1n, content: "a", tokenIds: [1] }));
      call.emit("error", failure(status.UNAVAILABLE, "WORKER_LOST", 5));
    },
  });
  await assert.rejects(Array.fromAsync(connect(target).stream(QUESTION)), { reason: "WORKER_LOST" });
});

test("a request refused once the server is ready is told so, not that it was not ready", async () => {
  let calls = 0;
  const target = await serve({
    generateStream: (call) => {
      const isReady = (calls += 1) > 4; // gRPC itself makes four
      const code = isReady ? status.INVALID_ARGUMENT : status.UNAVAILABLE;
      call.emit("error", failure(code, isReady ? "INVALID_REQUEST" : "NOT_READY", 5));
    },
  });
  await assert.rejects(Array.fromAsync(connect(target).stream(QUESTION)), { reason: "INVALID_REQUEST" });
});

test("a server that cannot resume does not hide the first break behind a later one", async () => {
  let resumes = 0;
  const target = await serve({
    generateStream: (call) => {
      if (call.request.resume) {
        const isReady = (resumes += 1) > 4; // gRPC itself makes four
        const code = isReady ? status.INVALID_ARGUMENT : status.UNAVAILABLE;
        return void call.emit("error", failure(code, isReady ? "INVALID_REQUEST" : "NOT_READY", 5));
      }
      call.write(delta({ requestId: "r", seed: 1n, content: "a", tokenIds: [1] }));
      call.emit("error", failure(status.UNAVAILABLE, "WORKER_LOST", 5));
    },
  });
  await assert.rejects(Array.fromAsync(connect(target).stream(QUESTION)), { reason: "WORKER_LOST" });
});

test("a call outlasts a server that takes longer to be ready than gRPC tries", async () => {
  let calls = 0;
  const isReady = () => (calls += 1) > 6; // gRPC itself makes four
  const target = await serve({
    generate: (_, callback) =>
      isReady()
        ? callback(null, GenerateResponse.fromPartial({ seed: 7n }))
        : callback(failure(status.UNAVAILABLE, "NOT_READY", 5)),
    generateStream: (call) => {
      if (!isReady()) return void call.emit("error", failure(status.UNAVAILABLE, "NOT_READY", 5));
      call.write(delta({ requestId: "r", seed: 7n, tokenIds: [1], finishReason: FinishReason.STOP }));
      call.end();
    },
  });
  assert.equal((await connect(target).generate(QUESTION)).seed, 7n);
  assert.equal(calls, 7);
  calls = 0;
  assert.equal((await Array.fromAsync(connect(target).stream(QUESTION))).length, 1);
  assert.equal(calls, 7);
  calls = 0;
  await assert.rejects(connect(target, { maxResumes: 0 }).generate(QUESTION), { reason: "NOT_READY" });
  assert.equal(calls, 4);
  calls = -1000;
  const late = { timeoutMs: 300 };
  await assert.rejects(connect(target, { maxResumes: 1000 }).generate(QUESTION, late), { code: status.DEADLINE_EXCEEDED });
});

test("a call whose server dies between headers and answer is made again, once a server is known", async () => {
  let deaths = 0;
  const target = await serve({
    getModel: (_, callback) => callback(null, GetModelResponse.fromPartial({ model: "scripted" })),
    generate: (call, callback) => {
      if ((deaths += 1) > 2) return callback(null, GenerateResponse.fromPartial({ seed: 7n }));
      call.sendMetadata(new Metadata());
      callback({ code: status.UNAVAILABLE, details: "socket closed" });
    },
  });
  const client = connect(target);
  await client.model();
  assert.equal((await client.generate(QUESTION)).seed, 7n);
  assert.equal(deaths, 3);
});

test("response headers with a request id make a server known, so that a client's very first call is made again", async () => {
  let deaths = 0;
  const die = () => {
    const headers = new Metadata();
    headers.set("x-request-id", "request-1");
    return (deaths += 1) > 2 ? undefined : headers;
  };
  const target = await serve({
    generate: (call, callback) => {
      const headers = die();
      if (!headers) return callback(null, GenerateResponse.fromPartial({ seed: 7n }));
      call.sendMetadata(headers);
      callback({ code: status.UNAVAILABLE, details: "socket closed" });
    },
    generateStream: (call) => {
      const headers = die();
      if (headers) {
        call.sendMetadata(headers);
        return void call.emit("error", { code: status.UNAVAILABLE, details: "socket closed" });
      }
      call.write(delta({ requestId: "r", seed: 7n, tokenIds: [1], finishReason: FinishReason.STOP }));
      call.end();
    },
  });
  assert.equal((await connect(target).generate(QUESTION)).seed, 7n);
  assert.equal(deaths, 3);
  deaths = 0;
  assert.equal((await Array.fromAsync(connect(target).stream(QUESTION))).length, 1);
  assert.equal(deaths, 3);
});

/** Two choices that the request has not asked for; `messages` of them come, then the call ends with `error`. */
async function twoByDefault(messages: number, error?: status) {
  const all = [
    delta({ requestId: "r", seed: 1n, tokenIds: [1] }),
    delta({ tokenIds: [2], finishReason: FinishReason.STOP }),
    delta({ index: 1, tokenIds: [3] }),
    delta({ index: 1, tokenIds: [4], finishReason: FinishReason.STOP, usage: { completionTokens: 4 } }),
  ];
  const calls: StreamCall["request"][] = [];
  const target = await serve({
    generateStream: (call) => {
      calls.push(call.request);
      for (const message of all.slice(0, messages)) call.write(message);
      if (error) call.emit("error", failure(error, "WORKER_LOST", 10));
      else call.end();
    },
  });
  return { calls, stream: connect(target).stream(QUESTION) };
}

test("a model's defaults may ask for several answers", async () => {
  const { stream } = await twoByDefault(4);
  assert.deepEqual((await Array.fromAsync(stream)).map(({ index }) => index), [0, 0, 1, 1]);
  assert.deepEqual(stream.tokenIds, [1, 2]);
  await assert.rejects(Array.fromAsync((await twoByDefault(3)).stream), /without a finish reason/);
});

test("of several answers that a model's defaults ask for none is resumed, nor missed", async () => {
  const { calls, stream } = await twoByDefault(3, status.UNAVAILABLE);
  await assert.rejects(Array.fromAsync(stream), { code: status.UNAVAILABLE });
  assert.equal(calls.length, 1);
  const whole = await twoByDefault(4, status.UNAVAILABLE);
  assert.equal((await Array.fromAsync(whole.stream)).length, 4);
  const early = await twoByDefault(2, status.INTERNAL); // one has ended, the other has not begun
  await assert.rejects(Array.fromAsync(early.stream), { code: status.INTERNAL });
});

test("a stream can be resumed by hand", async () => {
  const { target } = await breaking(6);
  const client = connect(target, { maxResumes: 0 });
  const stream = client.stream(QUESTION);
  await assert.rejects(Array.fromAsync(stream), { code: status.UNAVAILABLE });
  const rest = await Array.fromAsync(client.stream(stream.resumeRequest()));
  assert.equal(rest.map(({ content }) => content).join(""), "6789");
});

test("a stream that has been read, or left, is not asked for again", async () => {
  const { calls, target } = await breaking(10);
  const stream = connect(target).stream(QUESTION);
  for await (const _ of stream) break;
  await assert.rejects(Array.fromAsync(stream), { name: "TypeError", message: /only once: `resumeRequest` goes on/ });
  assert.equal(calls.length, 1);
  assert.deepEqual(stream.tokenIds, [0]);
});

test("a stream that ends without a finish reason is an error", async () => {
  const target = await serve({
    generateStream: (call) => {
      call.write(delta({ requestId: "r", content: "Hel" }));
      call.end();
    },
  });
  await assert.rejects(Array.fromAsync(connect(target).stream(QUESTION)), /without a finish reason/);
});

test("aborting a signal cancels the call and throws its reason", async () => {
  const cancelled = Promise.withResolvers<void>();
  const target = await serve({
    generate: (call) => call.on("cancelled", cancelled.resolve),
    generateStream: (call) => call.write(delta({ requestId: "r", content: "Hel" })),
  });
  const client = connect(target);
  const stop = new AbortController();
  await assert.rejects(async () => {
    for await (const _ of client.stream(QUESTION, { signal: stop.signal })) stop.abort(new Error("enough"));
  }, /enough/);
  const late = new AbortController();
  setTimeout(() => late.abort(new Error("too late")), 50);
  await assert.rejects(client.generate(QUESTION, { signal: late.signal }), /too late/);
  await cancelled.promise;
  await assert.rejects(client.generate(QUESTION, { signal: AbortSignal.abort(new Error("at once")) }), /at once/);
});

test("leaving the loop cancels the stream", async () => {
  const cancelled = Promise.withResolvers<void>();
  const target = await serve({
    generateStream: (call) => {
      call.on("cancelled", cancelled.resolve);
      call.write(delta({ requestId: "r", content: "Hel" }));
    },
  });
  for await (const _ of connect(target).stream(QUESTION)) break;
  await cancelled.promise;
});

test("a closed client makes no call, nor one again, and says why", async () => {
  let numCalls = 0;
  const target = await serve({
    generate: (_, callback) => {
      numCalls += 1;
      if (numCalls === 1) return callback(null, GenerateResponse.fromPartial({}));
      callback(failure(status.UNAVAILABLE, "NOT_READY", 100));
      setTimeout(() => client.close(), 10);
    },
  });
  const client = connect(target);
  const closed = { name: "ParleyError", code: status.CANCELLED, message: "the client was closed" };
  await client.generate(QUESTION);
  await assert.rejects(client.generate(QUESTION), closed);
  await assert.rejects(client.generate(QUESTION), closed);
  await assert.rejects(Array.fromAsync(client.stream(QUESTION)), closed);
  await assert.rejects(Array.fromAsync(client.batch([QUESTION])), closed);
  const unconnected = connect(target);
  const call = assert.rejects(unconnected.generate(QUESTION), closed);
  unconnected.close();
  await call;
});

test("closing a client wakes the calls that wait to be made again", { timeout: 60_000 }, async () => {
  const hour = 3_600_000;
  const target = await serve({
    getModel: (_, callback) => callback(null, GetModelResponse.fromPartial({ model: "scripted" })),
    generate: (_, callback) => callback(failure(status.UNAVAILABLE, "NOT_READY", hour)),
    generateStream: (call) => {
      call.write(delta({ requestId: "r", seed: 1n, content: "a", tokenIds: [1] }));
      call.emit("error", failure(status.UNAVAILABLE, "WORKER_LOST", hour));
    },
  });
  const client = connect(target, { timeoutMs: undefined });
  await client.model();
  const { signal } = new AbortController();
  const calls = [client.generate(QUESTION), client.generate(QUESTION, { signal }), Array.fromAsync(client.stream(QUESTION))];
  const closed = calls.map((call) => assert.rejects(call, { code: status.CANCELLED, message: "the client was closed" }));
  setTimeout(() => client.close(), 50);
  await Promise.all(closed);
});

test("what no request has is refused at the call, by its path", async () => {
  const client = connect("localhost:1");
  const refused: [unknown, RegExp][] = [
    [{ messages: [user("Hi"), { role: "user", content: "Hi" }] }, /^messages\[1\]\.role: 'user' is none of 'ROLE_SYSTEM', /],
    [{ messages: [{ role: 2, content: "Hi" }] }, /^messages\[0\]\.role: 2 is none of /],
    [{ ...QUESTION, toolChoice: { mode: "required" } }, /^toolChoice\.mode: 'required' is none of 'MODE_AUTO', /],
    [{ ...QUESTION, generationConfig: { max_new_tokens: 5 } }, /^generationConfig\.max_new_tokens: no such field$/],
    [{ ...QUESTION, temperature: 1 }, /^temperature: no such field$/],
    [{ ...QUESTION, constructor: 1 }, /^constructor: no such field$/],
    [{ ...QUESTION, toolChoice: "required" }, /^toolChoice: 'required' is no object$/],
    [{ ...QUESTION, responseFormat: "json_object" }, /^responseFormat: 'json_object' is no object$/],
    [{ ...QUESTION, responseFormat: { regex: "a", grammar: "b" } }, /^responseFormat: takes exactly one form, not 2$/],
    [{ messages: ["Hi"] }, /^messages\[0\]: 'Hi' is no object$/],
    [{ messages: [{ role: "ROLE_USER", content: [{ text: "Hi" }] }] }, /^messages\[0\]\.content: takes no \[ \{ text: 'Hi' \} \]$/],
    [{ ...QUESTION, generationConfig: { logitBias: new Map([[7, 1]]) } }, /^generationConfig\.logitBias: takes no Map\(1\) /],
    [{ ...QUESTION, chatTemplateKwargs: new Map() }, /^chatTemplateKwargs: takes no Map\(0\) /],
    [{ ...QUESTION, toolChoice: 5n }, /^toolChoice: 5n is no object$/],
    [{ messages: [user("a 🙂".slice(0, 3))] }, /^messages\[0\]\.content: has half of a surrogate pair at 2, which is no text$/],
    [{ ...QUESTION, generationConfig: { stopStrings: ["🙂", "\udc00"] } }, /^generationConfig\.stopStrings\[1\]: has half /],
    [{ ...QUESTION, chatTemplateKwargs: { role: ["\ud800"] } }, /^chatTemplateKwargs\.role\[0\]: has half of a surrogate pair at 0, /],
    [{ ...QUESTION, generationConfig: { maxNewTokens: "64" } }, /^generationConfig\.maxNewTokens: takes no '64'$/],
    [{ ...QUESTION, generationConfig: { stopTokenIds: [1, "2"] } }, /^generationConfig\.stopTokenIds\[1\]: takes no '2'$/],
    [{ ...QUESTION, generationConfig: { doSample: "false" } }, /^generationConfig\.doSample: takes no 'false'$/],
    [{ ...QUESTION, generationConfig: { seed: 2 ** 53 } }, /^generationConfig\.seed: takes no 9007199254740992$/],
    [{ messages: [user(5 as never)] }, /^messages\[0\]\.content: takes no 5$/],
  ];
  for (const [request, message] of refused) {
    const error = { name: "TypeError", message };
    await assert.rejects(client.generate(request as GenerateInput), error);
    assert.throws(() => client.stream(request as GenerateInput), error);
  }
  const [[second, message]] = [refused[0]!];
  const inBatch = { name: "TypeError", message: new RegExp(message.source.replace("^", "^requests\\[1\\]\\.")) };
  await assert.rejects(Array.fromAsync(client.batch([QUESTION, second as GenerateInput])), inBatch);
  await assert.rejects(client.countTokens(second as GenerateInput), { name: "TypeError", message });
});

test("names of enum values may be spelled out, and left out fields undefined", async () => {
  const seen: GenerateRequest[] = [];
  const target = await serve({
    generate: ({ request }, callback) => {
      seen.push(request);
      callback(null, GenerateResponse.fromPartial({}));
    },
  });
  const request = {
    messages: [{ role: "ROLE_USER", content: "Hi", name: undefined }],
    toolChoice: { mode: "MODE_NONE" },
    generationConfig: { logitBias: { 7: 0.1 }, seed: 7 },
    chatTemplateKwargs: {
      role: "UNRECOGNIZED",
      mode: { role: [1, true, null] },
      messages: [{ role: "UNRECOGNIZED" }],
      responseFormat: { text: {}, regex: "" },
    },
    unknown: undefined,
  };
  await connect(target).generate(request as unknown as GenerateInput);
  assert.equal(seen[0]?.messages[0]?.role, Role.USER);
  assert.equal(seen[0].toolChoice?.mode, ToolChoice_Mode.NONE);
  assert.equal(seen[0].generationConfig?.seed, 7n);
  assert.deepEqual(seen[0].chatTemplateKwargs, request.chatTemplateKwargs);
});

test("it is the server that refuses a number of answers", async () => {
  const target = await serve({
    generateStream: (call) => void call.emit("error", failure(status.INVALID_ARGUMENT, "INVALID_REQUEST")),
  });
  const stream = connect(target).stream({ ...QUESTION, generationConfig: { numReturnSequences: 2 ** 32 - 1 } });
  await assert.rejects(Array.fromAsync(stream), { code: status.INVALID_ARGUMENT });
});

test("a number that cannot be encoded is an invalid request", async () => {
  const bad = { ...QUESTION, generationConfig: { maxNewTokens: 1.5 } };
  const client = connect(await serve({}));
  const refusal = { code: status.INVALID_ARGUMENT, reason: "INVALID_REQUEST", message: "invalid request: invalid uint32: 1.5" };
  await assert.rejects(client.generate(bad), refusal);
  await assert.rejects(Array.fromAsync(client.stream(bad)), refusal);
});

test("a timeout that is no number is refused, and one past what gRPC counts to is none", async () => {
  const target = await serve({ generate: (_, callback) => callback(null, GenerateResponse.fromPartial({})) });
  const client = connect(target);
  for (const timeoutMs of [Infinity, 1e15, 1e300]) await client.generate(QUESTION, { timeoutMs });
  for (const timeoutMs of [NaN, "100", null]) {
    const options = { timeoutMs } as { timeoutMs: number };
    const refusal = { name: "TypeError", message: `timeoutMs: ${timeoutMs} is no number of milliseconds` };
    await assert.rejects(client.generate(QUESTION, options), refusal);
    assert.throws(() => client.stream(QUESTION, options), refusal);
    await assert.rejects(Array.fromAsync(client.batch([QUESTION], options)), refusal);
  }
});

test("a deadline ends a call", async () => {
  const target = await serve({ generate: () => {} });
  await assert.rejects(connect(target).generate(QUESTION, { timeoutMs: 50 }), { code: status.DEADLINE_EXCEEDED });
});

test("an API key and metadata go with each call", async () => {
  const seen: unknown[] = [];
  const target = await serve({
    getModel: ({ metadata }, callback) => {
      seen.push(metadata.get("authorization")[0], metadata.get("x-team")[0]);
      callback(null, GetModelResponse.fromPartial({ model: "scripted" }));
    },
  });
  await connect(target, { apiKey: "secret", metadata: { "x-team": "blue" } }).model();
  assert.deepEqual(seen, ["Bearer secret", "blue"]);
});

test("what can be no API key is refused, and told to nobody", async () => {
  for (const apiKey of ["", " ", "a secret", "secret\n", "sécret", 5]) {
    const message = "apiKey: is empty, or has blanks, line ends or letters beyond ASCII: no key has";
    assert.throws(() => new Client("localhost:1", { apiKey: apiKey as string }), { name: "TypeError", message });
  }
  const seen: unknown[] = [];
  const target = await serve({
    getModel: ({ metadata }, callback) => {
      seen.push(...metadata.get("authorization"));
      callback(null, GetModelResponse.fromPartial({ model: "scripted" }));
    },
  });
  await connect(target, { apiKey: null as never }).model();
  assert.deepEqual(seen, []);
});

test("metadata that cannot be sent is refused by its key, and its value told to nobody", () => {
  const message = "metadata: authorization: is no text in printable ASCII";
  for (const value of ["Bearer secret\n", "Bearer sécret"])
    assert.throws(() => new Client("localhost:1", { metadata: { authorization: value } }), { name: "TypeError", message });
});

test("no proxy stands between a client and its own machine", async () => {
  const target = await serve({ getModel: (_, callback) => callback(null, GetModelResponse.fromPartial({ model: "scripted" })) });
  process.env.http_proxy = "http://127.0.0.1:1";
  after(() => delete process.env.http_proxy);
  assert.equal((await connect(target).model()).model, "scripted");
});

test("what gRPC would take for something else is no target", () => {
  for (const target of ["", "localhost", "http://localhost:50051", "::1:50051", "localhost:", "a b:1", "a:1/"]) {
    const message = `${JSON.stringify(target)} is no HOST:PORT, such as localhost:50051 or [::1]:50051, nor another target of gRPC's`;
    assert.throws(() => new Client(target), { name: "TypeError", message });
  }
  for (const target of ["localhost:1", "[::1]:1", "dns:///parley.example:1", "dns:parley.example", "unix:/tmp/x", "ipv4:10.0.0.1:1,10.0.0.2:1"])
    new Client(target).close();
});

test("a key does not cross a network in plain text", () => {
  for (const remote of ["parley.example:50051", "10.0.0.1:50051", "localhost.example:1", "dns:///parley:1", "ipv4:127.0.0.1:1,10.0.0.1:1"]) {
    assert.throws(() => new Client(remote, { apiKey: "secret" }), /must not cross the network/);
    new Client(remote, { apiKey: "secret", insecure: true }).close();
    new Client(remote, { apiKey: "secret", tls: true }).close();
  }
  const locals = ["localhost:1", "127.0.0.1:1", "[::1]:1", "ipv4:127.0.0.1:1", "ipv6:[::1]:1", "unix:/tmp/x"];
  for (const local of locals) new Client(local, { apiKey: "secret" }).close();
});

test("TLS and mutual TLS", async () => {
  const folder = mkdtempSync(join(tmpdir(), "parley-"));
  after(() => rmSync(folder, { recursive: true }));
  const [key, certificate] = [join(folder, "key.pem"), join(folder, "certificate.pem")];
  const subject = ["-subj", "/CN=parley.test", "-addext", "subjectAltName=DNS:parley.test"];
  const curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"];
  execFileSync("openssl", ["req", "-x509", ...curve, "-nodes", "-days", "1", ...subject, "-keyout", key, "-out", certificate], {
    stdio: "ignore",
  });
  const pem = { key: readFileSync(key), certificate: readFileSync(certificate) };
  const pair = [{ private_key: pem.key, cert_chain: pem.certificate }];
  const answers = { generate: (_: unknown, callback: Function) => callback(null, GenerateResponse.fromPartial({})) };

  const tls = { rootCertificates: pem.certificate, serverName: "parley.test" };
  const oneWay = await serve(answers as never, ServerCredentials.createSsl(null, pair));
  await connect(oneWay, { tls }).generate(QUESTION);
  await assert.rejects(connect(oneWay, { tls: true }).generate(QUESTION, { timeoutMs: 5_000 }));

  const mutual = await serve(answers as never, ServerCredentials.createSsl(pem.certificate, pair, true));
  await connect(mutual, { tls: { ...tls, privateKey: pem.key, certificateChain: pem.certificate } }).generate(QUESTION);
  await assert.rejects(connect(mutual, { tls }).generate(QUESTION, { timeoutMs: 5_000 }));
});
