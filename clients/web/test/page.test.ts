// The built page in a real browser (CHROMIUM), against the proxy at SERVER and its own files at PAGE: run by tests/mesh.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";

import puppeteer, { type Browser, type Page } from "puppeteer-core";

const { CHROMIUM = "", PAGE = "", SERVER = "" } = process.env;
let browser: Browser;
let page: Page;

before(async () => {
  browser = await puppeteer.launch({ executablePath: CHROMIUM, args: ["--no-sandbox", "--disable-gpu"] });
  page = await browser.newPage();
  await page.goto(`${PAGE}/?server=${encodeURIComponent(SERVER)}`);
});

after(() => browser.close());

async function ask(text: string): Promise<void> {
  await page.$eval("#question", (box, value) => Object.assign(box, { value }), text); // typing 20,000 keys takes minutes
  await page.focus("#question");
  await page.keyboard.press("Enter");
}

/** The lengths that the last answer's text has had, in order, until it is complete. */
async function lengths(): Promise<number[]> {
  const seen: number[] = [];
  await page.waitForFunction("!document.querySelector('#stop').hidden");
  for (;;) {
    const [length, isBusy] = (await page.evaluate(
      "[[...document.querySelectorAll('.assistant')].at(-1).textContent.length, !document.querySelector('#stop').hidden]",
    )) as [number, boolean];
    if (length !== seen.at(-1)) seen.push(length);
    if (!isBusy) return seen;
  }
}

const texts = (role: string) => page.$$eval(`.${role}`, (all) => all.map((one) => one.textContent));

test("an answer streams in", async () => {
  await ask(process.env["QUESTION"] ?? "");
  const seen = await lengths();
  assert.ok(seen.length > 3, `it came in ${seen.length} steps`);
  assert.deepEqual(await texts("error"), []);
  const expected = process.env["ANSWER"];
  if (expected !== undefined) assert.deepEqual(await texts("assistant"), [expected]);
});

test("an answer can be stopped, and the next one comes", async () => {
  await ask(process.env["ENDLESS"] ?? "");
  await page.waitForFunction("[...document.querySelectorAll('.assistant')].at(-1).textContent.length > 20");
  await page.click("#stop");
  await page.waitForFunction("document.querySelector('#stop').hidden");
  await ask(process.env["QUESTION"] ?? "");
  await lengths();
  assert.deepEqual(await texts("error"), []);
  assert.equal((await texts("assistant")).length, 3);
});

test("an error is told with its reason", async () => {
  await ask("x".repeat(20_000));
  await page.waitForSelector(".error");
  assert.match((await texts("error"))[0] ?? "", /PROMPT_TOO_LONG/);
});

test("a question that was refused is no part of the conversation", async () => {
  await ask(process.env["QUESTION"] ?? "");
  await lengths();
  assert.equal((await texts("error")).length, 1);
});
