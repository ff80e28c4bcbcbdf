// Updates open pages with the server's events, and assists with forms. All pages work without this script.
"use strict";

// The only source of elements that are made from text. The text comes from the server, which escapes it.
const trusted = window.trustedTypes
  ? window.trustedTypes.createPolicy("nanite", { createHTML: (text) => text })
  : { createHTML: (text) => text };

const byId = (id) => document.getElementById(id);

function createElement(text) {
  const template = document.createElement("template");
  template.innerHTML = trusted.createHTML(text);
  return template.content.firstElementChild;
}

// Runs a change that may replace elements. The focus moves to the new element with the same id or link.
function preservingFocus(change) {
  const active = document.activeElement;
  const selector = active && (active.id ? "#" + CSS.escape(active.id)
    : active.getAttribute("href") && `[href="${CSS.escape(active.getAttribute("href"))}"]`);
  const container = active && active.closest("[data-id], [id]");
  change();
  if (selector && active !== document.activeElement && !active.isConnected) {
    const id = container && container.dataset.id;
    const row = id && document.querySelector(`[data-id="${CSS.escape(id)}"]`);
    const replacement = (row || document).querySelector(selector);
    if (replacement) replacement.focus({ preventScroll: true });
  }
}

// Ages, by the server's clock.

let clockOffset = Number(document.body.dataset.now) - Date.now() / 1000;

function formatAge(seconds) {
  if (seconds < 120) return `${seconds} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} d`;
}

function updateAges() {
  const now = Math.floor(Date.now() / 1000 + clockOffset);
  for (const time of document.querySelectorAll("time[data-at]")) {
    const text = `${formatAge(Math.max(0, now - Number(time.dataset.at)))} ago`;
    if (time.textContent !== text) time.textContent = text;
  }
}
setInterval(updateAges, 1000);

// Events.

function updateRows(rows) {
  const body = byId("rows");
  const existing = new Map(Array.from(body.children, (row) => [row.dataset.id, row]));
  let next = body.firstElementChild;
  for (const [id, text] of rows) {
    let row = existing.get(id);
    existing.delete(id);
    if (text !== null) {
      const updated = createElement(text);
      if (row) {
        if (row === next) next = updated;
        row.replaceWith(updated);
      }
      row = updated;
    }
    if (!row) continue;
    if (row === next) next = row.nextElementSibling;
    else body.insertBefore(row, next);
  }
  for (const row of existing.values()) row.remove();
}

function applyMessage(message) {
  clockOffset = message.now - Date.now() / 1000;
  preservingFocus(() => {
    for (const [id, text] of Object.entries(message.parts || {})) {
      const element = byId(id);
      if (element) element.innerHTML = trusted.createHTML(text);
    }
    if (message.rows) updateRows(message.rows);
    for (const [index, text] of message.append || []) {
      if (!byId(`result-${index}`)) byId("results").append(createElement(text));
    }
    if (message.done) {
      source.close();
      for (const element of document.querySelectorAll("[data-running]")) element.remove();
      const empty = document.querySelector("#results + .empty");
      if (empty) empty.textContent = "No results.";
    }
  });
  updateAges();
}

let source = null;

function connect(address) {
  if (source) source.close();
  source = new EventSource(address);
  const connection = byId("connection");
  source.onopen = () => { connection.hidden = true; };
  source.onmessage = (event) => applyMessage(JSON.parse(event.data));
  source.onerror = () => {
    connection.hidden = false;
    // After an error response the browser does not reconnect: the session may have ended.
    const closed = source.readyState === EventSource.CLOSED;
    connection.textContent = closed ? "No longer updated. Reload the page." : "Reconnecting...";
  };
}

const live = document.body.dataset.live;
if (live) connect(live.includes("?") ? live : live + location.search);

// Search while typing.

const search = byId("search");
if (search) {
  let timer = 0;
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      const page = new URL(location.href);
      page.searchParams.set("q", search.value);
      page.searchParams.delete("page");
      history.replaceState(null, "", page);
      connect(live + page.search);
    }, 150);
  });
  // Links for sorting and paging were rendered with the previous search.
  document.addEventListener("click", (event) => {
    const link = event.target.closest && event.target.closest("a[data-search]");
    if (!link) return;
    const target = new URL(link.href);
    target.searchParams.set("q", search.value);
    link.href = target.href;
  }, true);
}

// Whether the payload is JSON.

const payload = byId("payload");
if (payload) {
  const hint = byId("payload-hint");
  const defaultHint = hint.textContent;
  const updateHint = () => {
    const text = payload.value.trim();
    hint.classList.remove("error");
    if (!text) {
      hint.textContent = defaultHint;
      return;
    }
    try {
      JSON.parse(text);
      hint.textContent = "Valid JSON.";
    } catch (error) {
      const looksLikeJson = /^[\[{"]/.test(text);
      hint.classList.toggle("error", looksLikeJson);
      hint.textContent = looksLikeJson ? `Not valid JSON, so it is sent as text: ${error.message}` : "Sent as text.";
    }
  };
  payload.addEventListener("input", updateHint);
  updateHint();
}
