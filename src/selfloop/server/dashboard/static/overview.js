// What the server has and does now.

import { html } from "./htm-preact.js";
import { get, getText, rows } from "./api.js";
import { bytes, count, Loaded, moment, Status, Table, useAsked } from "./ui.js";

const EVERY_S = 5;

// Gauges of the Prometheus text: [{name, labels, value}].
function gauges(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const parts = /^(\w+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (parts) {
      const labels = Object.fromEntries([...(parts[2] || "").matchAll(/(\w+)="([^"]*)"/g)].map((one) => [one[1], one[2]]));
      found.push({ name: parts[1], labels, value: Number(parts[3]) });
    }
  }
  return found;
}

async function look() {
  const [models, deployments, text] = await Promise.all([
    get("/v1/loops/capabilities"),
    rows("/v1/loops/deployments", "deployments", { scope: "org" }),
    getText("/metrics"),
  ]);
  return { models: models.supported_models, deployments, gauges: gauges(text) };
}

function Tiles({ found }) {
  const value = (name, labels = {}) =>
    found
      .filter((one) => one.name === name && Object.entries(labels).every(([key, wanted]) => one.labels[key] === wanted))
      .reduce((total, one) => total + one.value, 0);
  const workers = found.filter((one) => one.name === "selfloop_workers" && one.value);
  const tiles = [
    ["Queued operations", count(value("selfloop_queued_operations"))],
    ["Workers", workers.map((one) => `${one.value} ${one.labels.state}`).join(", ") || "none"],
    ["Tokens trained", count(value("selfloop_tokens_total", { use: "trained" }))],
    ["Tokens sampled", count(value("selfloop_tokens_total", { use: "sampled" }))],
    ["Memory", bytes(value("selfloop_resident_bytes"))],
    ["Checkpoints", bytes(value("selfloop_checkpoint_bytes"))],
  ];
  return html`<dl class="tiles">
    ${tiles.map(([name, shown]) => html`<div><dt>${name}</dt><dd>${shown}</dd></div>`)}
  </dl>`;
}

export function Overview() {
  const asked = useAsked(look, [], EVERY_S);
  return html`<h1>Overview</h1>
    <${Loaded} asked=${asked}>${(now) => html`
      <${Tiles} found=${now.gauges} />
      <h2>Capacity</h2>
      ${now.deployments.length
        ? html`<${Table} caption="Trainer deployments" columns=${["Deployment", "Base model", "Run", "Status", "Why", "Made"]}>
            ${now.deployments.map((one) => {
              const run = one.active_run_id || one.latest_run_id;
              return html`<tr key=${one.id}>
                <td><code>${one.id}</code></td>
                <td>${one.base_model}</td>
                <td>${run && html`<a href=${`#/runs/${run}`}>${run}</a>`}</td>
                <td><${Status} name=${one.status.name} /></td>
                <td>${one.status.reason}</td>
                <td>${moment(one.created_at)}</td>
              </tr>`;
            })}
          <//>`
        : html`<p class="empty">Nothing runs yet. The lines of <a href="#/setup">Set up a client</a> start a first run.</p>`}
      <h2>Models</h2>
      <${Table} caption="Base models" columns=${["Model", "Longest sequence", "State"]}>
        ${now.models.map((model) => html`<tr key=${model.model_name}>
          <td>${model.model_name}</td>
          <td>${count(model.max_context_length)}</td>
          <td>${model.enabled ? "can be trained and sampled" : model.enablement_details.reason_detail}</td>
        </tr>`)}
      <//>
    `}<//>`;
}
