// Asks the server; an answer that is an error becomes an Error with the server's own words.

export async function fetchJson(path, body) {
  const options =
    body === undefined
      ? {}
      : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("the server does not answer: was it stopped?");
  }
  let data = null;
  try {
    data = await answer.json();
  } catch {
    // not JSON: the status says what there is to say
  }
  if (!answer.ok || data === null) throw new Error(data?.error ?? `the server answers with status ${answer.status}`);
  return data;
}

export const slidePath = (name) => `/slides/${encodeURIComponent(name)}`;
