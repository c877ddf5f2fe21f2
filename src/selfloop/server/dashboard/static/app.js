// The page: who is signed in, and which view the address names.

import { html, render, useEffect, useLayoutEffect, useRef, useState } from "./htm-preact.js";
import { forgetKey, get, key, signIn } from "./api.js";
import { Setup, Usage } from "./account.js";
import { Checkpoints } from "./checkpoints.js";
import { Overview } from "./overview.js";
import { Playground } from "./playground.js";
import { Compare, Run, Runs } from "./runs.js";
import { Problem } from "./ui.js";

const NAVIGATION = [
  ["", "Overview"],
  ["runs", "Runs"],
  ["playground", "Playground"],
  ["checkpoints", "Checkpoints"],
  ["usage", "Usage"],
  ["setup", "Set up a client"],
];

function view([name, argument]) {
  switch (name) {
    case "":
      return html`<${Overview} />`;
    case "runs":
      return argument ? html`<${Run} key=${argument} id=${argument} />` : html`<${Runs} />`;
    case "compare":
      return html`<${Compare} key=${argument} ids=${(argument || "").split(",").filter(Boolean)} />`;
    case "playground":
      return html`<${Playground} target=${argument} />`;
    case "checkpoints":
      return html`<${Checkpoints} key=${argument} run=${argument} />`;
    case "usage":
      return html`<${Usage} />`;
    case "setup":
      return html`<${Setup} />`;
    default:
      return html`<h1>There is no such page</h1><p><a href="#/">To the overview</a></p>`;
  }
}

// The parts of the address behind "#/".
function place() {
  const [name, ...rest] = location.hash.replace(/^#\/?/, "").split("/");
  return [name, rest.length ? decodeURIComponent(rest.join("/")) : undefined];
}

function SignIn({ onUser }) {
  const [given, setGiven] = useState("");
  const [error, setError] = useState(null);
  const [asking, setAsking] = useState(false);
  const submit = async (event) => {
    event.preventDefault();
    setAsking(true);
    try {
      onUser(await signIn(given.trim()));
    } catch (refused) {
      setError(refused);
      setAsking(false);
    }
  };
  return html`<main class="sign-in">
    <h1>Selfloop</h1>
    <form onSubmit=${submit}>
      <label for="key">API key</label>
      <input id="key" type="password" autocomplete="current-password" required autofocus value=${given}
        onInput=${(event) => setGiven(event.target.value)} aria-describedby="about-key" />
      <p id="about-key" class="quiet">The first one is in <code>~/.selfloop/api_key</code> on the server's machine;
        <code>selfloop keys create NAME</code> makes more. It is kept in this tab until you close it.</p>
      <${Problem} error=${error} />
      <button type="submit" disabled=${asking}>Sign in</button>
    </form>
  </main>`;
}

function Page({ user, onSignOut }) {
  const [at, setAt] = useState(place());
  const main = useRef();
  // Before anything can be pressed: or else a first step elsewhere would be missed.
  useLayoutEffect(() => {
    const moved = () => {
      setAt(place());
      main.current.focus();
      scrollTo(0, 0);
    };
    addEventListener("hashchange", moved);
    return () => removeEventListener("hashchange", moved);
  }, []);
  const here = at[0] === "compare" ? "runs" : at[0];
  useEffect(() => {
    const found = NAVIGATION.find(([name]) => name === here);
    document.title = `${at[1] || (found ? found[1] : "")} - Selfloop`;
  }, [at.join()]);
  return html`
    <a class="skip" href="#main" onClick=${(event) => { event.preventDefault(); main.current.focus(); }}>Skip to the content</a>
    <header>
      <strong>Selfloop</strong>
      <nav aria-label="Pages">${NAVIGATION.map(([name, label]) => html`
        <a href=${`#/${name}`} aria-current=${name === here ? "page" : null}>${label}</a>`)}
        <a href="docs">API</a></nav>
      <span class="who">${user.email || user.user_id} <button type="button" onClick=${onSignOut}>Sign out</button></span>
    </header>
    <main id="main" tabindex="-1" ref=${main}>${view(at)}</main>`;
}

function App() {
  const [user, setUser] = useState(null);
  const [ready, setReady] = useState(!key());
  useEffect(() => {
    if (!key()) return;
    get("/v1/users/me").then(setUser, (error) => error.status === 401 && forgetKey()).finally(() => setReady(true));
  }, []);
  if (!ready) return html`<p class="quiet" role="status">Loading…</p>`;
  if (!user) return html`<${SignIn} onUser=${setUser} />`;
  const signOut = () => {
    forgetKey();
    setUser(null);
  };
  return html`<${Page} user=${user} onSignOut=${signOut} />`;
}

const root = document.getElementById("app");
root.replaceChildren();
render(html`<${App} />`, root);
