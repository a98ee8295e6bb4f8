// Keeps a page up to date: at each event it loads itself again and replaces its live parts where they differ.
"use strict";
(() => {
  const scope = document.body.dataset.watch;
  if (!scope) return;
  const SLOW = 20000, FAST = 5000; // milliseconds between polls, with and without events
  const pulse = document.getElementById("pulse"), news = document.getElementById("news");
  let source, live = false, busy = false, again = false, timer, last = new Date();

  const tell = (ok) => {
    pulse.hidden = false;
    pulse.classList.toggle("live", ok);
    pulse.textContent = ok ? (live ? "Live" : "Updated every few seconds")
      : `Not updated since ${last.toLocaleTimeString()}: the server does not answer`;
  };

  // What the server said last: what people did to a part since, or another script, is no reason to draw it again.
  const said = new Map([...document.querySelectorAll("[data-live]")].map((part) => [part.id, part.innerHTML]));

  const replace = (old, fresh) => {
    if (said.get(old.id) === fresh.innerHTML) return;
    const chosen = getSelection();
    if (!chosen.isCollapsed && old.contains(chosen.anchorNode)) return; // somebody is about to copy it: next time
    said.set(old.id, fresh.innerHTML);
    const active = old.contains(document.activeElement) ? document.activeElement : null;
    const path = active && (active.id ? `#${CSS.escape(active.id)}` : active.getAttribute("href") && `a[href="${CSS.escape(active.getAttribute("href"))}"]`);
    const states = new Map([...old.querySelectorAll("[data-state]")].map((one) => [one.id, one.dataset.state]));
    const scrolled = old.querySelector(".output")?.scrollTop ?? 0; // from its end
    old.replaceChildren(...[...fresh.childNodes].map((node) => document.importNode(node, true)));
    for (const one of old.querySelectorAll("[data-state]"))
      if (states.get(one.id) !== one.dataset.state) one.classList.add("changed");
    const output = old.querySelector(".output");
    if (output) output.scrollTop = scrolled;
    if (path) old.querySelector(path)?.focus({ preventScroll: true });
  };

  const refresh = async () => {
    if (document.hidden) return;
    if (busy) { again = true; return; }
    busy = true;
    clearTimeout(timer);
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" }, cache: "no-store" });
      if (answer.redirected || answer.status === 404) { location.reload(); return; } // signed out, or gone
      if (!answer.ok) throw new Error(String(answer.status));
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const old of document.querySelectorAll("[data-live]")) {
        const fresh = page.getElementById(old.id);
        if (fresh) replace(old, fresh);
      }
      const headline = page.getElementById("news")?.textContent ?? "";
      if (news && news.textContent !== headline) news.textContent = headline;
      last = new Date();
      document.dispatchEvent(new Event("beaker:updated"));
      tell(true);
    } catch {
      tell(false);
    } finally {
      busy = false;
      timer = setTimeout(refresh, live ? SLOW : FAST);
      if (again) { again = false; refresh(); }
    }
  };

  const listen = () => {
    source = new EventSource(`/events?on=${encodeURIComponent(scope)}`);
    source.addEventListener("open", () => { live = true; tell(true); });
    source.addEventListener("changed", refresh);
    source.addEventListener("over", () => location.reload());
    source.addEventListener("error", () => {
      live = false;
      clearTimeout(timer);
      timer = setTimeout(refresh, 1000);
    });
  };

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) { source?.close(); live = false; } else { listen(); refresh(); }
  });
  if (!document.hidden) listen();
  timer = setTimeout(refresh, SLOW);
})();
