// Small parts that every view has.

import { html, useEffect, useRef, useState } from "./htm-preact.js";

export const bytes = (n) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  for (; n >= 1024 && place < units.length - 1; place++) n /= 1024;
  return `${place ? n.toFixed(1) : n} ${units[place]}`;
};
export const count = (n) => n.toLocaleString("en");
export const short = (n) => (n === null || n === undefined ? "" : Number(n.toPrecision(4)).toString());
export const moment = (stamp) => new Date(stamp).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });

// {data, error, again}: what `ask` gives, asked anew when `inputs` change and every `everyS` seconds.
export function useAsked(ask, inputs = [], everyS = 0) {
  const [state, setState] = useState({});
  const [round, setRound] = useState(0);
  useEffect(() => {
    let live = true;
    ask().then(
      (data) => live && setState({ data }),
      (error) => live && setState((old) => ({ ...old, error })),
    );
    const timer = everyS && setTimeout(() => setRound(round + 1), everyS * 1000);
    return () => {
      live = false;
      clearTimeout(timer);
    };
  }, [...inputs, round]);
  return { ...state, again: () => setRound(round + 1) };
}

export function Problem({ error }) {
  return error ? html`<p class="problem" role="alert">${error.message}</p>` : null;
}

// What was asked, once it is there.
export function Loaded({ asked, children }) {
  if (asked.data === undefined) {
    return asked.error ? html`<${Problem} error=${asked.error} />` : html`<p class="quiet" role="status">Loading…</p>`;
  }
  return html`<${Problem} error=${asked.error} />${children(asked.data)}`;
}

export function Status({ name }) {
  const good = ["RUNNING", "ACTIVE", "ready"].includes(name);
  const bad = ["FAILED", "DEPLOY_FAILED", "UNHEALTHY", "BUILD_FAILED"].includes(name);
  return html`<span class=${`status ${good ? "good" : bad ? "bad" : ""}`}>${name}</span>`;
}

export function Table({ caption, columns, children }) {
  return html`<div class="scroll" role="region" aria-label=${caption} tabindex="0">
    <table>
      <caption class="unseen">${caption}</caption>
      <thead><tr>${columns.map((column) => html`<th scope="col">${column}</th>`)}</tr></thead>
      <tbody>${children}</tbody>
    </table>
  </div>`;
}

// Lines of a shell or of Python, with a button that copies them.
export function Lines({ label, text }) {
  const [copied, setCopied] = useState(false);
  const copy = () => navigator.clipboard.writeText(text).then(() => setCopied(true), () => setCopied(false));
  return html`<figure class="lines">
    <figcaption>${label}
      <button type="button" onClick=${copy} aria-label=${`Copy: ${label}`}>${copied ? "Copied" : "Copy"}</button>
    </figcaption>
    <pre tabindex="0"><code>${text}</code></pre>
  </figure>`;
}

// Asks before something is done that cannot be undone; Escape says no.
export function Confirm({ question, action, onYes, onNo }) {
  const dialog = useRef();
  useEffect(() => dialog.current.showModal(), []);
  return html`<dialog ref=${dialog} onClose=${onNo} aria-label=${question}>
    <p>${question}</p>
    <div class="row">
      <button type="button" autofocus onClick=${onNo}>Keep</button>
      <button type="button" class="danger" onClick=${onYes}>${action}</button>
    </div>
  </dialog>`;
}
