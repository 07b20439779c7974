// The page's data: base64 of zlib streams, unpacked when needed.

async function inflate(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function inflateText(base64) {
  return JSON.parse(new TextDecoder().decode(await inflate(base64)));
}

// Four byte planes, lowest first, of whole numbers whose sign is folded into the lowest bit.
async function inflateNumbers(base64) {
  const planes = await inflate(base64);
  const count = planes.length / 4;
  const numbers = new Int32Array(count);
  for (let i = 0; i < count; i++) {
    const folded = planes[i] | (planes[count + i] << 8) | (planes[2 * count + i] << 16) | (planes[3 * count + i] << 24);
    numbers[i] = (folded >>> 1) ^ -(folded & 1);
  }
  return numbers;
}

// What one rollout's chunk holds: ids, then log pi_S, then u (or log pi_T alone where there is no log pi_S). Nats; null where missing.
async function responseOf(data, row) {
  const numbers = await inflateNumbers(data.chunks[row.chunk]);
  const size = row.tokens;
  const nats = (part) => Float64Array.from(numbers.subarray(part * size, (part + 1) * size), (n) => n * data.quantum);
  const response = { ids: numbers.subarray(0, size), student: null, teacher: null, u: null };
  if (row.student) response.student = nats(1);
  if (row.student && row.teacher) {
    response.u = nats(2);
    response.teacher = response.u.map((u, i) => u + response.student[i]);
  } else if (row.teacher) {
    response.teacher = nats(1);
  }
  return response;
}

async function readData() {
  const raw = JSON.parse(document.getElementById("data").textContent);
  const about = await inflateText(raw.about);
  const special = new Set(about.tokens.special);
  const texts = new Map(about.tokens.ids.map((id, i) => [id, about.tokens.texts[i]]));
  // A word-level tokenizer has no white space in its tokens: its decoder puts some between them, and so does the page.
  const words = about.tokens.texts.length > 0 && !about.tokens.texts.some((text) => /\s/.test(text));
  return { ...about, chunks: raw.chunks, vocabulary: { words, text: (id) => texts.get(id), isSpecial: (id) => special.has(id) } };
}
