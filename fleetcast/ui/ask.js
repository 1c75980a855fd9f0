// Asking the daemon. The key is asked for once, kept in sessionStorage, and sent as a header only.

const STORED = "fleetcast-key";
let asking = null;

export class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

/** Get `path` (below /ui/api/); null where it has not changed since `tag`. */
export async function get(path, fields = {}, known = {}) {
  const query = new URLSearchParams(Object.entries(fields).filter(([, value]) => value !== "" && value !== undefined));
  const url = `api/${path}${query.size ? `?${query}` : ""}`;
  for (;;) {
    const key = sessionStorage.getItem(STORED);
    const headers = { ...(key ? { "X-API-Key": key } : {}), ...(known.tag ? { "If-None-Match": known.tag } : {}) };
    const answer = await fetch(url, { headers, cache: "no-store", credentials: "omit", redirect: "error" });
    if (answer.status === 304) return null;
    if (answer.status === 401) {
      await askForKey(key);
      continue;
    }
    if (!answer.ok) throw new Refused(answer.status, await detailOf(answer));
    known.tag = answer.headers.get("etag") ?? undefined;
    return answer.json();
  }
}

/** Post an order to `path`; throws `Refused` with the daemon's own words. */
export async function give(path, body) {
  const key = sessionStorage.getItem(STORED);
  const headers = { "Content-Type": "application/json", ...(key ? { "X-API-Key": key } : {}) };
  const answer = await fetch(`api/${path}`, { method: "POST", headers, body: JSON.stringify(body), cache: "no-store", credentials: "omit", redirect: "error" });
  if (!answer.ok) throw new Refused(answer.status, await detailOf(answer));
  return answer.json();
}

async function detailOf(answer) {
  try {
    const { detail } = await answer.json();
    return typeof detail === "string" ? detail : `the daemon answered ${answer.status}`;
  } catch {
    return `the daemon answered ${answer.status}`;
  }
}

/** Open the dialog; everything that waits for a key waits for the same one. */
function askForKey(refused) {
  if (sessionStorage.getItem(STORED) !== refused) return Promise.resolve(); // another question got one meanwhile
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("ask");
    const field = document.getElementById("key");
    if (refused) document.getElementById("ask-text").textContent = "The daemon did not accept this key. Is it the TFT_API_KEY it was started with?";
    field.value = "";
    dialog.addEventListener("cancel", (event) => event.preventDefault(), { once: true });
    dialog.addEventListener("close", () => {
      sessionStorage.setItem(STORED, field.value);
      field.value = "";
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}
