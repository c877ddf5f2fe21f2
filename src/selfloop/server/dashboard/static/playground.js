// Chat and completion with a base model, a checkpoint, or the newest weights of a run; each token with its logprob.

import { html, useEffect, useRef, useState } from "./htm-preact.js";
import { events, get, rows, send } from "./api.js";
import { Loaded, Problem, useAsked } from "./ui.js";

const TOP = 5;

async function targets() {
  const [models, runs] = await Promise.all([
    get("/oai/api/v1/models"),
    rows("/v1/loops/runs", "runs", { scope: "org" }),
  ]);
  const ids = models.data.map((model) => model.id);
  return {
    base: ids.filter((id) => !id.startsWith("bt://")),
    checkpoints: ids.filter((id) => id.startsWith("bt://")),
    runs: runs.filter((run) => run.status.name === "ACTIVE"),
  };
}

// {path, model} of a target; of a run a sampler of its newest weights, which `close` ends.
async function opened(target) {
  if (!target.startsWith("run:")) return { path: "/oai/api/v1", model: target, close: () => {} };
  const { sampler } = await send("POST", `/v1/loops/runs/${target.slice(4)}/newest_sampler`, {});
  return {
    path: `${new URL(sampler.base_url).pathname}/v1`,
    model: sampler.base_model,
    close: () => send("POST", `/v1/loops/samplers/${sampler.id}/deactivate`, {}).catch(() => {}),
  };
}

