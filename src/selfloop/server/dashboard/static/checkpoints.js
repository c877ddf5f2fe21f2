// Checkpoints: what a run, or all runs, have saved.

import { html, useState } from "./htm-preact.js";
import { get, rows, send } from "./api.js";
import { bytes, Confirm, Loaded, moment, Problem, Table, useAsked } from "./ui.js";

async function saved(run) {
  if (run) return rows("/v1/loops/checkpoints", "checkpoints", { run_id: run });
  const models = (await get("/v1/loops/capabilities")).supported_models.map((model) => model.model_name);
  const found = await Promise.all(models.map((name) => rows("/v1/loops/checkpoints", "checkpoints", { base_model: name, scope: "org" })));
  return found.flat().sort((a, b) => (a.created_at < b.created_at ? 1 : -1));
}

function Files({ id }) {
  const asked = useAsked(() => get(`/v1/loops/checkpoints/${id}/files`), [id]);
  return html`<${Loaded} asked=${asked}>${({ presigned_urls }) => html`<ul class="plain">
    ${presigned_urls.map((file) => html`<li><a href=${file.url} download=${file.relative_file_name}>${file.relative_file_name}</a>
      <span class="quiet"> ${bytes(file.size_bytes)}</span></li>`)}
  </ul>`}<//>`;
}

export function Checkpoints({ run }) {
  const asked = useAsked(() => saved(run), [run]);
  const [open, setOpen] = useState(null);
  const [doomed, setDoomed] = useState(null);
  const [error, setError] = useState(null);
  const remove = async () => {
    const { id } = doomed;
    setDoomed(null);
    try {
      await send("DELETE", `/v1/loops/checkpoints/${id}`);
      setError(null);
      asked.again();
    } catch (refused) {
      setError(refused);
    }
  };
  return html`<h1>Checkpoints${run ? html` of <a href=${`#/runs/${run}`}>${run}</a>` : ""}</h1>
    <${Problem} error=${error} />
    ${doomed && html`<${Confirm} question=${`Delete ${doomed.path} (${bytes(doomed.size_bytes)})? There is no way back.`}
      action="Delete" onYes=${remove} onNo=${() => setDoomed(null)} />`}
    <${Loaded} asked=${asked}>${(found) => found.length === 0
      ? html`<p class="empty">Nothing saved yet. A script saves with <code>save_state</code> (to go on) or
          <code>save_weights_for_sampler</code> (to sample).</p>`
      : html`<${Table} caption="Checkpoints" columns=${["Path", "For", "Step", "Base model", "Size", "Saved", ""]}>
          ${found.map((one) => html`
            <tr key=${one.id}>
              <td><code class="path">${one.path}</code></td>
              <td>${one.target}</td>
              <td>${one.step}</td>
              <td>${one.base_model}</td>
              <td>${bytes(one.size_bytes)}</td>
              <td>${moment(one.created_at)}</td>
              <td><div class="row">
                <button type="button" aria-expanded=${open === one.id} onClick=${() => setOpen(open === one.id ? null : one.id)}>Files</button>
                ${one.target === "sampler" && html`<a class="button" href=${`#/playground/${encodeURIComponent(one.path)}`}>Sample</a>`}
                <button type="button" class="danger" aria-label=${`Delete ${one.path}`} onClick=${() => setDoomed(one)}>Delete</button>
              </div></td>
            </tr>
            ${open === one.id && html`<tr key=${`${one.id}-files`}><td colspan="7"><${Files} id=${one.id} /></td></tr>`}`)}
        <//>`}<//>`;
}
