// A streamed answer, which goes on over another connection when its own breaks.
import { status } from "@grpc/grpc-js";

import { ParleyError } from "./errors.js";
import { GenerateRequest, type GenerateStreamResponse } from "./gen/parley/v1/chat.js";
import { FinishReason } from "./gen/parley/v1/generation.js";
import type { Patience } from "./patience.js";

/** Starts a call for a request; iterating over it gives the messages, leaving the iteration early cancels it. */
export type Start = (request: GenerateRequest) => AsyncIterable<GenerateStreamResponse>;

/**
 * The answer as it is made: `for await (const delta of client.stream(…))`, once. Leaving the loop early cancels the call.
 *
 * Where the stream breaks with UNAVAILABLE after its first message, the rest is asked for with the ids already here; the
 * loop sees one unbroken answer. `tokenIds` and `seed` tell how far it is, and `resumeRequest` how to go on from there
 * by hand. Streams of several answers (`numReturnSequences`) are not resumed once they have begun.
 */
export class Stream implements AsyncIterable<GenerateStreamResponse> {
  /** Every id of the answer so far, of its first choice. */
  readonly tokenIds: number[];
  /** The seed used, once the first message has told it. */
  seed?: bigint;

  readonly #request: GenerateRequest;
  readonly #start: Start;
  readonly #sleep: (ms: number) => Promise<void>;
  readonly #patience: Patience;
  // Where the request leaves the number to the model's defaults, the choices that show up have to do.
  readonly #numChoices: number;
  readonly #seen = new Set<number>();
  readonly #finished = new Set<number>();
  #isBegun = false;
  #isWhole = false; // the stream's very last message is here
  #head: { requestId?: string; model?: string } = {};

  /** @internal */
  constructor(request: GenerateRequest, start: Start, sleep: (ms: number) => Promise<void>, patience: Patience) {
    this.#request = request;
    this.#start = start;
    this.#sleep = sleep;
    this.#patience = patience;
    this.#numChoices = request.generationConfig?.numReturnSequences ?? 1;
    this.tokenIds = [...(request.resume?.tokenIds ?? [])];
  }

  /** The request for what is still to come, which any server of the same model can answer. */
  resumeRequest(): GenerateRequest {
    const generationConfig = { ...this.#request.generationConfig };
    if (this.seed !== undefined) generationConfig.seed = this.seed;
    return GenerateRequest.fromPartial({
      ...this.#request,
      ...this.#head,
      generationConfig,
      resume: { tokenIds: this.tokenIds },
    });
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<GenerateStreamResponse, void, undefined> {
    if (this.#isBegun) throw new TypeError("a stream is read only once: `resumeRequest` goes on where it was left");
    this.#isBegun = true;
    let request = this.#request;
    let firstBreak: unknown;
    for (;;) {
      try {
        for await (const delta of this.#start(request)) {
          this.#patience.noteProgress();
          firstBreak = undefined;
          yield this.#take(delta);
        }
        break;
      } catch (error) {
        if (this.#isWhole) return;
        const delayMs = this.#delayAfter(error);
        // Where the number of answers is left to the model's defaults, only the server knows that it cannot resume.
        if (delayMs === undefined) throw firstBreak !== undefined && isInvalid(error) ? firstBreak : error;
        await this.#sleep(delayMs);
        if (this.seed === undefined) continue; // nothing to resume: a refusal is one of the request itself
        firstBreak ??= error;
        request = this.resumeRequest();
      }
    }
    if (!this.#isComplete()) {
      throw new ParleyError("the stream ended without a finish reason: the answer is incomplete", status.INTERNAL);
    }
  }

  #take(delta: GenerateStreamResponse): GenerateStreamResponse {
    if (delta.requestId !== "") {
      if (this.seed !== undefined) Object.assign(delta, { requestId: "", model: "", seed: 0n }); // told before it broke
      else {
        this.seed = delta.seed;
        this.#head = { requestId: delta.requestId, model: delta.model };
      }
    }
    if (delta.index === 0) this.tokenIds.push(...delta.tokenIds);
    this.#seen.add(delta.index);
    if (delta.finishReason !== FinishReason.UNSPECIFIED) this.#finished.add(delta.index);
    this.#isWhole = this.#isComplete() && delta.usage !== undefined;
    return delta;
  }

  #isComplete(): boolean {
    for (let index = 0; index < this.#numChoices; index += 1) if (!this.#finished.has(index)) return false;
    return this.#finished.size === this.#seen.size;
  }

  #delayAfter(error: unknown): number | undefined {
    if (this.seed === undefined) return this.#patience.delayBeforeAgain(error);
    const isOneOfSeveral = Math.max(this.#numChoices, this.#seen.size) > 1;
    return isOneOfSeveral ? undefined : this.#patience.delayAfter(error);
  }
}

function isInvalid(error: unknown): boolean {
  return error instanceof ParleyError && error.code === status.INVALID_ARGUMENT;
}
