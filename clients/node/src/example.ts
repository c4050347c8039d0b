// npm run example [HOST:PORT]: a whole answer, a streamed one, a batch, and what an error tells.
import { Client, ParleyError, user } from "./index.js";

const client = new Client(process.argv[2] ?? process.env.PARLEY_TARGET, { timeoutMs: 120_000 });

const { choices, usage } = await client.generate({
  messages: [user("Give me a short introduction to large language models.")],
  generationConfig: { maxNewTokens: 48 },
});
console.log(choices[0]?.message?.content, usage);

const stop = new AbortController();
const stream = client.stream({ messages: [user("Count from one to a thousand.")] }, { signal: stop.signal });
try {
  for await (const { content } of stream) {
    process.stdout.write(content);
    if (stream.tokenIds.length >= 24) stop.abort(); // or: break
  }
} catch (error) {
  if (!stop.signal.aborted) throw error;
}
console.log();

const questions = ["France", "Spain", "Italy"].map((country) => ({
  messages: [user(`Name a river in ${country}.`)],
  generationConfig: { maxNewTokens: 16 },
}));
for await (const { index, response, error } of client.batch(questions)) {
  console.log(index, error ?? response.choices[0]?.message?.content);
}

try {
  await client.generate({ messages: [user("Hi")], generationConfig: { temperature: 99 } });
} catch (error) {
  if (!(error instanceof ParleyError)) throw error;
  console.log(error.reason, error.violations, error.requestId);
}
client.close();
