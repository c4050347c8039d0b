// A client that has nothing but the .proto files, as a Node service would: node client.mjs HOST:PORT
// Prints what it saw as one JSON object, for tests/e2e/test_node_client.py to judge.
import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const PROTOS = fileURLToPath(new URL("../../../protos", import.meta.url));
const DEADLINE_MS = 100_000;

const definitions = protoLoader.loadSync(["parley/v1/chat.proto", "google/rpc/error_details.proto"], {
  includeDirs: [PROTOS],
  keepCase: true,
  enums: String,
  longs: String,
  defaults: true,
});
const { ChatService } = grpc.loadPackageDefinition(definitions).parley.v1;

const [target] = process.argv.slice(2);
const client = new ChatService(target, grpc.credentials.createInsecure());

const ask = (content, generation_config) => ({ messages: [{ role: "ROLE_USER", content }], generation_config });
const within = (ms) => ({ deadline: Date.now() + ms });

function generate(request, options = within(DEADLINE_MS)) {
  return new Promise((resolve, reject) => {
    client.Generate(request, new grpc.Metadata(), options, (error, response) =>
      error ? reject(error) : resolve(response),
    );
  });
}

// The error of a call that must fail.
async function failure(promise) {
  try {
    await promise;
  } catch (error) {
    return error;
  }
  throw new Error("the call succeeded");
}

async function unary() {
  const { choices, usage } = await generate(ask("Name a river in France.", { max_new_tokens: 24 }));
  const [{ message, finish_reason, token_ids }] = choices;
  return { role: message.role, content: message.content, finish_reason, token_ids, usage };
}

async function stream() {
  const call = client.GenerateStream(
    ask("Name a river in France.", { max_new_tokens: 24 }),
    new grpc.Metadata(),
    within(DEADLINE_MS),
  );
  const seen = { content: "", token_ids: [], finish_reason: null, usage: null };
  for await (const delta of call) {
    seen.content += delta.content;
    seen.token_ids.push(...delta.token_ids);
    if (delta.finish_reason !== "FINISH_REASON_UNSPECIFIED") seen.finish_reason = delta.finish_reason;
    seen.usage = delta.usage;
  }
  return seen;
}

const endless = () => ask("Count from one to a thousand.", { max_new_tokens: 1500, ignore_eos: true });

async function cancel() {
  const call = client.GenerateStream(endless(), new grpc.Metadata(), within(DEADLINE_MS));
  let messages = 0;
  const error = await failure(
    (async () => {
      for await (const _ of call) {
        messages += 1;
        if (messages === 3) call.cancel();
      }
    })(),
  );
  return { code: grpc.status[error.code], messages };
}

async function deadline() {
  const error = await failure(generate(endless(), within(300)));
  return { code: grpc.status[error.code] };
}

// google.rpc.Status travels beside the gRPC status; each of its details is a message of a type that its URL names.
function details(error) {
  const [bytes] = error.metadata.get("grpc-status-details-bin");
  const status = definitions["google.rpc.Status"].deserialize(bytes);
  return status.details.map(({ type_url, value }) => {
    const type = type_url.split("/").pop();
    return { type, ...definitions[type].deserialize(value) };
  });
}

async function badRequest() {
  const error = await failure(generate({ ...ask("Hi", { temperature: 99, top_p: 2 }) }));
  return { code: grpc.status[error.code], message: error.details, details: details(error) };
}

async function modelNotFound() {
  const error = await failure(generate({ ...ask("Hi", {}), model: "no-such-model" }));
  return { code: grpc.status[error.code], details: details(error) };
}

try {
  const seen = {
    unary: await unary(),
    stream: await stream(),
    cancel: await cancel(),
    deadline: await deadline(),
    bad_request: await badRequest(),
    model_not_found: await modelNotFound(),
  };
  console.log(JSON.stringify(seen));
} finally {
  client.close();
}
