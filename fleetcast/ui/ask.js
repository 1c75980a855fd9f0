// Asking the daemon. The key is asked for once, kept in sessionStorage, and sent as a header only.

const STORED = "fleetcast-key";
let asking = null;

export class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

/** Get `path` (below /ui/api/, or from the root with "../"); null where it has not changed since `tag`. */
export async function get(path, fields = {}, known = {}) {
  const query = new URLSearchParams(Object.entries(fields).filter(([, value]) => value !== "" && value !== undefined));
  const url = `${path.startsWith("../") ? path : `api/${path}`}${query.size ? `?${query}` : ""}`;
  for (;;) {
    const key = keptKey();
    const headers = { ...(key ? { "X-API-Key": key } : {}), ...(known.tag ? { "If-None-Match": known.tag } : {}) };
    const answer = await fetch(url, { headers, cache: "no-store", credentials: "omit", redirect: "error" });
    if (answer.status === 304) return null;
    if (answer.status === 401) {
      document.getElementById("alert").hidden = true; // it answers: what stands there is over
      if (sessionStorage.getItem(STORED) === key) sessionStorage.removeItem(STORED); // it opens nothing
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
  const key = keptKey();
  const headers = { "Content-Type": "application/json", ...(key ? { "X-API-Key": key } : {}) };
  const answer = await fetch(`api/${path}`, { method: "POST", headers, body: JSON.stringify(body), cache: "no-store", credentials: "omit", redirect: "error" });
  if (!answer.ok) throw new Refused(answer.status, await detailOf(answer));
  return answer.json();
}

async function detailOf(answer) {
  try {
    const { detail } = await answer.json();
    if (Array.isArray(detail)) return detail.map(({ loc, msg }) => `${loc.at(-1)}: ${msg}`).join("; ");
    return typeof detail === "string" ? detail : `the daemon answered ${answer.status}`;
  } catch {
    return `the daemon answered ${answer.status}`;
  }
}

/** The key of this tab, if it can be sent at all. */
function keptKey() {
  const key = sessionStorage.getItem(STORED);
  if (key && whyNoKey(key)) sessionStorage.removeItem(STORED);
  return sessionStorage.getItem(STORED);
}

/** What is wrong with a key: a header holds characters of Latin-1 that are visible, and blanks within. */
function whyNoKey(key) {
  const odd = [...key].find((sign) => !/[\x20-\x7e\xa0-\xff]/u.test(sign));
  if (odd) return `No header can carry the character ${/[\p{C}\p{Z}]/u.test(odd) ? `U+${odd.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}` : `“${odd}”`}, so this is not the daemon's key. Nothing was kept.`;
  return key === key.trim() ? "" : "A key neither begins nor ends with a blank. Nothing was kept.";
}

/** Open the dialog; everything that waits for a key waits for the same one. */
function askForKey(refused) {
  if (!asking && sessionStorage.getItem(STORED)) return Promise.resolve(); // another question got one meanwhile
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("ask");
    const field = document.getElementById("key");
    if (refused) document.getElementById("ask-text").textContent = "The daemon did not accept this key. Is it the TFT_API_KEY it was started with?";
    field.value = "";
    const check = () => field.setCustomValidity(whyNoKey(field.value)), keepOpen = (event) => event.preventDefault();
    field.addEventListener("input", check);
    dialog.addEventListener("cancel", keepOpen);
    dialog.addEventListener("close", () => {
      field.removeEventListener("input", check);
      dialog.removeEventListener("cancel", keepOpen);
      sessionStorage.setItem(STORED, field.value);
      field.value = "";
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}
