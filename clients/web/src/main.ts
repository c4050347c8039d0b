// The page: a list of messages and a form. `?server=http://host:port` says where the proxy is.

import { Chat, describe } from "./chat";

const server = new URLSearchParams(location.search).get("server") ?? `http://${location.hostname}:8080`;
const chat = new Chat(server);

const messages = element("messages", HTMLElement);
const form = element("form", HTMLFormElement);
const question = element("question", HTMLTextAreaElement);
const send = element("send", HTMLButtonElement);
const stop = element("stop", HTMLButtonElement);

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value;
  question.value = "";
  void answer(text);
});
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!send.disabled) form.requestSubmit();
  }
});

async function answer(text: string): Promise<void> {
  show("user", text);
  const paragraph = show("assistant", "");
  const abort = new AbortController();
  stop.onclick = () => abort.abort();
  setBusy(true);
  try {
    for await (const piece of chat.ask(text, abort.signal)) {
      paragraph.append(piece); // as text: nothing that a model writes is markup here
      messages.scrollTop = messages.scrollHeight;
    }
  } catch (error) {
    const failure = describe(error);
    if (failure !== undefined) show("error", failure);
  } finally {
    setBusy(false);
  }
}

function setBusy(isBusy: boolean): void {
  send.disabled = isBusy;
  stop.hidden = !isBusy;
}

function show(role: string, text: string): HTMLParagraphElement {
  const paragraph = document.createElement("p");
  paragraph.className = role;
  paragraph.textContent = text;
  messages.append(paragraph);
  return paragraph;
}

function element<T extends HTMLElement>(id: string, kind: new () => T): T {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`the page has no ${id}`);
  return found;
}
