// Makes the requests of what callers pass in. The client does it for each call.
import { inspect } from "node:util";

import { Role, ToolChoice_Mode } from "./gen/parley/v1/message.js";

interface Type<Input, Request> {
  fromPartial(input: Input): Request;
  encode(request: Request): { finish(): Uint8Array };
  decode(bytes: Uint8Array): Request;
}

const LONE_SURROGATE = /\p{Surrogate}/u;
const ENUMS: Readonly<Record<string, object>> = { role: Role, mode: ToolChoice_Mode };
// Elsewhere, as in chatTemplateKwargs, keys of these names are the caller's own.
const ENUM_PATH = /^(requests\[\d+\]\.)?(messages\[\d+\]\.role|toolChoice\.mode)$/;

/**
 * The request with the fields of `input`. The stubs would leave out a field that they do not know, take a Map and what
 * is no object for an empty one, send -1 for an enum's value, "[object Object]" for a text, true for "false", and U+FFFD
 * for half of a surrogate pair; TypeScript refuses most of that, JavaScript nothing.
 *
 * @throws TypeError: it names the field, by its path.
 */
export function build<Input, Request>(type: Type<Input, Request>, input: Input): Request {
  const request = type.fromPartial(input);
  check(input, asRead(type, request), "");
  return request;
}

/** The request as a server will read it; as it is where it cannot be encoded, which the call tells. */
function asRead<Request>(type: Type<never, Request>, request: Request): Request {
  try {
    return type.decode(type.encode(request).finish());
  } catch {
    return request;
  }
}

function check(given: unknown, read: unknown, path: string): void {
  const half = typeof given === "string" ? given.search(LONE_SURROGATE) : -1;
  if (half >= 0) throw new TypeError(`${path}: has half of a surrogate pair at ${half}, which is no text`);
  if (given === read) return;
  if (isObject(read) && !isObject(given)) throw new TypeError(`${path || "the request"}: ${inspect(given)} is no object`);
  const isSameKind = typeof given === typeof read || (typeof read === "bigint" && Number.isSafeInteger(given));
  if (!isSameKind || given instanceof Map) throw new TypeError(`${path || "the request"}: takes no ${inspect(given)}`);
  if (!isObject(given) || !isObject(read)) return;
  for (const [key, value] of Object.entries(given)) {
    if (value === undefined || value === null) continue;
    const at = Array.isArray(given) ? `${path}[${key}]` : path === "" ? key : `${path}.${key}`;
    if (!Object.hasOwn(read, key)) throw new TypeError(`${at}: no such field`);
    if (read[key] === Role.UNRECOGNIZED && ENUM_PATH.test(at)) throw unknownName(value, ENUMS[key]!, at);
    check(value, read[key], at);
    if (/^(requests\[\d+\]\.)?responseFormat$/.test(at)) checkForm(read[key] as object, at);
  }
}

function unknownName(value: unknown, names: object, path: string): TypeError {
  const known = Object.values(names).filter((name) => name !== Role.UNRECOGNIZED && !name.endsWith("_UNSPECIFIED"));
  return new TypeError(`${path}: ${inspect(value)} is none of ${known.map((name) => inspect(name)).join(", ")}`);
}

// Of several members of a oneof the last one sent would count.
function checkForm(made: object, path: string): void {
  const numForms = Object.values(made).filter((form) => form !== undefined).length;
  if (numForms > 1) throw new TypeError(`${path}: takes exactly one form, not ${numForms}`);
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null;
}
