// A streamed answer, which goes on over another connection when its own breaks.
import { status } from "@grpc/grpc-js";

import { ParleyError } from "./errors.js";
import { GenerateRequest, type GenerateStreamResponse } from "./gen/parley/v1/chat.js";
import { FinishReason } from "./gen/parley/v1/generation.js";

const FIRST_DELAY_MS = 100;
const MAX_DELAY_MS = 2_000;

/** Starts a call for a request; iterating over it gives the messages, leaving the iteration early cancels it. */
export type Start = (request: GenerateRequest) => AsyncIterable<GenerateStreamResponse>;

/**
 * The answer as it is made: `for await (const delta of client.stream(…))`, once. Leaving the loop early cancels the call.
 *
 * Where the stream breaks with UNAVAILABLE after its first message, the rest is asked for with the ids already here; the
 * loop sees one unbroken answer. `tokenIds` and `seed` tell how far it is, and `resumeRequest` how to go on from there
 * by hand.
 */
export class Stream implements AsyncIterable<GenerateStreamResponse> {
  /** Every id of the answer so far, of its first choice. */
  readonly tokenIds: number[];
  /** The seed used, once the first message has told it. */
  seed?: bigint;

  readonly #request: GenerateRequest;
  readonly #start: Start;
  readonly #sleep: (ms: number) => Promise<void>;
  readonly #maxResumes: number;
  #unfinished: Set<number>;

  /** @internal `maxResumes`: how often in a row, without a single id in between. */
  constructor(request: GenerateRequest, start: Start, sleep: (ms: number) => Promise<void>, maxResumes: number) {
    this.#request = request;
    this.#start = start;
    this.#sleep = sleep;
    const choices = request.generationConfig?.numReturnSequences ?? 1;
    this.#maxResumes = choices === 1 ? maxResumes : 0;
    this.#unfinished = new Set(Array(choices).keys());
    this.tokenIds = [...(request.resume?.tokenIds ?? [])];
  }

  /** The request for what is still to come: the same, with the ids and the seed. */
  resumeRequest(): GenerateRequest {
    const generationConfig = { ...this.#request.generationConfig };
    if (this.seed !== undefined) generationConfig.seed = this.seed;
    return GenerateRequest.fromPartial({ ...this.#request, generationConfig, resume: { tokenIds: this.tokenIds } });
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<GenerateStreamResponse, void, undefined> {
    let request = this.#request;
    for (let resumes = 0; ; resumes += 1) {
      const received = this.tokenIds.length;
      try {
        for await (const delta of this.#start(request)) yield this.#take(delta);
        break;
      } catch (error) {
        if (this.#unfinished.size === 0) return; // all of it is here
        if (this.tokenIds.length > received) resumes = 0;
        if (!this.#canResume(error) || resumes >= this.#maxResumes) throw error;
        await this.#sleep(error.retryDelayMs ?? Math.min(FIRST_DELAY_MS * 2 ** resumes, MAX_DELAY_MS));
        request = this.resumeRequest();
      }
    }
    if (this.#unfinished.size > 0) {
      throw new ParleyError("the stream ended without a finish reason: the answer is incomplete", status.INTERNAL);
    }
  }

  #take(delta: GenerateStreamResponse): GenerateStreamResponse {
    if (delta.requestId !== "") {
      if (this.seed === undefined) this.seed = delta.seed;
      else Object.assign(delta, { requestId: "", model: "", seed: 0n }); // told already, before the stream broke
    }
    if (delta.index === 0) this.tokenIds.push(...delta.tokenIds);
    if (delta.finishReason !== FinishReason.UNSPECIFIED) this.#unfinished.delete(delta.index);
    return delta;
  }

  #canResume(error: unknown): error is ParleyError {
    return error instanceof ParleyError && error.code === status.UNAVAILABLE && this.seed !== undefined;
  }
}
