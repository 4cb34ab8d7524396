"use strict";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
let turns = [];
let running = null;

function headers() {
  const key = $("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function show(role, text) {
  const turn = document.createElement("div");
  turn.className = `turn ${role}`;
  turn.textContent = text;
  $("turns").append(turn);
  turn.scrollIntoView({ block: "end" });
  return turn;
}

function body() {
  const system = $("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...turns] : turns;
  const wanted = { messages, stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) {
    if ($(name).value !== "") wanted[name] = Number($(name).value);
  }
  return JSON.stringify(wanted);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const blocks = held.split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      if (block.startsWith("data: ") && block !== "data: [DONE]") yield JSON.parse(block.slice(6));
    }
  }
}

function speed(tokens, began) {
  const seconds = (performance.now() - began) / 1000;
  $("speed").textContent = seconds > 0 && tokens > 1 ? `${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
}

async function answer(turn) {
  running = new AbortController();
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    body: body(),
    signal: running.signal,
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  let began = 0;
  let chunks = 0;
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) speed(event.usage.completion_tokens, began);
    const text = event.choices[0]?.delta.content;
    if (!text) continue;
    began = began || performance.now();
    turn.textContent += text;
    turn.scrollIntoView({ block: "end" });
    speed(++chunks, began);
  }
}

async function send() {
  const text = $("message").value.trim();
  if (!text || running) return;
  $("message").value = "";
  turns.push({ role: "user", content: text });
  show("user", text);
  const turn = show("assistant", "");
  $("send").hidden = true;
  $("stop").hidden = false;
  try {
    await answer(turn);
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  }
  if (turn.textContent) {
    turns.push({ role: "assistant", content: turn.textContent });
  } else {
    turns.pop();
    turn.remove();
  }
  running = null;
  $("send").hidden = false;
  $("stop").hidden = true;
  $("message").focus();
}

async function name() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (response.ok) $("model").textContent = document.title = (await response.json()).data[0].id;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  turns = [];
  $("turns").replaceChildren();
  $("speed").textContent = "";
});
$("key").addEventListener("change", name);
name();
