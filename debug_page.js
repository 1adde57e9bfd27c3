
"use strict";
// Every two seconds the page is read anew and put in place of itself, so that there is one way to draw it: the server's,
// which escapes everything. Nothing is read while nobody looks.
(() => {
  const root = document.documentElement;
  const parser = new DOMParser();
  const read = async () => {
    if (document.hidden) return;
    const focused = document.activeElement?.getAttribute("href");
    const scrolled = [...document.querySelectorAll("ol, ul")].map(list => list.scrollTop);
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" }, cache: "no-store" });
      if (!answer.ok) throw new Error(answer.status);
      const main = parser.parseFromString(await answer.text(), "text/html").querySelector("main");
      document.querySelector("main").replaceWith(document.adoptNode(main));
      document.querySelectorAll("ol, ul").forEach((list, i) => { list.scrollTop = scrolled[i] ?? 0; });
      if (focused) [...document.links].find(link => link.getAttribute("href") === focused)?.focus();
      root.className = "is-live";
    } catch {
      root.className = "is-lost";
    }
  };
  root.className = "is-live";
  const again = () => setTimeout(() => read().then(again), 2000);
  again();
  document.addEventListener("visibilitychange", read);
})();
