// Chat with the models of a Parley server.
export * from "./client.js";
export * from "./errors.js";
export * from "./messages.js";
export { Stream } from "./stream.js";
export * from "./gen/parley/v1/chat.js";
export * from "./gen/parley/v1/generation.js";
export * from "./gen/parley/v1/message.js";
export { status } from "@grpc/grpc-js";
