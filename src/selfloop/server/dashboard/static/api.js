// The server's own API, asked with the key of this tab.

const KEY = "selfloop.key";

export const key = () => sessionStorage.getItem(KEY);
export const forgetKey = () => sessionStorage.removeItem(KEY);

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const headers = (more = {}) => ({ Authorization: `Bearer ${key()}`, ...more });

async function checked(response) {
  if (response.ok) return response;
  let message = `HTTP ${response.status}`;
  try {
    const body = await response.json();
    message = body.message || (body.error && body.error.message) || message;
  } catch {
    // Not JSON: the status is all there is.
  }
  throw new Refused(response.status, message);
}

function query(params) {
  const given = Object.entries(params).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return given.length ? "?" + new URLSearchParams(given) : "";
}

export async function get(path, params = {}) {
  return (await checked(await fetch(path + query(params), { headers: headers({ Accept: "application/json" }) }))).json();
}

export async function getText(path) {
  return (await checked(await fetch(path, { headers: headers() }))).text();
}

export async function send(method, path, body) {
  const json = body === undefined ? {} : { "Content-Type": "application/json" };
  const asked = { method, headers: headers(json), body: body === undefined ? undefined : JSON.stringify(body) };
  const text = await (await checked(await fetch(path, asked))).text();
  return text ? JSON.parse(text) : null;
}

// A key is kept once the server has taken it.
export async function signIn(given) {
  sessionStorage.setItem(KEY, given);
  try {
    return await get("/v1/users/me");
  } catch (error) {
    forgetKey();
    throw error;
  }
}

// Server-sent events as {event, data}; ends with the stream. `body` makes it a POST.
export async function* events(path, { params = {}, body, signal } = {}) {
  const post = body && { method: "POST", body: JSON.stringify(body) };
  const asked = { headers: headers(body ? { "Content-Type": "application/json" } : {}), signal, ...post };
  const response = await checked(await fetch(path + query(params), asked));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const frames = (rest + value).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      const lines = frame.split("\n");
      const data = lines.filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      const named = lines.find((line) => line.startsWith("event: "));
      if (data && data !== "[DONE]") yield { event: named ? named.slice(7) : "message", data: JSON.parse(data) };
    }
  }
}

// Every row of a list, page by page, up to `most`.
export async function rows(path, name, params = {}, most = 2000) {
  const found = [];
  let token;
  do {
    const page = await get(path, { ...params, page_size: 500, page_token: token });
    found.push(...page[name]);
    token = page.next_page_token;
  } while (token && found.length < most);
  return found;
}
