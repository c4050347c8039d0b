// The client against the service at PARLEY_TARGET, which asks for a certificate and for an API key.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { after, test } from "node:test";

import { Client, type ClientOptions, status, user } from "../dist/index.js";

const { PARLEY_TARGET, PARLEY_CA, PARLEY_CERT, PARLEY_KEY, PARLEY_API_KEY_FILE } = process.env;
const read = (path: string | undefined) => readFileSync(path ?? assert.fail("the environment names no files"));
const tls = { rootCertificates: read(PARLEY_CA) };
const mutual = { ...tls, privateKey: read(PARLEY_KEY), certificateChain: read(PARLEY_CERT) };
const apiKey = read(PARLEY_API_KEY_FILE).toString().trim();

async function answer(options: ClientOptions): Promise<string | undefined> {
  const client = new Client(PARLEY_TARGET, { timeoutMs: 10_000, ...options });
  after(() => client.close());
  return (await client.generate({ messages: [user("Hi")] })).choices[0]?.message?.content;
}

test("with its certificate and its key a client is answered", async () => {
  assert.equal(await answer({ tls: mutual, apiKey }), "Hi");
});

test("without a key, or with another, it is not", async () => {
  for (const options of [{}, { apiKey: "another" }]) {
    const refused = { code: status.UNAUTHENTICATED, reason: "UNAUTHENTICATED" };
    await assert.rejects(answer({ tls: mutual, ...options }), refused);
  }
});

test("without a certificate it cannot connect, nor in plain text", async () => {
  await assert.rejects(answer({ tls, apiKey }), { code: status.UNAVAILABLE });
  await assert.rejects(answer({}), { code: status.UNAVAILABLE });
});
