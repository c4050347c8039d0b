// What callers pass in. Left out is unset, at any depth.
import { CountTokensRequest, GenerateRequest } from "./gen/parley/v1/chat.js";
import { Message, Role } from "./gen/parley/v1/message.js";

export type GenerateInput = Parameters<typeof GenerateRequest.fromPartial>[0];
export type CountTokensInput = Parameters<typeof CountTokensRequest.fromPartial>[0];
export type MessageInput = Parameters<typeof Message.fromPartial>[0];

/** Instructions to the model; goes first. */
export const system = (content: string): MessageInput => ({ role: Role.SYSTEM, content });

/** What the person or program asks. */
export const user = (content: string): MessageInput => ({ role: Role.USER, content });

/** What the model said. */
export const assistant = (content: string): MessageInput => ({ role: Role.ASSISTANT, content });

/** The result of the tool call `toolCallId`. */
export const tool = (content: string, toolCallId: string): MessageInput => ({ role: Role.TOOL, content, toolCallId });
