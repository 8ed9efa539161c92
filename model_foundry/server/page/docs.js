"use strict";
// The OpenAPI description as a page: routes, fields, answers.

const make = (tag, text, ...children) => {
  const node = document.createElement(tag);
  if (text) node.textContent = text;
  node.append(...children);
  return node;
};

function words(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(words).join(" or ");
  if (schema.enum) return schema.enum.join(", ");
  if (schema.const !== undefined) return String(schema.const);
  if (schema.type === "array") return `list of ${words(schema.items ?? {})}`;
  const bounds = [["minimum", "≥ "], ["exclusiveMinimum", "> "], ["maximum", "≤ "]];
  const said = bounds.filter(([key]) => schema[key] !== undefined).map(([key, sign]) => sign + schema[key]);
  return [schema.type ?? "any", ...said].join(" ");
}

function fields(schema, all) {
  const found = schema.$ref ? all[schema.$ref.split("/").pop()] : schema;
  const table = make("table");
  for (const [name, field] of Object.entries(found.properties ?? {})) {
    const needed = (found.required ?? []).includes(name) ? "required" : `default ${JSON.stringify(field.default ?? null)}`;
    table.append(make("tr", "", make("td", "", make("code", name)), make("td", words(field)), make("td", needed),
      make("td", field.description ?? "")));
  }
  return table;
}

async function show() {
  const api = await (await fetch("/openapi.json")).json();
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      byDocs.append(make("h2", "", make("code", `${method.toUpperCase()} ${path}`)), make("p", operation.summary));
      const body = operation.requestBody?.content?.["application/json"]?.schema;
      if (body) byDocs.append(fields(body, api.components.schemas));
      const answers = Object.entries(operation.responses).map(([status, each]) => `${status} ${each.description}`);
      byDocs.append(make("p", answers.join(" · ")));
    }
  }
}
const byDocs = document.getElementById("docs");
show().catch((error) => { byDocs.textContent = error.message; });
