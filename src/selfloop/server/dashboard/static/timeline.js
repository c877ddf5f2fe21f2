// What a run waited for and computed over the last minutes: a row for each kind, pale while waiting, full while computed.

import { html, useEffect, useRef, useState } from "./htm-preact.js";
import { get } from "./api.js";
import { Loaded, Table, useAsked } from "./ui.js";

const LIMIT = 300;
const EVERY_S = 5;
const ROW = 26;
const BAR = 14;
const WIDTH = 1000;
const LEAST = 1.5;

const seconds = (s) => `${s < 10 ? s.toFixed(2) : s.toFixed(0)} s`;

// Totals and spans by kind, in the order in which the kinds began.
function byKind(spans) {
  const kinds = new Map();
  for (const span of spans) {
    const known = kinds.get(span.kind) || { spans: [], waited: 0, computed: 0, failed: 0 };
    known.spans.push(span);
    known.waited += span.begun - span.accepted;
    known.computed += span.ended - span.begun;
    known.failed += span.error ? 1 : 0;
    kinds.set(span.kind, known);
  }
  return [...kinds];
}

function Bars({ kinds, start, end }) {
  const x = (at) => ((at - start) / Math.max(end - start, 1e-3)) * WIDTH;
  const bar = (name, from, to, row, title) => html`<rect class=${name} x=${x(from)} y=${row * ROW + 8} height=${BAR}
    width=${Math.max(x(to) - x(from), name === "waits" ? 0 : LEAST)}><title>${title}</title></rect>`;
  return html`<svg class="timeline" viewBox=${`0 0 ${WIDTH} ${kinds.length * ROW + 4}`} preserveAspectRatio="none" role="img"
      aria-label=${`Waits and computing over ${seconds(end - start)}; the same in numbers in the table below`}>
    ${kinds.map(([kind, { spans }], row) => spans.map((span) => {
      const title = `${kind}: waited ${seconds(span.begun - span.accepted)}, computed ${seconds(span.ended - span.begun)}${span.error && `; ${span.error}`}`;
      return [
        bar("waits", span.accepted, span.begun, row, title),
        bar(span.error ? "fails" : "computes", span.begun, span.ended, row, title),
      ];
    }))}
  </svg>`;
}

// A file that only a key opens: fetched, then handed to the browser.
function PerfettoFile({ id }) {
  const link = useRef();
  const [address, setAddress] = useState(null);
  useEffect(() => {
    if (address) link.current.click();
    return () => address && URL.revokeObjectURL(address);
  }, [address]);
  const fetched = async () => {
    const trace = await get(`/v1/loops/runs/${id}/timeline/perfetto`);
    setAddress(URL.createObjectURL(new Blob([JSON.stringify(trace)], { type: "application/json" })));
  };
  return html`<button type="button" onClick=${fetched}>File for Perfetto</button>
    <a class="unseen" tabindex="-1" aria-hidden="true" ref=${link} href=${address} download=${`${id}.json`}>file</a>`;
}

export function Timeline({ id }) {
  const asked = useAsked(() => get(`/v1/loops/runs/${id}/timeline`, { limit: LIMIT }), [id], EVERY_S);
  return html`<h2>Timeline</h2>
    <${Loaded} asked=${asked}>${({ spans, is_whole }) => {
      if (!spans.length) return html`<p class="quiet">Nothing has ended yet.</p>`;
      const [start, end] = [Math.min(...spans.map((span) => span.accepted)), Math.max(...spans.map((span) => span.ended))];
      const kinds = byKind(spans);
      return html`
        <p class="row"><span class="quiet">${is_whole ? "All" : "The last"} ${spans.length} operations and samples, over ${seconds(end - start)}.
          Pale: waiting. Full: computing.</span> <${PerfettoFile} id=${id} /></p>
        <${Bars} kinds=${kinds} start=${start} end=${end} />
        <${Table} caption="Waits and computing by kind" columns=${["Kind", "Number", "Waited", "Computed", "Failed"]}>
          ${kinds.map(([kind, { spans: own, waited, computed, failed }]) => html`<tr key=${kind}>
            <td>${kind}</td><td class="number">${own.length}</td>
            <td class="number">${seconds(waited)}</td><td class="number">${seconds(computed)}</td>
            <td class="number">${failed || ""}</td>
          </tr>`)}
        <//>`;
    }}<//>`;
}
