// Keeps a page up to date by the events of its server, and helps with forms. Everything on a page works without it.
"use strict";

// All elements made from text come from here, and their text is made by the server, which escapes it.
const html = window.trustedTypes
  ? window.trustedTypes.createPolicy("nanite", { createHTML: (text) => text })
  : { createHTML: (text) => text };

const byId = (id) => document.getElementById(id);

function made(text) {
  const holder = document.createElement("template");
  holder.innerHTML = html.createHTML(text);
  return holder.content.firstElementChild;
}

// Puts new elements in the place of old ones. The keyboard's focus stays on what has the same address or id.
function keepingFocus(change) {
  const active = document.activeElement;
  const mark = active && (active.id ? "#" + CSS.escape(active.id)
    : active.getAttribute("href") && `[href="${CSS.escape(active.getAttribute("href"))}"]`);
  const within = active && active.closest("[data-id], [id]");
  change();
  if (mark && active !== document.activeElement && !active.isConnected) {
    const place = within && within.dataset.id && document.querySelector(`[data-id="${CSS.escape(within.dataset.id)}"]`);
    const again = (place || document).querySelector(mark);
    if (again) again.focus({ preventScroll: true });
  }
}

// Ages.

let ahead = Number(document.body.dataset.now) - Date.now() / 1000;

function span(seconds) {
  if (seconds < 120) return `${seconds} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} d`;
}

function ages() {
  const now = Math.floor(Date.now() / 1000 + ahead);
  for (const time of document.querySelectorAll("time[data-at]")) {
    const text = `${span(Math.max(0, now - Number(time.dataset.at)))} ago`;
    if (time.textContent !== text) time.textContent = text;
  }
}
setInterval(ages, 1000);

// What the server says.

function rows(list) {
  const body = byId("rows");
  const known = new Map(Array.from(body.children, (row) => [row.dataset.id, row]));
  let next = body.firstElementChild;
  for (const [id, text] of list) {
    let row = known.get(id);
    known.delete(id);
    if (text !== null) {
      const fresh = made(text);
      if (row) {
        if (row === next) next = fresh;
        row.replaceWith(fresh);
      }
      row = fresh;
    }
    if (!row) continue;
    if (row === next) next = row.nextElementSibling;
    else body.insertBefore(row, next);
  }
  for (const row of known.values()) row.remove();
}

function told(message) {
  ahead = message.now - Date.now() / 1000;
  keepingFocus(() => {
    for (const [id, text] of Object.entries(message.parts || {})) {
      const element = byId(id);
      if (element) element.innerHTML = html.createHTML(text);
    }
    if (message.rows) rows(message.rows);
    for (const [number, text] of message.append || []) {
      if (!byId(`entry-${number}`)) byId("entries").append(made(text));
    }
    if (message.done) {
      source.close();
      for (const element of document.querySelectorAll("[data-running]")) element.remove();
      for (const none of document.querySelectorAll(".entries:empty + .empty")) none.textContent = "Nobody answered.";
    }
  });
  ages();
}

let source = null;

function listen(address) {
  if (source) source.close();
  source = new EventSource(address);
  const connection = byId("connection");
  source.onopen = () => { connection.hidden = true; };
  source.onmessage = (event) => told(JSON.parse(event.data));
  source.onerror = () => {
    connection.hidden = false;
    // A refusal is for good: the session may have ended.
    const gone = source.readyState === EventSource.CLOSED;
    connection.textContent = gone ? "No longer up to date: load the page again." : "Connecting again...";
  };
}

const live = document.body.dataset.live;
if (live) listen(live.includes("?") ? live : live + location.search);

// Searching while one types.

const search = byId("search");
if (search) {
  let waiting = 0;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      const page = new URL(location.href);
      page.searchParams.set("q", search.value);
      page.searchParams.delete("page");
      history.replaceState(null, "", page);
      listen(live + page.search);
    }, 150);
  });
  // The links that sort were made before.
  document.addEventListener("click", (event) => {
    const link = event.target.closest && event.target.closest("a[data-search]");
    if (!link) return;
    const to = new URL(link.href);
    to.searchParams.set("q", search.value);
    link.href = to.href;
  }, true);
}

// What a payload is.

const payload = byId("payload");
if (payload) {
  const hint = byId("payload-is");
  const usual = hint.textContent;
  const judge = () => {
    const text = payload.value.trim();
    hint.classList.remove("wrong");
    if (!text) {
      hint.textContent = usual;
      return;
    }
    try {
      JSON.parse(text);
      hint.textContent = "This is JSON.";
    } catch (error) {
      const meant = /^[\[{"]/.test(text);
      hint.classList.toggle("wrong", meant);
      hint.textContent = meant ? `Not JSON, so it is sent as text: ${error.message}` : "This is sent as text.";
    }
  };
  payload.addEventListener("input", judge);
  judge();
}
