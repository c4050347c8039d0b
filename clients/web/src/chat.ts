// The conversation with a Parley server: gRPC-Web through a proxy such as Envoy.

import { create } from "@bufbuild/protobuf";
import { type Client, Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-web";

import { ChatService } from "./gen/parley/v1/chat_pb";
import { type Message, MessageSchema, Role } from "./gen/parley/v1/message_pb";
import { ErrorInfoSchema } from "./gen/google/rpc/error_details_pb";

export class Chat {
  readonly #service: Client<typeof ChatService>;
  readonly #messages: Message[] = [];

  constructor(baseUrl: string) {
    this.#service = createClient(ChatService, createGrpcWebTransport({ baseUrl }));
  }

  /**
   * Asks, and yields the answer's text as it is made. What an aborted or failed call has said stays in the history. Where
   * it has said nothing, the question goes too: what was refused would be refused again with the next one.
   */
  async *ask(text: string, signal: AbortSignal): AsyncGenerator<string> {
    const question = create(MessageSchema, { role: Role.USER, content: text });
    const answer = create(MessageSchema, { role: Role.ASSISTANT });
    const messages = [...this.#messages, question];
    try {
      for await (const delta of this.#service.generateStream({ messages }, { signal })) {
        answer.content += delta.content;
        yield delta.content;
      }
    } finally {
      if (answer.content !== "") this.#messages.push(question, answer);
    }
  }
}

/** What went wrong, for people to read; undefined where they stopped the answer themselves. */
export function describe(error: unknown): string | undefined {
  const failure = ConnectError.from(error);
  if (failure.code === Code.Canceled) return undefined;
  const [info] = failure.findDetails(ErrorInfoSchema);
  return info ? `${failure.rawMessage} (${info.reason})` : failure.message;
}
