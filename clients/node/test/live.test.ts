// The client against the service at PARLEY_TARGET.
import assert from "node:assert/strict";
import { connect, createServer, type Socket } from "node:net";
import type { AddressInfo } from "node:net";
import { after, test } from "node:test";

import { Client, FinishReason, type GenerateInput, ParleyError, Role, status, user } from "../dist/index.js";

const target = process.env.PARLEY_TARGET;
assert(target, "PARLEY_TARGET names no service");
const client = new Client(target, { timeoutMs: 100_000 });
after(() => client.close());

const QUESTION = { messages: [user("Name a river in France.")], generationConfig: { maxNewTokens: 24 } };
const ENDLESS = {
  messages: [user("Count from one to a thousand.")],
  generationConfig: { maxNewTokens: 1500, ignoreEos: true },
};

async function text(request: GenerateInput): Promise<string> {
  const deltas = await Array.fromAsync(client.stream(request));
  return deltas.map(({ content }) => content).join("");
}

async function failureOf(promise: Promise<unknown>): Promise<ParleyError> {
  const error = await promise.then(() => undefined, (reason: unknown) => reason);
  assert(error instanceof ParleyError);
  return error;
}

test("the unary answer is whole", async () => {
  const { choices, usage, timings } = await client.generate(QUESTION);
  const choice = choices[0]!;
  assert.equal(choice.message?.role, Role.ASSISTANT);
  assert.notEqual(choice.message?.content.trim(), "");
  assert([FinishReason.STOP, FinishReason.LENGTH].includes(choice.finishReason));
  assert.equal(usage?.completionTokens, choice.tokenIds.length);
  assert(usage.promptTokens > 0);
  assert(timings?.total);
});

test("the stream's deltas concatenate to the unary answer", async () => {
  const choice = (await client.generate(QUESTION)).choices[0]!;
  const stream = client.stream(QUESTION);
  const deltas = await Array.fromAsync(stream);
  assert.equal(deltas.map(({ content }) => content).join(""), choice.message?.content);
  assert.deepEqual(stream.tokenIds, choice.tokenIds);
  assert.equal(deltas.at(-1)?.finishReason, choice.finishReason);
  assert.equal(deltas.at(-1)?.usage?.completionTokens, choice.tokenIds.length);
});

test("cancelling in mid-stream ends the call", async () => {
  const stop = new AbortController();
  let messages = 0;
  await assert.rejects(
    async () => {
      for await (const _ of client.stream(ENDLESS, { signal: stop.signal })) if ((messages += 1) === 3) stop.abort();
    },
    { name: "AbortError" },
  );
  assert(messages >= 3);
});

test("a deadline ends the call", async () => {
  const error = await failureOf(client.generate(ENDLESS, { timeoutMs: 300 }));
  assert.equal(error.code, status.DEADLINE_EXCEEDED);
});

test("a bad request tells every violation", async () => {
  const error = await failureOf(client.generate({ ...QUESTION, generationConfig: { temperature: 99, topP: 2 } }));
  assert.deepEqual([error.code, error.reason], [status.INVALID_ARGUMENT, "INVALID_REQUEST"]);
  assert.deepEqual(error.violations.map(({ field }) => field).sort(), [
    "generation_config.temperature",
    "generation_config.top_p",
  ]);
  assert(error.requestId);
});

test("an unknown model tells what is served", async () => {
  const { model } = await client.model();
  const error = await failureOf(client.generate({ ...QUESTION, model: "no-such-model" }));
  assert.deepEqual([error.code, error.reason, error.metadata["served"]], [status.NOT_FOUND, "MODEL_NOT_FOUND", model]);
});

test("a batch answers each item as it would be alone", async () => {
  const bad = { ...QUESTION, generationConfig: { temperature: 99 } };
  const results = await Array.fromAsync(client.batch([QUESTION, bad]));
  results.sort((a, b) => a.index - b.index);
  assert.deepEqual(results[0]?.response?.choices, (await client.generate(QUESTION)).choices);
  assert.equal(results[1]?.error?.reason, "INVALID_REQUEST");
});

test("tokens are counted", async () => {
  const { usage } = await client.generate(QUESTION);
  assert.equal(await client.countTokens({ messages: QUESTION.messages }), usage?.promptTokens);
});

test("a sampled stream that was left is resumed exactly where it was", async () => {
  const sampled = { ...QUESTION, generationConfig: { maxNewTokens: 24, temperature: 0.9, seed: 7n } };
  const whole = await text(sampled);
  const stream = client.stream(sampled);
  let begun = "";
  for await (const { content } of stream) {
    begun += content;
    if (stream.tokenIds.length >= 5) break;
  }
  assert.equal(begun + (await text(stream.resumeRequest())), whole);
});

/** A way to the service that can be cut: `cut` breaks every connection, and the next one goes through again. */
async function cuttable(): Promise<{ target: string; cut: () => void }> {
  const sockets = new Set<Socket>();
  const [host, port] = target!.split(":");
  const server = createServer((inward) => {
    const outward = connect(Number(port), host);
    for (const socket of [inward, outward]) sockets.add(socket.on("error", () => {}).on("close", () => sockets.delete(socket)));
    inward.pipe(outward).pipe(inward);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  after(() => server.close());
  const cut = () => sockets.forEach((socket) => socket.destroy());
  return { target: `127.0.0.1:${(server.address() as AddressInfo).port}`, cut };
}

test("a sampled stream whose connection breaks, twice, goes on by itself", async () => {
  const sampled = { ...QUESTION, generationConfig: { maxNewTokens: 24, ignoreEos: true, temperature: 0.9, seed: 7n } };
  const whole = (await client.generate(sampled)).choices[0]!;
  const way = await cuttable();
  const shaky = new Client(way.target, { timeoutMs: 100_000 });
  const stream = shaky.stream(sampled);
  let content = "";
  const cuts = [4, 12];
  for await (const delta of stream) {
    content += delta.content;
    if (stream.tokenIds.length >= (cuts[0] ?? Infinity)) {
      cuts.shift();
      way.cut();
    }
  }
  shaky.close();
  assert.deepEqual(cuts, []);
  assert.equal(content, whole.message?.content);
  assert.deepEqual(stream.tokenIds, whole.tokenIds);
});
