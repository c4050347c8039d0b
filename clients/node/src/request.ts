// Makes the requests of what callers pass in. The client does it for each call.
import { inspect } from "node:util";

import { Role, ToolChoice_Mode } from "./gen/parley/v1/message.js";

interface Type<Input, Request> {
  fromPartial(input: Input): Request;
}

const LONE_SURROGATE = /\p{Surrogate}/u;
const ENUMS: Readonly<Record<string, object>> = { role: Role, mode: ToolChoice_Mode };

/**
 * The request with the fields of `input`. The stubs would leave out a field that they do not know, take a Map and what
 * is no object for an empty one, send -1 for an enum's value, "[object Object]" for a text, and U+FFFD for half of a
 * surrogate pair; TypeScript refuses most of that, JavaScript nothing.
 *
 * @throws TypeError: it names the field, by its path.
 */
export function build<Input, Request>(type: Type<Input, Request>, input: Input): Request {
  const request = type.fromPartial(input);
  check(input, request, "");
  return request;
}

function check(given: unknown, made: unknown, path: string): void {
  // Of messages and lists the stubs make new ones; what they keep stands where a text or a number belongs.
  const isMisplaced = given === made && isObject(given) && !path.endsWith("chatTemplateKwargs");
  if (isMisplaced || given instanceof Map) throw new TypeError(`${path || "the request"}: takes no ${inspect(given)}`);
  const half = typeof given === "string" ? given.search(LONE_SURROGATE) : -1;
  if (half >= 0) throw new TypeError(`${path}: has half of a surrogate pair at ${half}, which is no text`);
  if (given === made || !isObject(made)) return;
  if (!isObject(given)) throw new TypeError(`${path || "the request"}: ${inspect(given)} is no object`);
  for (const [key, value] of Object.entries(given)) {
    if (value === undefined || value === null) continue;
    const at = Array.isArray(given) ? `${path}[${key}]` : path === "" ? key : `${path}.${key}`;
    if (!Object.hasOwn(made, key)) throw new TypeError(`${at}: no such field`);
    if (Object.hasOwn(ENUMS, key)) checkName(value, ENUMS[key]!, at);
    check(value, made[key], at);
    if (key === "responseFormat") checkForm(made[key] as object, at);
  }
}

function checkName(value: unknown, names: object, path: string): void {
  const known = Object.values(names).filter((name) => name !== Role.UNRECOGNIZED);
  if (known.includes(value)) return;
  const choices = known.filter((name) => !name.endsWith("_UNSPECIFIED")).map((name) => inspect(name));
  throw new TypeError(`${path}: ${inspect(value)} is none of ${choices.join(", ")}`);
}

// Of several members of a oneof the last one sent would count.
function checkForm(made: object, path: string): void {
  const numForms = Object.values(made).filter((form) => form !== undefined).length;
  if (numForms > 1) throw new TypeError(`${path}: takes exactly one form, not ${numForms}`);
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null;
}
