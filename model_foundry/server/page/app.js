"use strict";
// Two columns, each a talk of its own with one model, over /v1/chat/completions. Text is only ever set as text.

const byId = (id) => document.getElementById(id);
const columns = [...document.querySelectorAll(".column")].map((node) => ({
  model: node.querySelector(".model"), talk: node.querySelector(".talk"), rate: node.querySelector(".rate"), messages: [],
}));
let running = null;

function headers() {
  const key = byId("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function add(column, kind, text) {
  const item = document.createElement("li");
  item.className = kind;
  item.textContent = text;
  column.talk.append(item);
  column.talk.scrollTop = column.talk.scrollHeight;
  return item;
}

async function problem(response) {
  try {
    const body = await response.json();
    return body.error?.message ?? JSON.stringify(body.detail ?? body);
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function listModels() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (response.status === 401) {
    byId("state").textContent = "This server wants a key: see Settings.";
    document.querySelector("details").open = true;
    return;
  }
  if (!response.ok) throw new Error(await problem(response));
  const models = (await response.json()).data;
  const base = models.find((model) => models.some((other) => other.parent === model.id));
  const tuned = models.find((model) => model.parent);
  columns.forEach((column, side) => {
    const chosen = column.model.value;
    column.model.replaceChildren(...models.map((model) => {
      const option = new Option(model.parent ? `${model.id} (tuned)` : model.id, model.id);
      return option;
    }));
    const wanted = side === 0 ? base ?? models[0] : tuned ?? models[0];
    column.model.value = models.some((model) => model.id === chosen) ? chosen : wanted.id;
  });
  columns[1].model.closest(".column").hidden = models.length < 2;
  document.querySelector("main").style.gridTemplateColumns = models.length < 2 ? "1fr" : "";
  const names = models.map((model) => model.id).join(", ");
  byId("state").textContent = `${names} · context ${models[0].max_model_len.toLocaleString("en")} tokens`;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    let end;
    while ((end = buffer.indexOf("\n\n")) >= 0) {
      const data = buffer.slice(0, end).replace(/^data: /, "");
      buffer = buffer.slice(end + 2);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer(column, prompt, signal) {
  column.messages.push({ role: "user", content: prompt });
  add(column, "user", prompt);
  const item = add(column, "assistant", "");
  const system = byId("system").value.trim();
  const body = {
    model: column.model.value, stream: true, stream_options: { include_usage: true },
    messages: [...(system ? [{ role: "system", content: system }] : []), ...column.messages],
    temperature: Number(byId("temperature").value), max_tokens: Number(byId("max").value),
    ...(byId("seed").value === "" ? {} : { seed: Number(byId("seed").value) }),
  };
  const started = performance.now();
  let first = null;
  let text = "";
  let finish = null;
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal,
    });
    if (!response.ok) throw new Error(await problem(response));
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const piece = chunk.choices[0]?.delta?.content ?? "";
      finish = chunk.choices[0]?.finish_reason ?? finish;
      if (piece) {
        first ??= performance.now();
        text += piece;
        item.textContent = text;
        column.talk.scrollTop = column.talk.scrollHeight;
      }
      if (chunk.usage) {
        const seconds = (performance.now() - started) / 1000;
        const rate = chunk.usage.completion_tokens / seconds;
        const wait = first === null ? seconds : (first - started) / 1000;
        column.rate.textContent = `${rate.toFixed(1)} tokens/s · first after ${wait.toFixed(2)} s`;
      }
    }
    if (finish === "length") add(column, "note", "cut off at the longest answer");
    column.messages.push({ role: "assistant", content: text });
  } catch (error) {
    if (error.name === "AbortError") {
      add(column, "note", "stopped");
      column.messages.push({ role: "assistant", content: text });
    } else {
      add(column, "error", error.message);
      column.messages.pop();
    }
  }
}

async function ask(prompt) {
  running = new AbortController();
  byId("send").disabled = true;
  byId("stop").hidden = false;
  const asked = columns.filter((column) => !column.model.closest(".column").hidden);
  await Promise.all(asked.map((column) => answer(column, prompt, running.signal)));
  running = null;
  byId("send").disabled = false;
  byId("stop").hidden = true;
  byId("prompt").focus();
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompt = byId("prompt").value.trim();
  if (!prompt || running) return;
  byId("prompt").value = "";
  ask(prompt);
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("ask").requestSubmit();
  }
});
byId("stop").addEventListener("click", () => running?.abort());
byId("clear").addEventListener("click", () => {
  running?.abort();
  for (const column of columns) {
    column.messages = [];
    column.talk.replaceChildren();
    column.rate.textContent = "";
  }
});
const refresh = () => listModels().catch((error) => { byId("state").textContent = error.message; });
byId("key").addEventListener("change", refresh);
refresh();
