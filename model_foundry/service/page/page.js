"use strict";
// Everything shown is text: names are the clients' own, and may hold anything.
const at = (id) => document.getElementById(id);
const say = (id, text) => { at(id).textContent = text; };
const headers = () => (at("key").value ? { "X-API-Key": at("key").value } : {});
const when = (seconds) => (seconds === null ? "" : new Date(seconds * 1000).toLocaleString());
const size = (bytes) => (bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);

function node(tag, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function row(...cells) {
  const made = node("tr");
  for (const cell of cells) {
    const td = node("td");
    td.append(cell);
    made.append(td);
  }
  return made;
}

function curve(points) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 300 80");
  svg.setAttribute("role", "img");
  const values = points.map(([, loss]) => loss);
  const low = Math.min(...values), high = Math.max(...values), last = Math.max(points.length - 1, 1);
  svg.setAttribute("aria-label", `loss a token from ${values[0].toFixed(4)} to ${values.at(-1).toFixed(4)}`);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  line.setAttribute("points", values.map((loss, i) =>
    `${(4 + 292 * i / last).toFixed(1)},${(high === low ? 40 : 76 - 72 * (loss - low) / (high - low)).toFixed(1)}`).join(" "));
  svg.append(line);
  return svg;
}

function card(model) {
  const made = node("article");
  made.dataset.model = model.id;
  made.append(node("h3", model.id));
  const place = model.in_memory ? "in memory" : "on disk";
  made.append(node("p", `${model.tenant} · rank ${model.rank ?? "?"} · ${model.state}, ${place} · ${model.done} operations`));
  if (model.curve.length > 0) {
    made.append(curve(model.curve));
    const [step, loss] = model.curve.at(-1);
    made.append(node("p", `loss ${loss.toFixed(4)} a token at step ${step}`, "loss"));
  } else made.append(node("p", "no pass yet"));
  return made;
}

async function download(item, button) {
  button.disabled = true;
  const answer = await fetch(`/page/archive?path=${encodeURIComponent(item.path)}`, { headers: headers() });
  if (answer.ok) {
    const link = node("a");
    link.href = URL.createObjectURL(await answer.blob());
    link.download = `${item.name}.tar`;
    link.click();
    URL.revokeObjectURL(link.href);
    say("said", `${item.path} was downloaded`);
  } else say("said", `${item.path}: ${(await answer.json()).error}`);
  button.disabled = false;
}

function checkpoint(item) {
  const fetched = node("button", "Download");
  fetched.addEventListener("click", () => download(item, fetched));
  const exported = node("button", "Export to GGUF");
  exported.addEventListener("click", () => say("said", item.export));
  const buttons = node("span", undefined, "buttons");
  buttons.append(fetched, exported);
  const made = row(item.path, size(item.bytes), when(item.created), when(item.expires), buttons);
  made.dataset.path = item.path;
  return made;
}

function show(found) {
  say("state", `${found.base} · ${found.models.length} models, ${found.sessions.length} sessions`);
  at("models").replaceChildren(...found.models.map(card));
  at("checkpoints").replaceChildren(...found.checkpoints.map(checkpoint));
  at("queues").replaceChildren(...found.queues.map((queue) =>
    row(queue.tenant, queue.waiting, queue.samples, queue.seconds.toFixed(1))));
  at("sessions").replaceChildren(...found.sessions.map((session) =>
    row(session.id, session.tenant, when(session.created), session.finished === null ? "open" : "finished")));
}

let shown = "";
async function look() {
  try {
    const answer = await fetch("/page/state.json", { headers: headers() });
    const text = await answer.text();
    // What did not change is left alone, so that what somebody marks or presses stays where it is.
    if (!answer.ok) say("state", JSON.parse(text).error);
    else if (text !== shown) show(JSON.parse(text));
    shown = answer.ok ? text : "";
  } catch {
    say("state", "the service does not answer");
    shown = "";
  }
}

at("key").addEventListener("change", look);
look();
setInterval(look, 2000);