// Tokens [{text, logprob, top: [[text, logprob]]}] of one streamed chunk of either kind.
function tokensOf(choice) {
  const given = choice.logprobs;
  if (given && given.content) {
    return given.content.map((one) => ({ text: one.token, logprob: one.logprob, top: (one.top_logprobs || []).map((top) => [top.token, top.logprob]) }));
  }
  if (given && given.tokens) {
    return given.tokens.map((text, place) => ({ text, logprob: given.token_logprobs[place], top: Object.entries((given.top_logprobs || [])[place] || {}) }));
  }
  const text = choice.text || (choice.delta && choice.delta.content);
  return text ? [{ text, logprob: null, top: [] }] : [];
}

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)}%`;
const shade = (logprob) => (logprob === null ? "" : `p${Math.min(5, Math.floor(-logprob))}`);
const visible = (text) => text.replaceAll("\n", "⏎");

// The tokens, coloured by their logprob; arrows, a pointer or a click choose the one that is explained.
function Tokens({ tokens }) {
  const [at, setAt] = useState(null);
  const chosen = at === null ? null : tokens[at];
  const onKeyDown = (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by && tokens.length) {
      setAt(Math.max(0, Math.min(tokens.length - 1, (at === null ? -1 : at) + by)));
      event.preventDefault();
    }
  };
  return html`<div>
    <div class="tokens" tabindex="0" role="group" aria-label="Sampled tokens; left and right arrows explain each" onKeyDown=${onKeyDown}>
      ${tokens.map((token, place) => html`<span key=${place} class=${`${shade(token.logprob)} ${place === at ? "chosen" : ""}`}
        onMouseEnter=${() => setAt(place)} onClick=${() => setAt(place)}>${token.text}</span>`)}
    </div>
    <p class="explained" aria-live="polite">${chosen && chosen.logprob !== null
      ? html`<code>${visible(chosen.text)}</code> ${percent(chosen.logprob)} (logprob ${chosen.logprob.toFixed(3)})
          ${chosen.top.map(([text, logprob]) => html` · <code>${visible(text)}</code> ${percent(logprob)}`)}`
      : html`<span class="quiet">Darker tokens were less likely. Point at one, or use the arrows.</span>`}</p>
  </div>`;
}

function Choose({ found, target, onTarget }) {
  const known = [...found.base, ...found.checkpoints, ...found.runs.map((run) => `run:${run.id}`)];
  const option = (value, label) => html`<option value=${value} selected=${value === target}>${label}</option>`;
  return html`<label>Weights
    <select value=${target} onChange=${(event) => onTarget(event.target.value)}>
      ${!known.includes(target) && option(target, target)}
      <optgroup label="Base models">${found.base.map((id) => option(id, id))}</optgroup>
      <optgroup label="Runs, as they are now">${found.runs.map((run) => option(`run:${run.id}`, `${run.id} ${run.name}`))}</optgroup>
      <optgroup label="Checkpoints">${found.checkpoints.map((id) => option(id, id))}</optgroup>
    </select></label>`;
}

function Form({ found, first }) {
  const [target, setTarget] = useState(first || found.base[0] || "");
  const [chat, setChat] = useState(true);
  const [text, setText] = useState("");
  const [temperature, setTemperature] = useState("0.7");
  const [most, setMost] = useState("128");
  const [turns, setTurns] = useState([]);
  const [error, setError] = useState(null);
  const [stopping, setStopping] = useState(null);
  const open = useRef(null);
  const closed = () => {
    if (open.current) open.current.then((one) => one.close(), () => {});
    open.current = null;
  };
  useEffect(() => closed, [target]);

  const turnTo = (change) => setTurns((old) => [...old.slice(0, -1), { ...old.at(-1), ...change(old.at(-1)) }]);
  async function sample(event) {
    event.preventDefault();
    const stop = new AbortController();
    const asked = text;
    const before = chat ? turns : [];
    setTurns([...before, { asked, tokens: [] }]);
    setError(null);
    setText(chat ? "" : text);
    setStopping(stop);
    try {
      open.current = open.current || opened(target);
      const { path, model } = await open.current;
      const said = before.flatMap((turn) => [
        { role: "user", content: turn.asked },
        { role: "assistant", content: turn.tokens.map((token) => token.text).join("") },
      ]);
      const shared = { model, max_tokens: Number(most), temperature: Number(temperature), stream: true };
      const body = chat
        ? { ...shared, messages: [...said, { role: "user", content: asked }], logprobs: true, top_logprobs: TOP }
        : { ...shared, prompt: asked, logprobs: TOP };
      const route = chat ? "/chat/completions" : "/completions";
      for await (const { data } of events(path + route, { body, signal: stop.signal })) {
        if (data.error) throw new Error(data.error.message);
        const tokens = (data.choices || []).flatMap(tokensOf);
        if (tokens.length) turnTo((turn) => ({ tokens: [...turn.tokens, ...tokens] }));
      }
    } catch (refused) {
      if (refused.name !== "AbortError") setError(refused);
      // A run's sampler may have been ended meanwhile: the next try makes one.
      closed();
    } finally {
      setStopping(null);
    }
  }

  return html`
    <form onSubmit=${sample} class="playground">
      <div class="row">
        <${Choose} found=${found} target=${target} onTarget=${setTarget} />
        <label>Temperature <input type="number" min="0" max="2" step="0.1" value=${temperature} onInput=${(e) => setTemperature(e.target.value)} /></label>
        <label>Most tokens <input type="number" min="1" max="4096" value=${most} onInput=${(e) => setMost(e.target.value)} /></label>
      </div>
      <div class="row" role="group" aria-label="Kind">
        <button type="button" aria-pressed=${chat} onClick=${() => { setChat(true); setTurns([]); }}>Chat</button>
        <button type="button" aria-pressed=${!chat} onClick=${() => { setChat(false); setTurns([]); }}>Completion</button>
        ${turns.length > 0 && html`<button type="button" onClick=${() => setTurns([])}>Clear</button>`}
      </div>
      ${turns.map((turn, place) => html`<section key=${place} aria-label=${`Turn ${place + 1}`}>
        <p class="asked">${turn.asked}</p>
        <${Tokens} tokens=${turn.tokens} />
      </section>`)}
      <${Problem} error=${error} />
      <label>${chat ? "Message" : "Prompt"}
        <textarea rows="4" required value=${text} onInput=${(e) => setText(e.target.value)}
          onKeyDown=${(e) => e.key === "Enter" && (e.ctrlKey || e.metaKey) && e.target.form.requestSubmit()}></textarea></label>
      <div class="row">
        ${stopping
          ? html`<button type="button" onClick=${() => stopping.abort()}>Stop</button>`
          : html`<button type="submit" disabled=${!target}>Sample</button>`}
        <span class="quiet" role="status">${stopping ? "Sampling…" : "Ctrl+Enter samples."}</span>
      </div>
    </form>`;
}

export function Playground({ target }) {
  const asked = useAsked(targets);
  return html`<h1>Playground</h1>
    <${Loaded} asked=${asked}>${(found) => html`<${Form} key=${target} found=${found} first=${target} />`}<//>`;
}
