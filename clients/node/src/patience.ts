// How long a call waits for a service in trouble, and in which steps. All of a client's calls use it.
import { status } from "@grpc/grpc-js";

import { ParleyError } from "./errors.js";

const FIRST_DELAY_MS = 100;
const MAX_DELAY_MS = 5_000;

/** Whether a server of the client's target has ever answered: where none has, the target is likely wrong. */
export interface Contact {
  isMade: boolean;
}

/** Failures in a row of one call and those that follow it. */
export class Patience {
  readonly #maxFailures: number;
  readonly #contact: Contact;
  #failures = 0;

  constructor(maxFailures: number, contact: Contact) {
    this.#maxFailures = maxFailures;
    this.#contact = contact;
  }

  /** To be called with each part of an answer. */
  noteProgress(): void {
    this.#contact.isMade = true;
    this.#failures = 0;
  }

  /** In how many milliseconds to call again; undefined where that would not help. */
  delayAfter(error: unknown): number | undefined {
    if (!(error instanceof ParleyError) || this.#failures >= this.#maxFailures || !this.#isPassing(error)) return;
    const backoffMs = Math.min(FIRST_DELAY_MS * 2 ** this.#failures, MAX_DELAY_MS);
    this.#failures += 1;
    return Math.max(backoffMs * (0.8 + 0.4 * Math.random()), error.retryDelayMs ?? 0);
  }

  /**
   * As `delayAfter`, for a call that is to be made once more from its beginning. A server that died or is not ready may
   * be back soon, and another may be there; one that never was will not.
   */
  delayBeforeAgain(error: unknown): number | undefined {
    if (error instanceof ParleyError && error.requestId !== undefined) this.#contact.isMade = true;
    return this.#contact.isMade ? this.delayAfter(error) : undefined;
  }

  #isPassing(error: ParleyError): boolean {
    // A proxy resets streams whose server is gone, and gRPC has no better code for that.
    const isReset = error.code === status.INTERNAL && error.reason === undefined && /RST_STREAM/.test(error.message);
    return isReset || error.code === status.UNAVAILABLE || (this.#failures > 0 && error.reason === "QUEUE_FULL");
  }
}
