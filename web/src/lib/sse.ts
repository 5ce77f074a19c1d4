/** Server-sent events out of a response body. https://html.spec.whatwg.org/multipage/server-sent-events.html */
import { createParser } from 'eventsource-parser';

export interface ServerEvent {
  id: string | undefined;
  event: string | undefined;
  data: string;
}

/** Yields whole events, however the bytes were cut. Ends when the body ends; throws what the body throws. */
export async function* readEvents(body: ReadableStream<Uint8Array>): AsyncGenerator<ServerEvent> {
  const ready: ServerEvent[] = [];
  const parser = createParser({
    onEvent: ({ id, event, data }) => ready.push({ id, event, data }),
  });
  const decoder = new TextDecoder();
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      parser.feed(decoder.decode(value, { stream: true }));
      while (ready.length > 0) yield ready.shift() as ServerEvent;
    }
  } finally {
    reader.cancel().catch(() => undefined);
  }
}
