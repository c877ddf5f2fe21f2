// What was used, and how clients are pointed here.

import { html, useState } from "./htm-preact.js";
import { get, rows } from "./api.js";
import { bytes, count, Lines, Loaded, Table, useAsked } from "./ui.js";

const GROUPS = { run: "By run", key: "By key", team: "By team" };

export function Usage() {
  const [group, setGroup] = useState("run");
  const asked = useAsked(() => rows("/v1/loops/usage", "usage", { scope: "org", group_by: group }), [group]);
  return html`<h1>Usage</h1>
    <div class="row" role="group" aria-label="Group by">${Object.entries(GROUPS).map(([name, label]) => html`
      <button type="button" aria-pressed=${group === name} onClick=${() => setGroup(name)}>${label}</button>`)}</div>
    <${Loaded} asked=${asked}>${(lines) => lines.length === 0
      ? html`<p class="empty">Nothing used yet. <a href="#/setup">Set up a client</a>, or try the <a href="#/playground">playground</a>.</p>`
      : html`<${Table} caption="Usage" columns=${[GROUPS[group].slice(3), "Name", "Operations", "Samples", "Trained", "Forwarded", "Prefilled", "Sampled", "Compute s", "Stored"]}>
          ${lines.map((line) => html`<tr key=${line.id}>
            <td>${group === "run" && line.id ? html`<a href=${`#/runs/${line.id}`}>${line.id}</a>` : line.id || "(no run)"}</td>
            <td>${line.name}</td>
            ${["operations", "samples", "tokens_trained", "tokens_forwarded", "tokens_prefilled", "tokens_sampled"].map((name) => html`<td class="number">${count(line[name])}</td>`)}
            <td class="number">${line.compute_seconds.toFixed(1)}</td>
            <td class="number">${bytes(line.checkpoint_bytes)}</td>
          </tr>`)}
        <//>`}<//>`;
}

// With the address under which this page was reached.
function lines(model) {
  const here = location.origin;
  return [
    ["Loops (baseten-loops)", `export LOOPS_BASE_URL=${here}\nexport BASETEN_API_KEY=$SELFLOOP_API_KEY\nexport HF_ENDPOINT=${here}/hf`],
    ["Tinker", `export TINKER_BASE_URL=${here}\nexport TINKER_API_KEY=tml-$SELFLOOP_API_KEY\nexport HF_ENDPOINT=${here}/hf`],
    ["OpenAI clients", `export OPENAI_BASE_URL=${here}/oai/api/v1\nexport OPENAI_API_KEY=$SELFLOOP_API_KEY`],
    ["Anthropic clients", `export ANTHROPIC_BASE_URL=${here}/anthropic/api\nexport ANTHROPIC_AUTH_TOKEN=$SELFLOOP_API_KEY`],
    ["curl", `curl ${here}/oai/api/v1/chat/completions \\\n  -H "Authorization: Bearer $SELFLOOP_API_KEY" -H "Content-Type: application/json" \\\n  -d '{"model": "${model}", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40}'`],
    ["The selfloop command", `export SELFLOOP_URL=${here}\nselfloop runs`],
  ];
}

export function Setup() {
  const asked = useAsked(() => get("/v1/loops/capabilities"));
  return html`<h1>Set up a client</h1>
    <p>Put your key into <code>SELFLOOP_API_KEY</code> first; on the server's machine it is in <code>~/.selfloop/api_key</code>.</p>
    <${Loaded} asked=${asked}>${({ supported_models: models }) => lines(models.length ? models[0].model_name : "<model>").map(
      ([label, text]) => html`<${Lines} key=${label} label=${label} text=${text} />`)}<//>`;
}
