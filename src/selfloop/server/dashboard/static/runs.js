// Runs: the list, one run with its curves as they grow, and several beside each other.

import { html, useEffect, useState } from "./htm-preact.js";
import { events, get, rows, send } from "./api.js";
import { Chart, ordered } from "./charts.js";
import { Timeline } from "./timeline.js";
import { Confirm, Loaded, moment, Problem, Status, Table, useAsked } from "./ui.js";

const POINTS = 1000;
const AGAIN_MS = 2000;
const MAX_COMPARED = 6;

const named = (run) => (run.name === run.base_model ? "" : run.name);

export function Runs() {
  const asked = useAsked(() => rows("/v1/loops/runs", "runs", { scope: "org" }), [], 10);
  const [chosen, setChosen] = useState([]);
  const toggle = (id) => setChosen(chosen.includes(id) ? chosen.filter((one) => one !== id) : [...chosen, id]);
  return html`<h1>Runs</h1>
    <${Loaded} asked=${asked}>${(runs) => runs.length === 0
      ? html`<p class="empty">No run yet. <a href="#/setup">Set up a client</a> and start one; it appears here at once.</p>`
      : html`
        <p class="row">
          <a class="button" aria-disabled=${chosen.length < 2} href=${chosen.length < 2 ? null : `#/compare/${chosen.join(",")}`}>
            Compare ${chosen.length || ""}
          </a>
          <span class="quiet">Choose two to ${MAX_COMPARED} runs.</span>
        </p>
        <${Table} caption="Runs" columns=${["", "Run", "Name", "Base model", "Rank", "Status", "By", "Made"]}>
          ${runs.map((run) => html`<tr key=${run.id}>
            <td><input type="checkbox" aria-label=${`Compare ${run.id}`} checked=${chosen.includes(run.id)}
              disabled=${!chosen.includes(run.id) && chosen.length === MAX_COMPARED} onChange=${() => toggle(run.id)} /></td>
            <td><a href=${`#/runs/${run.id}`}>${run.id}</a></td>
            <td>${named(run)}</td>
            <td>${run.base_model}</td>
            <td>${run.lora_rank}</td>
            <td><${Status} name=${run.status.name} /></td>
            <td>${run.user.email}</td>
            <td>${moment(run.created_at)}</td>
          </tr>`)}
        <//>`}<//>`;
}

// The series of a run by name, growing while it lives; `ended` once it has.
function useCurves(id) {
  const [state, setState] = useState({ series: {}, ended: false });
  useEffect(() => {
    const gone = new AbortController();
    const series = {};
    let after = 0;
    const show = (more = {}) => gone.signal.aborted || setState({ series: { ...series }, ended: false, ...more });

    async function begin() {
      const found = await get(`/v1/loops/runs/${id}/metrics`, { points: POINTS });
      for (const one of found.series) series[one.name] = { steps: one.steps, values: one.values };
      after = found.last;
      show({ loaded: true });
    }

    async function follow() {
      // Frames that come in one go are shown in one go.
      let drawing = 0;
      for await (const { event, data } of events(`/v1/loops/runs/${id}/metrics/stream`, { params: { after }, signal: gone.signal })) {
        if (event === "end") return true;
        if (event === "error") throw new Error(data.message);
        after = data.number;
        for (const [name, value] of Object.entries(data.values)) {
          const known = series[name] || { steps: [], values: [] };
          series[name] = { steps: [...known.steps, data.step], values: [...known.values, value] };
        }
        drawing = drawing || requestAnimationFrame(() => {
          drawing = 0;
          show({ loaded: true });
        });
      }
      return false;
    }

    async function go() {
      let begun = false;
      while (!gone.signal.aborted) {
        try {
          if (!begun) await begin();
          begun = true;
          if (await follow()) return show({ loaded: true, ended: true });
        } catch (error) {
          show({ loaded: begun, error });
          if (error.status >= 400 && error.status < 500) return;
        }
        await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
      }
    }
    go();
    return () => gone.abort();
  }, [id]);
  return state;
}

function All({ all, onAll }) {
  return html`<label class="row"><input type="checkbox" checked=${all} onChange=${() => onAll(!all)} /> Show amounts and times, too</label>`;
}

function Curves({ curves }) {
  const [all, setAll] = useState(false);
  const names = ordered(Object.keys(curves.series), all);
  if (!curves.loaded) return curves.error ? null : html`<p class="quiet" role="status">Loading…</p>`;
  if (!names.length) {
    return html`<p class="empty">${curves.ended ? "This run never trained." : "Nothing measured yet: curves appear with the first forward_backward."}</p>`;
  }
  return html`
    <${All} all=${all} onAll=${setAll} />
    <div class="charts">${names.map((name) => html`
      <${Chart} key=${name} title=${name} curves=${[{ label: name, ...curves.series[name] }]} />`)}
    </div>`;
}

function Facts({ run }) {
  const facts = [
    ["Base model", run.base_model],
    ["Rank", run.lora_rank],
    ["Longest sequence", run.max_seq_len],
    ["By", run.user.email],
    ["Made", moment(run.created_at)],
    ["Session", run.session_id],
  ];
  return html`<dl class="facts">${facts.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>`;
}

export function Run({ id }) {
  const asked = useAsked(() => get(`/v1/loops/runs/${id}`), [id]);
  const curves = useCurves(id);
  const [asking, setAsking] = useState(false);
  const [error, setError] = useState(null);
  const end = async () => {
    setAsking(false);
    try {
      await send("POST", `/v1/loops/runs/${id}/deactivate`, {});
      asked.again();
    } catch (refused) {
      setError(refused);
    }
  };
  return html`<${Loaded} asked=${asked}>${({ run }) => {
    const ended = curves.ended || run.status.name !== "ACTIVE";
    return html`
      <h1>${named(run) || run.id} <${Status} name=${ended ? "INACTIVE" : run.status.name} />
        ${!ended && curves.loaded && html`<span class="live" role="status">live</span>`}</h1>
      <${Facts} run=${run} />
      <p class="row">
        <a class="button" href=${`#/playground/run:${run.id}`}>Sample from it</a>
        <a class="button" href=${`#/checkpoints/${run.id}`}>Its checkpoints</a>
        ${!ended && html`<button type="button" class="danger" onClick=${() => setAsking(true)}>End the run</button>`}
      </p>
      ${asking && html`<${Confirm} question=${`End run ${run.id} and its sampler? Its checkpoints stay.`} action="End it"
        onYes=${end} onNo=${() => setAsking(false)} />`}
      <${Problem} error=${error || curves.error} />
      <${Curves} curves=${curves} />
      <${Timeline} id=${id} />`;
  }}<//>`;
}

export function Compare({ ids }) {
  const [all, setAll] = useState(false);
  const asked = useAsked(
    () => Promise.all(ids.map(async (id) => {
      const [about, metrics] = await Promise.all([get(`/v1/loops/runs/${id}`), get(`/v1/loops/runs/${id}/metrics`, { points: POINTS })]);
      return { run: about.run, series: Object.fromEntries(metrics.series.map((one) => [one.name, one])) };
    })),
    [ids.join()],
    10,
  );
  return html`<h1>${ids.length} runs beside each other</h1>
    <${Loaded} asked=${asked}>${(runs) => {
      const names = ordered(new Set(runs.flatMap(({ series }) => Object.keys(series))), all);
      return html`
        <ul class="plain">${runs.map(({ run }) => html`<li><a href=${`#/runs/${run.id}`}>${run.id}</a> ${named(run)} <span class="quiet">${run.base_model}, rank ${run.lora_rank}</span></li>`)}</ul>
        ${names.length === 0 && html`<p class="empty">None of them has measured anything yet.</p>`}
        <${All} all=${all} onAll=${setAll} />
        <div class="charts">${names.map((name) => html`
          <${Chart} key=${name} title=${name} curves=${runs
            .filter(({ series }) => series[name])
            .map(({ run, series }) => ({ label: named(run) ? `${named(run)} ${run.id}` : run.id, ...series[name] }))} />`)}
        </div>`;
    }}<//>`;
}
