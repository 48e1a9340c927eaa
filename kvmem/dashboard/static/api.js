// What is asked of the server. Addresses are relative: the page may be mounted anywhere.

export const chosen = { engine: "" };

export async function ask(what, query = {}) {
  const parameters = new URLSearchParams({ ...query, ...(chosen.engine ? { engine: chosen.engine } : {}) });
  const answer = await fetch(`api/${what}?${parameters}`, { cache: "no-store" });
  if (answer.status === 401) location.assign("login");
  const told = await answer.json();
  if (!answer.ok) throw new Error(told.error);
  return told;
}

// Calls `told` with each overview, `gone` with why there is none; the answer ends it.
export function follow(told, gone) {
  let source, timer, wait = 1000, ended = false;
  const open = () => {
    source = new EventSource(`api/stream?${new URLSearchParams(chosen.engine ? { engine: chosen.engine } : {})}`);
    source.addEventListener("overview", (event) => { wait = 1000; told(JSON.parse(event.data)); });
    source.addEventListener("gone", (event) => gone(event.data));
    source.onerror = () => {
      source.close();
      if (ended) return;
      gone("No engine answers. This page asks again.");
      timer = setTimeout(open, wait);
      wait = Math.min(10000, wait * 2);
    };
  };
  open();
  return () => { ended = true; clearTimeout(timer); source.close(); };
}
